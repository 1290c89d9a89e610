from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from sonofed_client.adaptation.reconstruction import quality, reconstruct
from sonofed_common.contract.errors import ConfigurationError, DivergenceError
from sonofed_common.contract.study import Reconstruction
from sonofed_common.models.diffusion import DiffusionStack, build_tiny

SIZE = 32


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stack() -> DiffusionStack:
    return build_tiny(SIZE, seed=0).eval()


@pytest.fixture
def images() -> Tensor:
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    discs = [((y - 16) ** 2 + (x - 10 - i) ** 2 < 49).float() for i in range(5)]
    return 0.8 - 0.6 * torch.stack(discs).unsqueeze(1)


class Ideal(torch.nn.Module):
    """The perfect denoiser of a data set that is one image."""

    def __init__(self, stack: DiffusionStack, target: Tensor) -> None:
        super().__init__()
        self.target = stack.codec.encode(target)
        self.preconditioning = stack.preconditioning

    def forward(self, latents: Tensor, times: Tensor, **_: Any) -> tuple[Tensor]:
        skip, scale = self.preconditioning(times)
        return ((self.target - skip * latents) / scale,)


class Linear(torch.nn.Module):
    """The perfect denoiser of white Gaussian data of a known standard deviation."""

    def __init__(self, stack: DiffusionStack, deviation: float) -> None:
        super().__init__()
        self.variance = deviation**2
        self.kept = stack.scheduler.alphas_cumprod
        self.preconditioning = stack.preconditioning

    def forward(self, latents: Tensor, times: Tensor, **_: Any) -> tuple[Tensor]:
        skip, scale = self.preconditioning(times)
        kept = self.kept[times].view(-1, 1, 1, 1)
        image = kept.sqrt() * self.variance / (kept * self.variance + 1 - kept) * latents
        return ((image - skip * latents) / scale,)


class NoControl(torch.nn.Module):
    def forward(self, *_: Any, **__: Any) -> tuple[None, None]:
        return None, None


def with_network(network: type[torch.nn.Module], argument: Any) -> DiffusionStack:
    stack = build_tiny(SIZE, seed=0)
    stack.controlnet = NoControl()
    stack.unet = network(stack, argument)
    return stack.eval()


