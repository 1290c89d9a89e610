"""Replay of synthetic source images, from the bundle to a site's round of fine-tuning."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sonofed_client.enclave.enclave import InProcessEnclave
from sonofed_client.enclave.handlers.classification import _replay
from sonofed_client.enclave.site import Site
from sonofed_client.settings import SiteSettings, read_site
from sonofed_common.contract import actions
from sonofed_common.contract.actions import TrainClassifier, request
from sonofed_common.contract.bundle import Bundle, BundleWriter
from sonofed_common.contract.configuration import validate
from sonofed_common.contract.errors import ConfigurationError, ParameterError
from sonofed_common.contract.manifest import SYNTHETIC_IMAGES
from sonofed_common.contract.records import Records, to_bytes
from sonofed_common.contract.study import Finetuning, Selection, Study
from sonofed_common.security import load_or_create_signing_key

COMMON = {"study": "trial", "seed": 3}
SIZE = 32
PER_CLASS = 4


def bundle_with(laboratory, folder, size: int) -> Bundle:
    """The laboratory's bundle and, where a size is given, synthetic images."""
    source = Bundle.open(laboratory.prepare_source())
    provenance = source.manifest.provenance
    writer = BundleWriter(folder, name="replay", kind="source", provenance=provenance)
    for path in source.paths:
        writer.add(path, source.read(path))
    if size:
        labels = np.arange(2 * PER_CLASS) % 2
        # Each image is a grey value of its own, whose tens tell the class.
        grey = (20 + 10 * np.arange(2 * PER_CLASS)).astype(np.uint8)
        images = np.broadcast_to(grey[:, None, None], (len(grey), size, size))
        writer.add(SYNTHETIC_IMAGES, to_bytes(Records({"images": images, "labels": labels})))
    writer.facts = dict(source.manifest.facts)
    return writer.sign(load_or_create_signing_key(laboratory.key))


def signed(bundle: Bundle) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer((bundle.folder / f"manifest.{end}").read_bytes(), dtype=np.uint8)
        for name, end in (("manifest", "json"), ("signature", "sig"))
    }


@pytest.fixture(scope="module")
def settings(laboratory) -> SiteSettings:
    return read_site(laboratory.prepare_sites(0)[0])


@pytest.fixture(scope="module")
def bundles(laboratory, settings, tmp_path_factory) -> dict[int, str]:
    """Installed bundles by the size of their synthetic images; all images are selected."""
    enclave = InProcessEnclave(settings)
    ids = {}
    for size in (0, SIZE, 2 * SIZE):
        bundle = bundle_with(laboratory, tmp_path_factory.mktemp("bundle"), size)
        blobs = {
            digest: np.frombuffer(bundle.blob(digest), dtype=np.uint8)
            for digest in bundle.manifest.blobs
        }
        message = request(actions.Install(**COMMON), **signed(bundle), blobs=blobs)
        assert enclave.perform("train.install", message).config["installed"] == bundle.id
        ids[size] = bundle.id
    chance = Selection(strategy="random", budgets=(1.0,))
    scoring = actions.Score(
        **COMMON,
        bundle=ids[0],
        image_size=SIZE,
        classifier="shufflenet_v2",
        pairs="augmentation",
        settings=laboratory.scenario.study.embedding,
        reconstruction=laboratory.scenario.study.reconstruction,
        selection=chance,
    )
    enclave.perform("train.score", request(scoring))
    whole = np.array([[2**63, 0]], dtype=np.uint64)
    enclave.perform("train.select", request(actions.Select(**COMMON, stage="mark"), cuts=whole))
    return ids


def training(bundle: str, replay: float, round: int = 0) -> TrainClassifier:
    return TrainClassifier(
        **COMMON,
        bundle=bundle,
        image_size=SIZE,
        classifier="shufflenet_v2",
        round=round,
        budget=0,
        settings=Finetuning(rounds=2, local_epochs=1, replay=replay),
    )


def train(settings: SiteSettings, *of: object) -> Records:
    return InProcessEnclave(settings).perform("train.classifier", request(training(*of)))


def test_examples_are_the_labelled_images_and_replay_changes_the_weights(settings, bundles):
    pool = len(Site(settings).store.images("pool"))
    plain, replayed = train(settings, bundles[SIZE], 0.0), train(settings, bundles[SIZE], 0.5)
    assert plain.config == replayed.config == {"examples": pool}
    assert plain.digest() == train(settings, bundles[0], 0.0).digest()
    assert replayed.digest() != plain.digest()
    assert replayed.digest() != train(settings, bundles[2 * SIZE], 1.0).digest()


def test_a_bundle_without_synthetic_images_is_refused(settings, bundles):
    with pytest.raises(ParameterError, match="the bundle holds none; train the source with"):
        train(settings, bundles[0], 0.5)


@pytest.mark.parametrize(("replay", "labels", "expected"), [(0.5, 9, 4), (1, 7, 7), (3, 5, 15)])
def test_a_round_draws_so_many_of_both_classes(settings, bundles, replay, labels, expected):
    site = Site(settings)
    images, classes = _replay(site, training(bundles[SIZE], replay), labels, seed=1)
    assert images.shape == (expected, 1, SIZE, SIZE) and len(classes) == expected
    counts = torch.bincount(classes, minlength=2)
    assert abs(int(counts[0] - counts[1])) <= 1
    grey = (images.mean((1, 2, 3)) * 255).round().long()
    assert torch.equal((grey - 20) // 10 % 2, classes)
    assert len(grey.unique()) == min(expected, 2 * PER_CLASS)


def test_seeds_decide_what_is_drawn(settings, bundles):
    site, wanted = Site(settings), training(bundles[SIZE], 1.0)
    first, again, other = (_replay(site, wanted, 4, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_images_of_another_size_are_resized(settings, bundles):
    site = Site(settings)
    drawn = [_replay(site, training(bundles[size], 1.0), 6, 1) for size in (SIZE, 2 * SIZE)]
    (small, classes), (shrunk, same) = drawn
    assert torch.equal(classes, same) and torch.allclose(small, shrunk, atol=1e-6)


def test_nothing_is_drawn_without_replay(settings, bundles):
    assert _replay(Site(settings), training(bundles[0], 0.0), 5, 1) is None


@pytest.mark.parametrize("replay", [0.0, 0.25, 10.0])
def test_a_study_may_replay(replay: float):
    values = {"name": "x", "cohort": {"sites": ["north"]}, "finetuning": {"replay": replay}}
    assert validate(Study, values, "study").finetuning.replay == replay


@pytest.mark.parametrize("replay", [-0.1, 10.5])
def test_replay_out_of_range_is_refused(replay: float):
    values = {"name": "x", "cohort": {"sites": ["north"]}, "finetuning": {"replay": replay}}
    with pytest.raises(ConfigurationError, match=r"finetuning\.replay"):
        validate(Study, values, "study")
