"""Class-wise training of Wasserstein GANs, and drawing from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import relu
from torch.optim import Adam, Optimizer, RMSprop

from sonofed_common.contract.errors import DivergenceError, SiteEmptyError
from sonofed_common.contract.names import CLASSES
from sonofed_common.contract.study_synthesis import WganTraining
from sonofed_common.models.wgan import LATENT, WganCritic, WganGenerator
from sonofed_common.runtime import SILENT, Events, derive_seed, device
from sonofed_common.synthesis.synthetic import Wanted
from sonofed_common.training import restore_checkpoint, run_fingerprint, save_checkpoint

SAVE_EVERY = 100
"""Generator steps between checkpoints."""


def train_wgan(
    images: Tensor,
    settings: WganTraining,
    seed: int,
    checkpoint: Path | None = None,
    events: Events = SILENT,
    task: str = "wgan",
) -> WganGenerator:
    """Train a GAN on the images of one class (Arjovsky et al., ICML 2017).

    Parameters
    ----------
    images : Tensor
        (N, 1, S, S), in [0, 1].
    settings : WganTraining
        Loss, optimiser and length.
    seed : int
        Of the weights, the order and the noise. Each step has its own seed, so that a resumed
        training ends with the bits of an uninterrupted one, on CPU.
    checkpoint : Path or None
        File that is written every 100 steps, and gone on from.
    events : Events
        Gets the progress.
    task : str
        Name of the work in events and errors.

    Returns
    -------
    WganGenerator
        In evaluation mode, on CPU.

    Raises
    ------
    SiteEmptyError
        There is no image.
    ConfigurationError
        The images' size is no power of two up to 128 px, or the checkpoint is of another run.
    DivergenceError
        A score is not finite.

    Notes
    -----
    The critic maximises ``E f(x) - E f(G(z))``, the generator ``E f(G(z))``; with ``hinge`` the
    critic minimises ``E max(0, 1 - f(x)) + E max(0, 1 + f(G(z)))`` (Lim and Ye, 2017).
    """
    if not len(images):
        raise SiteEmptyError(f"{task} has no image to train on; add labelled images")
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "weights"))
        nets = nn.ModuleDict(
            {
                "generator": WganGenerator(images.shape[-1], settings.width),
                "critic": WganCritic(images.shape[-1], settings.width),
            }
        )
    nets.to(device()).train()
    weights = list(nets.parameters())
    optimizer = _optimizer(weights, settings)
    fingerprint = run_fingerprint(
        nets, {"task": task, "count": len(images), "seed": seed, **settings.model_dump()}
    )
    gaps: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        gaps = restore_checkpoint(checkpoint, nets, weights, optimizer, fingerprint, task)
    for step in range(len(gaps), settings.steps):
        draws = Generator().manual_seed(derive_seed(seed, "step", step))
        gap = _step(nets, images, settings, optimizer, draws)
        if not math.isfinite(gap):
            raise DivergenceError(
                f"training of a GAN diverged in step {step + 1}: a score is not finite; "
                "lower the learning rate"
            )
        gaps.append(gap)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == settings.steps:
            events.progress(task, step + 1, settings.steps, gap=round(gap, 4))
            if checkpoint is not None:
                save_checkpoint(checkpoint, nets, weights, optimizer, fingerprint, gaps)
    generator = nets["generator"]
    assert isinstance(generator, WganGenerator)
    return generator.cpu().eval()


def _step(
    nets: nn.ModuleDict,
    images: Tensor,
    settings: WganTraining,
    optimizer: Optimizer,
    draws: Generator,
) -> float:
    """Train the critic ``critic_steps`` times and the generator once; return the critic's gap."""
    generator, critic = nets["generator"], nets["critic"]
    gap = 0.0
    for _ in range(settings.critic_steps):
        with torch.no_grad():
            fake = generator(_noise(settings.batch_size, draws))
        scores = critic(torch.cat((_batch(images, settings.batch_size, draws), fake)))
        real, drawn = scores.split(settings.batch_size)
        if settings.loss == "hinge":
            loss = relu(1 - real).mean() + relu(1 + drawn).mean()
        else:
            loss = drawn.mean() - real.mean()
        gap = float((real.mean() - drawn.mean()).detach())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    (-critic(generator(_noise(settings.batch_size, draws))).mean()).backward()
    # One optimiser serves both: it passes over weights without a gradient.
    critic.zero_grad(set_to_none=True)
    optimizer.step()
    return gap


def _optimizer(weights: Sequence[nn.Parameter], settings: WganTraining) -> Optimizer:
    if settings.optimizer == "rmsprop":
        return RMSprop(weights, settings.learning_rate)
    return Adam(weights, settings.learning_rate, betas=(0.0, 0.9))


def _batch(images: Tensor, count: int, draws: Generator) -> Tensor:
    """Draw real images (count, 1, S, S), half of them mirrored."""
    chosen = images[torch.randint(len(images), (count,), generator=draws)]
    mirrored = (torch.rand(count, generator=draws) < 0.5).view(-1, 1, 1, 1)
    return torch.where(mirrored, chosen.flip(-1), chosen).to(device())


def _noise(count: int, draws: Generator) -> Tensor:
    return torch.randn(count, LATENT, generator=draws).to(device())


@dataclass(frozen=True)
class WganDrawing:
    """Draws each class by its own generator.

    Attributes
    ----------
    generators : sequence of WganGenerator
        One a class, in evaluation mode.
    """

    generators: Sequence[WganGenerator]

    @torch.no_grad()
    def draw(self, batch: Sequence[Wanted]) -> Tensor:
        """Draw images (B, 1, S, S) in [0, 1]."""
        drawn = []
        for one in batch:
            z = torch.randn(1, LATENT, generator=Generator().manual_seed(one.seed_of("noise")))
            # One at a time: the bits of a batch's sums depend on what else is in it.
            drawn.append(self.generators[one.label](z))
        return torch.cat(drawn)


def train_drawing(
    images: Tensor,
    labels: Tensor,
    settings: WganTraining,
    seed: int,
    checkpoints: Sequence[Path],
    events: Events = SILENT,
) -> WganDrawing:
    """Train one GAN a class, each with its own seed and checkpoint; see `train_wgan`.

    Parameters
    ----------
    images : Tensor
        (N, 1, S, S), in [0, 1].
    labels : Tensor
        (N,) int64, numbers of `CLASSES`; of each there is one image at least.
    settings : WganTraining
        The same for all classes.
    seed : int
        Of all of them.
    checkpoints : sequence of Path
        One a class.
    events : Events
        Gets the progress.
    """
    generators = []
    for label, (name, checkpoint) in enumerate(zip(CLASSES, checkpoints, strict=True)):
        own = images[labels == label]
        of_class = derive_seed(seed, name)
        generators.append(train_wgan(own, settings, of_class, checkpoint, events, f"wgan {name}"))
    return WganDrawing(generators)
