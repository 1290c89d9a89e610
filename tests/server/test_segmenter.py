"""Source training of a segmenter: from images with masks to the signed bundle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image
from safetensors.torch import load

from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.configuration import validate
from sonofed_common.contract.errors import ConfigurationError, DataMissingError, OneClassError
from sonofed_common.contract.segmentation import SegmentationFacts
from sonofed_common.contract.study_segmentation import Infusion
from sonofed_common.data import augmentation
from sonofed_common.models.infusion import InfusionHead
from sonofed_common.models.segmenter import build_segmenter
from sonofed_common.runtime import SILENT, Events
from sonofed_server.source.gate import train_gate
from sonofed_server.source.segmentation_data import SegmentationPart, load_segmentation
from sonofed_server.source.segmenter import (
    segmentation_facts,
    source_temperature,
    train_segmenter,
)
from sonofed_server.source.settings import SourceSettings
from sonofed_server.source.training import train_source
from sonofed_server.study.source import read_study_source, write_source
from sonofed_server.study.workspace import Workspace

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIZE = 32


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_set(folder, patients=16, label="", value=255):
    """Noise with a dark disc, two images a patient, a mask each; no class label."""
    folder.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(0)
    rows = ["image,mask,label,patient"]
    y, x = np.mgrid[:SIZE, :SIZE]
    for number in range(2 * patients):
        pixels = draws.integers(120, 255, (SIZE, SIZE))
        centre, radius = draws.integers(9, SIZE - 9, 2), draws.integers(5, 9)
        disc = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
        pixels[disc] //= 5
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        mask = Image.fromarray((disc * value).astype(np.uint8))
        if value < 255:
            mask.putpalette(bytes(range(256)) * 3)
        mask.save(folder / f"{number}_mask.png")
        rows.append(f"{number}.png,{number}_mask.png,{label},p{number // 2}")
    (folder / "table.csv").write_text("\n".join(rows))
    return folder


def settings_of(segmentation=(), **changes):
    """Small settings; ``segmentation`` changes options of that section, None leaves it out."""
    section = {"encoder": "unet", "epochs": 10, "batch_size": 4, "learning_rate": 3e-3}
    values = {
        "name": "trial",
        "seed": 3,
        "image_size": SIZE,
        "classifiers": [],
        "threads": 1,
        "data": {"kind": "table", "path": "set", "test_fraction": 0.25},
        "segmentation": None if segmentation is None else section | dict(segmentation),
        "diffusion": {"kind": "none"},
    }
    return validate(SourceSettings, values | changes, "test")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_set(folder / "set")
    return folder


@pytest.fixture(scope="module")
def bundle(root, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "bundle"
    return Bundle.open(train_source(settings_of(), root, out, KEY))


def loaded(bundle):
    facts = SegmentationFacts.model_validate(bundle.manifest.facts["segmentation"])
    model = build_segmenter(facts.encoder, facts.classes, SIZE, facts.heads, pretrained=False)
    model.load_state_dict(load(bundle.read("segmenters/source.safetensors")))
    return model.eval()


def test_one_of_classifiers_and_segmentation_is_needed():
    with pytest.raises(ConfigurationError, match=r"'classifiers'.*'segmentation'"):
        settings_of(None)
    with pytest.raises(ConfigurationError, match="choose from resnet18"):
        settings_of({"encoder": "resnet"})


def test_images_need_masks_and_no_labels(root):
    data = load_segmentation(settings_of(), root)
    groups = [{s.group for s in part.samples} for part in (data.pool, data.test)]
    assert not groups[0] & groups[1] and len(groups[0] | groups[1]) == 16
    for part in (data.pool, data.test):
        assert part.images.shape == part.masks.shape == (len(part.samples), 1, SIZE, SIZE)
        assert part.masks.dtype == torch.uint8 and set(part.masks.unique().tolist()) == {0, 1}
        inside = part.masks.bool()
        assert part.images[inside].mean() < 0.3 < part.images[~inside].mean()
    assert data.provenance.images == 32 and data.provenance.groups == 16


def test_the_data_digest_sees_masks(root, tmp_path):
    before = load_segmentation(settings_of(), root).provenance.digest
    write_set(tmp_path / "set")
    assert load_segmentation(settings_of(), tmp_path).provenance.digest == before
    mask = tmp_path / "set" / "3_mask.png"
    Image.fromarray(np.flipud(np.array(Image.open(mask)))).save(mask)
    assert load_segmentation(settings_of(), tmp_path).provenance.digest != before


def test_masks_that_do_not_fit_are_refused_with_advice(root, tmp_path):
    write_set(tmp_path / "set", 4, value=2)
    with pytest.raises(ConfigurationError, match=r"segmentation\.classes to 3"):
        load_segmentation(settings_of(), tmp_path)
    assert load_segmentation(settings_of({"classes": 3}), tmp_path).pool.masks.max() == 2
    write_set(tmp_path / "set", 4, value=0)
    with pytest.raises(OneClassError, match="all background"):
        load_segmentation(settings_of(), tmp_path)
    for mask in (tmp_path / "set").glob("*_mask.png"):
        mask.unlink()
    with pytest.raises(DataMissingError, match="with a mask"):
        load_segmentation(settings_of(), tmp_path)
    pool = load_segmentation(settings_of(image_size=40), root).pool
    with pytest.raises(ConfigurationError, match="multiple of 16"):
        train_segmenter(pool, settings_of().segmentation, 0)


def test_normal_images_are_left_out(root, tmp_path):
    table = write_set(tmp_path / "set") / "table.csv"
    header, *rows = table.read_text().splitlines()
    normal = [row.replace(",,", ",normal,") for row in rows[:4]]
    table.write_text("\n".join([header, *normal, *rows[4:]]))
    data = load_segmentation(settings_of(), tmp_path)
    assert data.provenance.images == 28 and data.provenance.groups == 14


def test_the_bundle_holds_a_segmenter_better_than_chance(bundle, root):
    assert bundle.paths == ["segmenters/source.safetensors"]
    facts = bundle.manifest.facts["segmenters"]["source"]
    data = load_segmentation(settings_of(), root)
    model = loaded(bundle)
    with torch.inference_mode():
        p = model.probabilities(data.test.images)
    predicted, truth = p.argmax(1) == 1, data.test.masks[:, 0] == 1
    both, sizes = (predicted & truth).sum((1, 2)), predicted.sum((1, 2)) + truth.sum((1, 2))
    dice = float((2 * both / sizes).mean())
    assert facts["metrics"]["dice"] == pytest.approx(dice, abs=1e-5)
    # Calling every pixel lesion scores 2 f / (1 + f) with a lesion share f.
    share = float(truth.double().mean())
    assert dice > 2 * (2 * share / (1 + share)) and dice > 0.6
    assert facts["temperature"] == pytest.approx(source_temperature(model, data.test), rel=1e-4)
    assert facts["temperature"] != 1


def test_facts_describe_the_masks(bundle, root):
    facts = SegmentationFacts.model_validate(bundle.manifest.facts["segmentation"])
    masks = load_segmentation(settings_of(), root).pool.masks.numpy()
    shares = masks.mean(axis=(1, 2, 3))
    assert facts.class_ratio == pytest.approx((1 - shares.mean(), shares.mean()))
    assert facts.foreground_range == pytest.approx(tuple(np.quantile(shares, [0.05, 0.95])))
    assert (facts.encoder, facts.classes, facts.heads) == ("unet", 2, ("unet", "aspp"))
    assert facts.flips
    sided = settings_of({"flips": False}).segmentation
    assert not segmentation_facts(sided, load_segmentation(settings_of(), root).pool).flips


def test_an_interrupted_run_ends_with_the_same_bits(bundle, root, tmp_path):
    def stop(event):
        if event.get("task") == "train segmenter" and event["epoch"] == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_source(settings_of(), root, tmp_path, KEY, Events(listeners=[stop]))
    seen = []
    train_source(settings_of(), root, tmp_path, KEY, Events(listeners=[seen.append]))
    assert {e["epoch"] for e in seen if e.get("task") == "train segmenter"} == {7, 8, 9, 10}
    again = Bundle.open(tmp_path)
    assert again.manifest.files == bundle.manifest.files
    assert again.manifest.facts == bundle.manifest.facts


def test_training_starts_from_given_encoder_weights(root):
    data = load_segmentation(settings_of(), root)
    wanted = settings_of({"epochs": 1, "learning_rate": 1e-12, "style_augmentation": True})
    start = build_segmenter("unet", image_size=SIZE, seed=77).encoder
    model = train_segmenter(data.pool, wanted.segmentation, 0, start.state_dict())
    for (name, before), after in zip(
        start.named_parameters(), model.encoder.parameters(), strict=True
    ):
        assert torch.allclose(before, after, atol=1e-6), name
    with pytest.raises(ConfigurationError, match="another encoder"):
        train_segmenter(data.pool, wanted.segmentation, 0, {"one": torch.zeros(1)})


def test_training_without_flips_sees_no_mirror(root, monkeypatch):
    pool = load_segmentation(settings_of(), root).pool
    few = SegmentationPart(pool.samples[:8], pool.images[:8], pool.masks[:8])
    wanted = settings_of({"epochs": 1, "flips": False}).segmentation

    def trained():
        model = train_segmenter(few, wanted, 0)
        head = InfusionHead(2, Infusion(rule="gate"), 2, 0)
        train_gate(head, [model, build_segmenter("unet", image_size=SIZE)], few, 0, flips=False)
        return [*model.parameters(), *head.parameters()]

    plain = trained()
    monkeypatch.setattr(augmentation, "FLIP_PROBABILITY", 1.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, trained(), strict=True))


def test_source_file_round_trip(root, tmp_path):
    workspace, settings = Workspace(tmp_path), settings_of({"style_augmentation": True})
    write_source(workspace, settings, root)
    source = read_study_source(workspace, settings.digest(), SILENT)
    assert source.settings == settings and source.segmenter == settings.segmentation
    expected = load_segmentation(settings, root)
    assert torch.equal(source.data.test.images, expected.test.images)
    with pytest.raises(ConfigurationError, match="other settings"):
        read_study_source(workspace, settings_of().digest(), SILENT)
    write_source(workspace, settings_of(), root / "elsewhere")
    with pytest.raises(DataMissingError):
        read_study_source(workspace, settings_of().digest(), SILENT)
    workspace.source.unlink()
    with pytest.raises(ConfigurationError, match=r"source\.toml is missing"):
        read_study_source(workspace, settings.digest(), SILENT)
