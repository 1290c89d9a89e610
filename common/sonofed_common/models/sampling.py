"""Images redrawn from their edges by a diffusion stack: ADAptation, Stage II (arXiv 2507.00474)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sonofed_common.contract.errors import ConfigurationError, DivergenceError
from sonofed_common.contract.study import Reconstruction
from sonofed_common.models.stack import DiffusionStack

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Names of diffusers' classes."""


@torch.no_grad()
def reconstruct(
    stack: DiffusionStack, images: Tensor, settings: Reconstruction, seeds: Sequence[int]
) -> Tensor:
    """Redraw images from their edges, starting from noise or from themselves.

    Parameters
    ----------
    stack : DiffusionStack
        Trained on the source; frozen here.
    images : Tensor
        (B, 1, S, S), in [0, 1].
    settings : Reconstruction
        ``init``: ``noise`` keeps only the edges (the paper); ``sdedit`` starts from the image
        noised to ``strength`` of the schedule (Meng et al. 2022); ``ddim_inversion`` starts from
        the noise at ``strength`` that deterministic DDIM maps to the image. ``steps`` divide the
        whole schedule: the latter two run only a ``strength`` share of them, as diffusers'
        image-to-image pipelines do.
    seeds : sequence of int
        One an image: its result does not depend on the rest of the batch, up to float rounding.

    Returns
    -------
    Tensor
        (B, 1, S, S) float32 in [0, 1], on CPU.

    Raises
    ------
    ConfigurationError
        The image size is no multiple of the codec's factor, or seeds and images differ in number.
    DivergenceError
        The networks gave values that are not finite.
    """
    if images.shape[-1] % stack.codec.factor or len(seeds) != len(images):
        raise ConfigurationError(
            f"reconstruction needs one seed an image and sides divisible by {stack.codec.factor}"
        )
    stack.eval()
    size = settings.batch_size
    done = [
        _reconstruct_batch(stack, images[i : i + size], settings, seeds[i : i + size])
        for i in range(0, len(images), size)
    ]
    result = torch.cat(done) if done else images.clone()
    if not result.isfinite().all():
        raise DivergenceError(
            "reconstruction gave values that are not finite; train the diffusion stack again"
        )
    return result


def _reconstruct_batch(
    stack: DiffusionStack, images: Tensor, settings: Reconstruction, seeds: Sequence[int]
) -> Tensor:
    import diffusers

    edges = stack.edges(images).to(stack.device)
    # Trailing steps start at the schedule's very end (Lin et al. 2024): pure noise meets the time
    # it was trained with, and a share of the steps is that share of the schedule.
    sampler = getattr(diffusers, SAMPLERS[settings.sampler]).from_config(
        stack.scheduler.config, timestep_spacing="trailing", clip_sample=False, thresholding=False
    )
    sampler.set_timesteps(settings.steps, device=stack.device)
    run = settings.steps
    if settings.init != "noise":
        run = max(1, round(settings.steps * settings.strength))
    times = sampler.timesteps[-run:]
    with torch.autocast(stack.device.type, torch.bfloat16, enabled=stack.device.type == "cuda"):
        latents = _start(stack, images.to(stack.device), edges, times, settings, seeds)
        if hasattr(sampler, "set_begin_index"):
            sampler.set_begin_index(len(sampler.timesteps) - run)
        for time in times:
            prediction = _predict(stack, latents, time, edges, settings.guidance)
            latents = sampler.step(prediction, time, latents, return_dict=False)[0]
        return stack.codec.decode(latents).float().cpu()


def _start(
    stack: DiffusionStack,
    images: Tensor,
    edges: Tensor,
    times: Tensor,
    settings: Reconstruction,
    seeds: Sequence[int],
) -> Tensor:
    clean = stack.codec.encode(images).float()
    if settings.init == "ddim_inversion":
        return _invert(stack, clean, edges, times.flip(0))
    noise = torch.stack(
        [torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds]
    ).to(clean.device)
    if settings.init == "noise":
        return noise
    noisy: Tensor = stack.scheduler.add_noise(clean, noise, times[:1].expand(len(clean)))
    return noisy


def _invert(stack: DiffusionStack, latents: Tensor, edges: Tensor, times: Tensor) -> Tensor:
    """DDIM run backwards, without guidance (Song et al. 2021, section 4.3).

    Not diffusers' DDIMInverseScheduler: it asks the network at the end time of each step, harmless
    only when epsilon is predicted, and divides by zero when clean latents are. Here clean latents
    count as those of time 0, whose noise is invisible but not zero.
    """
    retained = stack.scheduler.alphas_cumprod.to(latents.device)
    before, signal = times.new_tensor(0), retained[0]
    for time in times:
        output = _predict(stack, latents, before, edges, guidance=1.0)
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
        if stack.predicts_sample:
            image, noise = output, (latents - alpha * output) / sigma
        else:
            image, noise = (latents - sigma * output) / alpha, output
        before, signal = time, retained[time]
        latents = signal.sqrt() * image + (1 - signal).sqrt() * noise
    return latents


def _predict(
    stack: DiffusionStack, latents: Tensor, time: Tensor, edges: Tensor, guidance: float
) -> Tensor:
    count = len(latents)
    prompt = stack.prompt.expand(count, -1, -1)
    if guidance == 1:
        return stack(latents, time.expand(count), prompt, edges).float()  # type: ignore[no-any-return]
    # As in diffusers' ControlNet pipelines, the prompt is guided and both halves see the edges.
    tokens = torch.cat((stack.null.expand(count, -1, -1), prompt))
    twice = torch.cat((latents, latents)), time.expand(2 * count), tokens, torch.cat((edges, edges))
    without, given = stack(*twice).float().chunk(2)
    return without + guidance * (given - without)  # type: ignore[no-any-return]