@pytest.mark.parametrize("init", ["noise", "sdedit", "ddim_inversion"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++", "unipc"])
def test_every_start_and_sampler_gives_images(
    stack: DiffusionStack, images: Tensor, init: Any, sampler: Any
):
    settings = Reconstruction(init=init, sampler=sampler, steps=3, batch_size=2)
    result = reconstruct(stack, images[:3], settings, [0, 1, 2])
    assert result.shape == (3, 1, SIZE, SIZE)
    assert result.dtype == torch.float32
    assert result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize("init", ["noise", "sdedit"])
@pytest.mark.parametrize("sampler", ["ddim", "dpmsolver++", "unipc"])
def test_a_perfect_denoiser_draws_its_data(images: Tensor, init: Any, sampler: Any):
    settings = Reconstruction(init=init, sampler=sampler, steps=8)
    result = reconstruct(with_network(Ideal, images[:1]), images[1:3], settings, [0, 1])
    assert torch.allclose(result, images[:1].expand(2, -1, -1, -1), atol=2e-3)


@hypothesis_settings(max_examples=5, deadline=None)
@given(deviation=st.floats(0.3, 1.5), seed=st.integers(0, 100))
def test_inversion_and_ddim_return_the_image(deviation: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    images = (0.5 + 0.15 * torch.randn(2, 1, SIZE, SIZE, generator=generator)).clamp(0, 1)
    settings = Reconstruction(init="ddim_inversion", sampler="ddim", steps=200, strength=0.8)
    result = reconstruct(with_network(Linear, deviation), images, settings, [0, 0])
    assert torch.allclose(result, images, atol=0.02)


def test_inversion_agrees_with_diffusers_where_that_one_is_right(images: Tensor):
    from diffusers import DDIMInverseScheduler

    from sonofed_common.models.sampling import _invert

    class Constant(torch.nn.Module):
        """Noise that depends neither on time nor on latents: both conventions coincide."""

        def __init__(self, _: DiffusionStack, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, latents: Tensor, times: Tensor, **__: Any) -> tuple[Tensor]:
            return (torch.full_like(latents, self.value),)

    stack = with_network(Constant, 0.3)
    stack.scheduler.register_to_config(prediction_type="epsilon")
    scheduler = DDIMInverseScheduler.from_config(
        stack.scheduler.config, clip_sample=False, set_alpha_to_one=False
    )
    scheduler.set_timesteps(10)
    latents = expected = stack.codec.encode(images)
    for time in scheduler.timesteps[:6]:
        noise = torch.full_like(expected, 0.3)
        expected = scheduler.step(noise, time, expected, return_dict=False)[0]
    result = _invert(stack, latents, stack.edges(images), scheduler.timesteps[:6])
    assert torch.allclose(result, expected, atol=1e-5)


def test_an_image_does_not_depend_on_its_batch(stack: DiffusionStack, images: Tensor):
    seeds = [7, 11, 13, 17, 19]
    together = reconstruct(stack, images, Reconstruction(steps=4), seeds)
    apart = reconstruct(stack, images, Reconstruction(steps=4, batch_size=2), seeds)
    alone = reconstruct(stack, images[3:4], Reconstruction(steps=4), seeds[3:4])
    assert torch.allclose(together, apart, atol=1e-4)
    assert torch.allclose(together[3:4], alone, atol=1e-4)


def test_seeds_decide_and_repeat(stack: DiffusionStack, images: Tensor):
    same = images[:1].expand(2, -1, -1, -1)
    settings = Reconstruction(steps=4)
    first = reconstruct(stack, same, settings, [1, 2])
    assert torch.equal(first, reconstruct(stack, same, settings, [1, 2]))
    assert not torch.allclose(first[0], first[1], atol=0.01)


def test_strength_decides_how_much_is_kept(stack: DiffusionStack, images: Tensor):
    def error(strength: float) -> float:
        settings = Reconstruction(steps=20, strength=strength)
        return float((reconstruct(stack, images, settings, range(5)) - images).abs().mean())

    assert error(0.05) < error(0.5) < error(1.0)


def test_edges_steer_the_result(stack: DiffusionStack, images: Tensor):
    settings = Reconstruction(init="noise", steps=3)
    flat = torch.full_like(images[:1], 0.5)
    of_flat = reconstruct(stack, flat, settings, [0])
    of_image = reconstruct(stack, images[:1], settings, [0])
    assert not torch.allclose(of_flat, of_image, atol=1e-3)


def test_guidance_extrapolates_from_null_to_prompt(images: Tensor):
    """One DDIM step is linear in the prediction, so guidance must be linear in its weight."""
    stack = build_tiny(SIZE, seed=4).eval()
    settings = {"init": "noise", "sampler": "ddim", "steps": 1}
    at = {
        weight: reconstruct(stack, images[:1], Reconstruction(**settings, guidance=weight), [3])
        for weight in (0.0, 1.0, 2.0)
    }
    inside = ((at[0.0] > 0) & (at[0.0] < 1) & (at[2.0] > 0) & (at[2.0] < 1)).squeeze()
    assert inside.float().mean() > 0.5
    assert not torch.allclose(at[0.0], at[1.0], atol=1e-5)
    middle = (at[0.0] + at[2.0]) / 2
    assert torch.allclose(at[1.0].squeeze()[inside], middle.squeeze()[inside], atol=1e-4)


def test_seeds_and_sizes_are_checked(stack: DiffusionStack, images: Tensor):
    with pytest.raises(ConfigurationError, match="one seed an image"):
        reconstruct(stack, images, Reconstruction(), [0])
    with pytest.raises(ConfigurationError, match="divisible by 4"):
        reconstruct(stack, torch.zeros(1, 1, 30, 30), Reconstruction(), [0])
    assert reconstruct(stack, images[:0], Reconstruction(), []).shape == images[:0].shape


def test_broken_weights_are_named(images: Tensor):
    stack = build_tiny(SIZE, seed=0)
    with torch.no_grad():
        stack.unet.conv_out.bias.fill_(math.nan)
    with pytest.raises(DivergenceError, match="not finite"):
        reconstruct(stack, images[:1], Reconstruction(steps=1), [0])


def test_quality_of_a_perfect_and_of_a_noisy_copy(images: Tensor):
    perfect = quality(images, images, images.flatten(1), images.flatten(1))
    assert perfect["ssim"] == pytest.approx(1)
    assert perfect["feature_distance"] == pytest.approx(0, abs=1e-6)
    shifted = quality(images, images + 0.1)
    assert shifted["psnr"] == pytest.approx(20, abs=1e-3)  # 10 log10(1 / 0.1^2)
    assert set(shifted) == {"ssim", "psnr"}


def test_feature_distance_is_one_minus_cosine(images: Tensor):
    one, other = torch.eye(2), torch.tensor([[1.0, 1.0], [0.0, -3.0]])
    result = quality(images[:2], images[:2], one, other)["feature_distance"]
    assert result == pytest.approx(((1 - math.sqrt(0.5)) + 2) / 2)
