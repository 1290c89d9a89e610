"""The one training loop: Adam or SGD, cosine, mixed precision, progress and exact resume."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sonofed_common.contract.errors import ConfigurationError, DivergenceError, SiteEmptyError
from sonofed_common.runtime import SILENT, Events, derive_seed, write_atomically


@dataclass(frozen=True)
class Training:
    """Settings of a training run.

    Attributes
    ----------
    epochs : int
        Passes over the data in this run.
    learning_rate : float
        Step size at the start of the cosine.
    batch_size : int
        Items a step.
    seed : int
        Seed of the order of items and of dropout.
    weight_decay : float
        L2 penalty.
    optimizer : str
        ``adam``, or ``sgd`` for plain steps along the gradient.
    first_epoch : int
        Number of the first epoch, for a run that continues earlier rounds.
    last_epoch : int or None
        Epoch at which the cosine reaches 0; None is the end of this run.
    """

    epochs: int
    learning_rate: float
    batch_size: int
    seed: int
    weight_decay: float = 0.0
    optimizer: Literal["adam", "sgd"] = "adam"
    first_epoch: int = 0
    last_epoch: int | None = None

    @property
    def total_epochs(self) -> int:
        """Length of the cosine in epochs."""
        return self.first_epoch + self.epochs if self.last_epoch is None else self.last_epoch

    def rate(self, epoch: float) -> float:
        """Learning rate at a (fractional) epoch."""
        share = min(epoch / max(self.total_epochs, 1), 1.0)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * share))

    def total_rate(self, count: int) -> float:
        """Sum of the learning rates of all steps of this run on ``count`` items."""
        steps = len(batches(count, self.batch_size, 0))
        epochs = range(self.first_epoch, self.first_epoch + self.epochs)
        return math.fsum(self.rate(e + step / steps) for e in epochs for step in range(steps))


def batches(count: int, batch_size: int, seed: int) -> list[Tensor]:
    """Shuffle ``range(count)`` into batches of indices.

    A last batch of one item joins the batch before it: batch normalisation needs two items.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    parts = list(torch.split(order, batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def fit(
    model: nn.Module,
    count: int,
    loss_of_batch: Callable[[Tensor], Tensor],
    training: Training,
    checkpoint: Path | None = None,
    events: Events = SILENT,
    task: str = "training",
    *,
    parameters: nn.Module | None = None,
    before_epoch: Callable[[int], None] | None = None,
    before_step: Callable[[], None] | None = None,
    after_step: Callable[[int, int], None] | None = None,
    saves_last: bool = True,
) -> list[float]:
    """Train a model in place.

    Parameters
    ----------
    model : Module
        Everything that a checkpoint must hold.
    count : int
        Number of items.
    loss_of_batch : callable
        Maps indices (B,) into the items to a scalar loss. On ``cuda`` it runs in bf16 autocast.
    training : Training
        Settings.
    checkpoint : Path or None
        File written after every epoch; where it exists, training goes on from it and ends with the
        weights of an uninterrupted run, on CPU bit for bit.
    events : Events
        Gets about ten progress events an epoch.
    task : str
        Name of the work in events and errors.
    parameters : Module or None
        The part of ``model`` that is trained; None trains all of it.
    before_epoch : callable or None
        Called with the number of each epoch, for example to renew an augmentation: what it draws
        must depend on that number only, or a resumed run would differ.
    before_step : callable or None
        Called between the gradient and the step, for example to correct the gradient.
    after_step : callable or None
        Called after each step with the number of steps done and the total, counted over the cosine.
    saves_last : bool
        Whether the last epoch is saved too. A short round, whose caller keeps the weights and drops
        the file at once, saves the write and risks that epoch.

    Returns
    -------
    list of float
        Mean loss of each epoch, those before a resume included.

    Raises
    ------
    SiteEmptyError
        There is no item.
    DivergenceError
        A loss or a weight is not finite.
    ConfigurationError
        The checkpoint is unreadable or belongs to a run with another network or other settings.
    """
    if count == 0:
        raise SiteEmptyError(f"{task} has no image to train on; add labelled images")
    trained = model if parameters is None else parameters
    weights = [p for p in trained.parameters() if p.requires_grad]
    kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    optimizer = kinds[training.optimizer](
        weights, lr=training.learning_rate, weight_decay=training.weight_decay
    )
    fingerprint = run_fingerprint(model, {"count": count, "task": task, **asdict(training)})
    losses: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        losses = restore_checkpoint(checkpoint, model, weights, optimizer, fingerprint, task)

    on_cuda = weights[0].device.type == "cuda"
    steps = len(batches(count, training.batch_size, 0))
    end = training.first_epoch + training.epochs

    def run_epoch(epoch: int) -> float:
        seed = derive_seed(training.seed, epoch)
        torch.manual_seed(seed)
        if before_epoch is not None:
            before_epoch(epoch)
        loss_sum = 0.0
        for step, indices in enumerate(batches(count, training.batch_size, seed)):
            for group in optimizer.param_groups:
                group["lr"] = training.rate(epoch + step / steps)
            with torch.autocast("cuda", torch.bfloat16, enabled=on_cuda):
                loss = loss_of_batch(indices)
            value = loss.item()
            if not math.isfinite(value):
                raise _diverged(task, epoch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if before_step is not None:
                before_step()
            optimizer.step()
            loss_sum += value * len(indices)
            done = epoch * steps + step + 1
            if after_step is not None:
                after_step(done, training.total_epochs * steps)
            if (step + 1) % max(steps // 10, 1) == 0 or step + 1 == steps:
                past = done - training.first_epoch * steps
                events.progress(task, past, training.epochs * steps, epoch=epoch + 1)
        if not all(bool(torch.isfinite(p).all()) for p in weights):
            raise _diverged(task, epoch)
        return loss_sum / count

    was_training = trained.training
    trained.train()
    try:
        for epoch in range(training.first_epoch + len(losses), end):
            # Each epoch seeds the generators anew, so a checkpoint needs none of their states.
            with torch.random.fork_rng():
                losses.append(run_epoch(epoch))
            if checkpoint is not None and (saves_last or epoch + 1 < end):
                save_checkpoint(checkpoint, model, weights, optimizer, fingerprint, losses)
    finally:
        trained.train(was_training)
    return losses


def _diverged(task: str, epoch: int) -> DivergenceError:
    return DivergenceError(
        f"{task} diverged in epoch {epoch + 1}: the loss or a weight is not finite; "
        "lower the learning rate or check the start weights"
    )


def run_fingerprint(model: nn.Module, run: Mapping[str, Any]) -> str:
    """Digest a network's shapes and a run's settings (JSON values), to know its checkpoint by."""
    shapes = [list(tensor.shape) for tensor in model.state_dict().values()]
    text = json.dumps({**run, "shapes": shapes}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def save_checkpoint(
    path: Path,
    model: nn.Module,
    weights: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    fingerprint: str,
    losses: list[float],
) -> None:
    """Write a training's state: ``weights`` are the optimiser's, ``losses`` those so far."""
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for index, weight in enumerate(weights):
        # A weight that got no gradient (an unused head) has no optimiser state.
        for name, tensor in optimizer.state.get(weight, {}).items():
            tensors[f"optimizer/{index}/{name}"] = tensor
    # safetensors takes neither channels-last tensors nor shared storage.
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    write_atomically(path, save(plain, {"run": fingerprint, "losses": json.dumps(losses)}))


def restore_checkpoint(
    path: Path,
    model: nn.Module,
    weights: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    fingerprint: str,
    task: str,
) -> list[float]:
    """Load what `save_checkpoint` wrote into model and optimiser, and return the losses so far.

    Raises
    ------
    ConfigurationError
        The file is unreadable, or of a run with another network or other settings.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):
        raise ConfigurationError(
            f"the checkpoint of {task} cannot be read; delete it to start again"
        ) from None
    if metadata.get("run") != fingerprint:
        raise ConfigurationError(
            f"the checkpoint of {task} belongs to a run with another network or other settings; "
            "delete it, or go on with the settings it was made with"
        )
    prefix = "model/"
    model.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/")
            weight = weights[int(index)]
            if tensor.shape == weight.shape and key != "step":
                # The memory format of the weight decides in which order sums are formed.
                tensor = torch.empty_like(weight).copy_(tensor)
            optimizer.state[weight][key] = tensor
    losses: list[float] = json.loads(metadata["losses"])
    return losses
