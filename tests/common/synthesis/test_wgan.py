from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sonofed_common.contract.configuration import validate
from sonofed_common.contract.errors import ConfigurationError, DivergenceError, SiteEmptyError
from sonofed_common.contract.study_synthesis import WganTraining
from sonofed_common.models.wgan import SIZES, WganCritic, WganGenerator
from sonofed_common.runtime import Events
from sonofed_common.synthesis import wgan
from sonofed_common.synthesis.synthetic import Wanted
from sonofed_common.synthesis.wgan import WganDrawing, train_wgan
from sonofed_server.source.settings import SourceSettings

torch.set_num_threads(1)

SHORT = WganTraining(steps=6, batch_size=4, width=16)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Dark images with a bright left or right half."""
    draws = torch.Generator().manual_seed(0)
    images = torch.rand(12, 1, 16, 16, generator=draws) * 0.2
    images[::2, :, :, :8] += 0.7
    images[1::2, :, :, 8:] += 0.7
    return images


@pytest.mark.parametrize("size", SIZES)
def test_images_are_of_the_size_and_every_layer_of_the_critic_has_norm_one(size: int) -> None:
    generator, critic = WganGenerator(size, 32), WganCritic(size, 32)
    drawn = generator(torch.randn(3, 128)).detach()
    assert drawn.shape == (3, 1, size, size) and 0 <= float(drawn.min()) <= float(drawn.max()) <= 1
    for _ in range(40):
        # Each pass in training brings the estimate nearer to the largest singular value.
        scores = critic(drawn)
    assert scores.shape == (3,)
    layers = [module for module in critic.modules() if isinstance(module, nn.Conv2d)]
    assert len(layers) == len(critic.shrink) + 1
    for layer in layers:
        norms = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        assert float(norms.detach()) == pytest.approx(1, abs=0.05)


def test_a_critic_is_as_steep_as_its_layers_at_most() -> None:
    critic = WganCritic(16, 32)
    draws = torch.Generator().manual_seed(0)
    one, other = torch.rand(2, 64, 1, 16, 16, generator=draws)
    for _ in range(40):
        critic(one)
    critic.eval()
    steps = (critic(one) - critic(other)).abs() / (one - other).flatten(1).norm(dim=1)
    # Images are doubled; a 4 x 4 kernel of stride 2 sees each pixel four times.
    assert float(steps.detach().max()) <= 2 * 2.0 ** len(critic.shrink)


def test_a_size_that_cannot_be_doubled_to_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="48 px; set image_size to one of 8, 16"):
        WganGenerator(48)


def test_a_generator_learns_what_its_images_look_like(images: torch.Tensor) -> None:
    settings = WganTraining(steps=200, batch_size=16, width=16, learning_rate=2e-3, critic_steps=1)
    drawing = WganDrawing([train_wgan(images[:, :, 4:12, 4:12], settings, seed=0)])
    drawn = drawing.draw([Wanted(0, 0, n) for n in range(32)])
    halves = torch.stack((drawn[..., :4].mean((1, 2, 3)), drawn[..., 4:].mean((1, 2, 3))))
    # One half is bright, the other dark, and which one differs between images.
    assert float((halves.amax(0) - halves.amin(0)).mean()) > 0.3
    assert 4 < int((halves[0] > halves[1]).sum()) < 28


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": "wasserstein", "optimizer": "rmsprop", "learning_rate": 5e-5, "critic_steps": 5},
    ],
)
def test_an_interrupted_training_ends_with_the_same_bits(
    images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(wgan, "SAVE_EVERY", 2)

    def stop(event: dict[str, Any]) -> None:
        if event["done"] == 4:
            raise KeyboardInterrupt

    settings = SHORT.model_copy(update=changes)
    whole = train_wgan(images, settings, 3)
    path = tmp_path / "wgan.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_wgan(images, settings, 3, path, Events(listeners=[stop]))
    # Stopped before the fourth step was saved: it goes on from the second.
    seen: list[dict[str, Any]] = []
    again = train_wgan(images, settings, 3, path, Events(listeners=[seen.append]))
    assert [event["done"] for event in seen] == [4, 6]
    expected = whole.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in again.state_dict().items())
    other = train_wgan(images, settings, 4).state_dict()
    assert not torch.equal(other["draw.weight"], expected["draw.weight"])
    with pytest.raises(ConfigurationError, match="other settings"):
        train_wgan(images, settings, 4, path)


def test_an_image_does_not_depend_on_what_is_drawn_beside_it() -> None:
    torch.manual_seed(0)
    drawing = WganDrawing([WganGenerator(16, 16).eval(), WganGenerator(16, 16).eval()])
    wanted = [Wanted(0, label, n) for n in range(3) for label in (0, 1)]
    together = drawing.draw(wanted)
    for one, image in zip(wanted, together, strict=True):
        assert torch.equal(drawing.draw([one])[0], image)
    assert len({image.sum().item() for image in together}) == 6


def test_no_image_and_a_training_that_diverges_are_named(images: torch.Tensor) -> None:
    with pytest.raises(SiteEmptyError, match="wgan benign"):
        train_wgan(images[:0], SHORT, 0, task="wgan benign")
    with pytest.raises(DivergenceError, match="diverged in step"):
        train_wgan(images * float("nan"), SHORT, 0)


def test_the_papers_preset_is_the_papers() -> None:
    data = {"kind": "busi"}
    paper = validate(SourceSettings, {"name": "a", "preset": "paper", "data": data,
                                      "diffusion": {"kind": "none"}}, "test").wgan  # fmt: skip
    assert (paper.loss, paper.optimizer, paper.learning_rate, paper.critic_steps) == (
        "wasserstein", "rmsprop", 5e-5, 5)  # fmt: skip
    assert isinstance(wgan._optimizer([nn.Parameter(torch.ones(1))], paper), torch.optim.RMSprop)
