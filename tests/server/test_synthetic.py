from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image
from speckle import scans
from torch import Tensor

from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.configuration import validate
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.manifest import SYNTHETIC_IMAGES, DataProvenance
from sonofed_common.contract.records import Records, from_bytes, to_bytes
from sonofed_common.data.sample import Sample
from sonofed_common.models.diffusion import DiffusionStack, build_tiny
from sonofed_common.runtime import SILENT, Events
from sonofed_common.synthesis.memorisation import RefusedError, dissimilarity
from sonofed_common.synthesis.synthetic import Drawing, Wanted, synthesise
from sonofed_server.source.data import Part, SourceSet, load_source
from sonofed_server.source.settings import SourceSettings, SyntheticImages
from sonofed_server.source.synthetic import EdgeDrawing
from sonofed_server.source.training import train_source

torch.set_num_threads(1)

SIZE = 16
KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
WANTED = SyntheticImages(per_class=3, steps=2)


def settings_of(**changes: Any) -> SourceSettings:
    values = {
        "name": "trial",
        "image_size": SIZE,
        "classifiers": ["shufflenet_v2"],
        "threads": 1,
        "data": {"kind": "table", "path": "set", "test_fraction": 0.25},
        "training": {"epochs": 1, "batch_size": 8},
        "diffusion": {"kind": "tiny", "epochs": 1, "batch_size": 8},
    }
    return validate(SourceSettings, values | changes, "test")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Noise with a dark disc (benign) or a dark bar (malignant)."""
    folder = tmp_path_factory.mktemp("data") / "set"
    folder.mkdir()
    draws = np.random.default_rng(0)
    rows = ["image,label,patient"]
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    for patient in range(16):
        malignant = patient % 2
        pixels = draws.integers(120, 255, (SIZE, SIZE))
        pixels[abs(x - y) < 3 if malignant else x**2 + y**2 < 16] //= 5
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{patient}.png")
        rows.append(f"{patient}.png,{'malignant' if malignant else 'benign'},p{patient}")
    (folder / "table.csv").write_text("\n".join(rows))
    return folder.parent


@pytest.fixture(scope="module")
def source(root) -> SourceSet:
    return load_source(settings_of(), root)


def drawn_from(
    drawing: Drawing, source: SourceSet, per_class: tuple[int, int], *others: Any
) -> tuple[Records, dict[str, Any]]:
    return synthesise(drawing, source.pool.labelled, source.test.labelled, per_class, *others)


@pytest.fixture(scope="module")
def stack() -> DiffusionStack:
    return build_tiny(SIZE, seed=0).eval()


class Copier(torch.nn.Module):
    """A denoiser that has memorised one image."""

    def __init__(self, stack: DiffusionStack, image: Tensor) -> None:
        super().__init__()
        self.target = stack.codec.encode(image)
        self.preconditioning = stack.preconditioning

    def forward(self, latents: Tensor, times: Tensor, **_: Any) -> tuple[Tensor]:
        skip, scale = self.preconditioning(times)
        return ((self.target - skip * latents) / scale,)


class NoControl(torch.nn.Module):
    def forward(self, *_: Any, **__: Any) -> tuple[None, None]:
        return None, None


def test_images_are_labelled_as_many_of_each_class_and_new(
    stack: DiffusionStack, source: SourceSet
):
    seen: list[dict[str, Any]] = []
    drawing = EdgeDrawing(stack, source.pool, WANTED)
    records, facts = drawn_from(drawing, source, (3, 3), 0, Events(listeners=[seen.append]))
    images, labels = records.arrays["images"], records.arrays["labels"]
    assert images.dtype == np.uint8 and images.shape == (6, SIZE, SIZE)
    assert labels.dtype == np.int64 and sorted(labels) == [0, 0, 0, 1, 1, 1]
    assert facts["per_class"] == {"benign": 3, "malignant": 3}
    released = torch.from_numpy(images)[:, None].float() / 255
    nearest = dissimilarity(released, source.pool.images).amin(1)
    assert float(nearest.min()) >= facts["limit"] - 1e-6
    median = float(nearest.double().quantile(0.5))
    assert facts["nearest_real"]["q50"] == pytest.approx(median, abs=1e-5)
    assert 0 <= facts["membership_auroc"] <= 1 and facts["rejected"] >= 0
    assert seen[-1]["done"] == seen[-1]["total"]


def test_seeds_decide_and_repeat(stack: DiffusionStack, source: SourceSet):
    drawing = EdgeDrawing(stack, source.pool, WANTED)
    first, again, other = (drawn_from(drawing, source, (3, 3), seed) for seed in (0, 0, 1))
    assert to_bytes(first[0]) == to_bytes(again[0]) and first[1] == again[1]
    assert to_bytes(first[0]) != to_bytes(other[0])


def test_the_edges_carry_the_class(source: SourceSet, monkeypatch: pytest.MonkeyPatch):
    """With the sampler replaced by its edges, each image is one of its own class, or its mirror."""

    def shown(_: DiffusionStack, images: Tensor, *__: Any) -> Tensor:
        handed.append(images)
        return torch.rand(images.shape, generator=torch.Generator().manual_seed(len(handed)))

    handed: list[Tensor] = []
    monkeypatch.setattr("sonofed_server.source.synthetic.reconstruct", shown)
    drawing = EdgeDrawing(build_tiny(SIZE, seed=0), source.pool, WANTED)
    wanted = [Wanted(0, label, n) for n in range(8) for label in (0, 1)]
    drawing.draw(wanted)
    known = source.pool.images
    mirrored = 0
    for image, label in zip(torch.cat(handed), [one.label for one in wanted], strict=True):
        straight = (known == image).flatten(1).all(1)
        flipped = (known == image.flip(-1)).flatten(1).all(1)
        assert set(source.pool.labels[straight | flipped].tolist()) == {int(label)}
        mirrored += bool(flipped.any())
    assert 0 < mirrored < 16


def test_a_model_that_memorised_is_refused(source: SourceSet):
    stack = build_tiny(SIZE, seed=0)
    stack.controlnet, stack.unet = NoControl(), Copier(stack, source.pool.images[:1])
    with pytest.raises(
        RefusedError, match=r"only 0 of 3 synthetic benign images .* other settings"
    ):
        drawn_from(EdgeDrawing(stack.eval(), source.pool, WANTED), source, (3, 3), 0)


class Blender:
    """Draws new images with a tenth of a training image in each: no copy, and yet a trace."""

    def __init__(self, training: Tensor, own: float) -> None:
        self.training, self.new, self.own = training, scans(len(training), seed=5), own

    def draw(self, batch: Sequence[Wanted]) -> Tensor:
        places = [2 * one.number + one.label for one in batch]
        return self.own * self.training[places] + (1 - self.own) * self.new[places]


def test_a_set_that_tells_who_was_trained_on_is_refused_though_no_image_is_a_copy():
    training, unseen = scans(40, seed=2), scans(40, seed=3)

    def part(images: Tensor) -> Part:
        samples = [
            Sample(f"{n}", Path(f"{n}.png"), (), n % 2, f"patient {n}") for n in range(len(images))
        ]
        return Part(samples, images, torch.arange(len(images)) % 2)

    provenance = DataProvenance(name="scans", digest="0" * 64, images=80, groups=80)
    source = SourceSet(part(training), part(unseen), provenance)
    with pytest.raises(ConfigurationError, match=r"membership AUROC 0\.7\d, where 0\.6"):
        drawn_from(Blender(training, 0.15), source, (20, 20), 0, SILENT, 0.0)
    _, facts = drawn_from(Blender(training, 0.0), source, (20, 20), 0, SILENT, 0.0)
    assert facts["membership_auroc"] == pytest.approx(0.5, abs=0.15)


def test_drawing_goes_on_after_an_interruption_without_training_again(root, tmp_path):
    def interrupt(event: dict[str, Any]) -> None:
        if event.get("task") == "synthetic images":
            raise KeyboardInterrupt

    out, whole = tmp_path / "cut", tmp_path / "whole"
    more, fewer = (settings_of(synthetic={"per_class": n, "steps": 2}) for n in (9, 2))
    with pytest.raises(KeyboardInterrupt):
        train_source(more, root, out, KEY, Events(listeners=[interrupt]))
    assert not (out / "manifest.json").exists()
    seen: list[dict[str, Any]] = []
    train_source(fewer, root, out, KEY, Events(listeners=[seen.append]))
    assert not any(event.get("task") in ("diffusion", "train shufflenet_v2") for event in seen)
    train_source(fewer, root, whole, KEY)
    bundle, expected = Bundle.open(out), Bundle.open(whole)
    assert bundle.read(SYNTHETIC_IMAGES) == expected.read(SYNTHETIC_IMAGES)
    assert bundle.manifest.facts == expected.manifest.facts
    assert bundle.manifest.facts["synthetic"]["per_class"] == {"benign": 2, "malignant": 2}
    assert from_bytes(bundle.read(SYNTHETIC_IMAGES)).arrays["images"].shape == (4, SIZE, SIZE)


def test_a_gan_draws_through_the_same_gate_and_goes_on_after_an_interruption(root, tmp_path):
    def interrupt(event: dict[str, Any]) -> None:
        if event.get("task") == "wgan malignant":
            raise KeyboardInterrupt

    settings = settings_of(
        diffusion={"kind": "none"},
        synthetic={"generator": "wgan", "per_class": 1},
        wgan={"steps": 100, "batch_size": 8, "width": 16, "learning_rate": 2e-3, "critic_steps": 1},
    )
    out, whole = tmp_path / "cut", tmp_path / "whole"
    with pytest.raises(KeyboardInterrupt):
        train_source(settings, root, out, KEY, Events(listeners=[interrupt]))
    seen: list[dict[str, Any]] = []
    train_source(settings, root, out, KEY, Events(listeners=[seen.append]))
    assert not any(event.get("task") in ("wgan benign", "train shufflenet_v2") for event in seen)
    train_source(settings, root, whole, KEY)
    bundle, expected = Bundle.open(out), Bundle.open(whole)
    assert bundle.read(SYNTHETIC_IMAGES) == expected.read(SYNTHETIC_IMAGES)
    facts = bundle.manifest.facts["synthetic"]
    assert facts == expected.manifest.facts["synthetic"] and facts["generator"] == "wgan"
    assert facts["per_class"] == {"benign": 1, "malignant": 1} and facts["limit"] > 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"diffusion": {"kind": "none"}}, "needs a diffusion model"),
        ({"classifiers": [], "segmentation": {"encoder": "unet"}}, "needs class labels"),
        ({"synthetic": {"generator": "wgan", "per_class": 1}, "image_size": 24}, "16, 32, 64"),
        ({"synthetic": {"per_class": 0}}, "per_class"),
        ({"synthetic": {}}, "per_class"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes: dict[str, Any], sentence: str):
    with pytest.raises(ConfigurationError, match=sentence):
        settings_of(**{"synthetic": {"per_class": 1}} | changes)
