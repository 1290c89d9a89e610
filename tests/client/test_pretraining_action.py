from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import save

from sonofed_client.adaptation import pretraining
from sonofed_client.enclave.handlers.pretraining import pool_sectors, pretrain
from sonofed_client.enclave.site import INTERRUPTED, Site
from sonofed_client.enclave.starts import start_of
from sonofed_client.settings import SiteData, SiteSettings
from sonofed_common.contract.actions import Pretrain, parse, request
from sonofed_common.contract.bundle import BundleWriter
from sonofed_common.contract.errors import DivergenceError, ParameterError
from sonofed_common.contract.manifest import DataProvenance, Provenance
from sonofed_common.contract.records import Records, to_bytes
from sonofed_common.contract.study_segmentation import Pretraining
from sonofed_common.data.sector import sectors
from sonofed_common.models.segmenter import build_segmenter
from sonofed_common.security import public_hex
from sonofed_simulations.phantoms.dataset import write_dataset
from sonofed_simulations.phantoms.scanner import SCANNERS

torch.set_num_threads(1)

SIZE = 32
SETTINGS = Pretraining(rounds=2, local_epochs=2, patch_size=8, batch_size=8)


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hospital") / "north"
    return write_dataset(folder, SCANNERS["riverside"], 20, 5, 64, 0.4)


@pytest.fixture(scope="module")
def segmenter():
    return build_segmenter("unet", 2, SIZE, pretrained=False, seed=9)


@pytest.fixture
def site(tmp_path, hospital, segmenter):
    """A site with an installed bundle that holds a segmenter, and that bundle's id."""
    key = Ed25519PrivateKey.generate()
    data = DataProvenance(name="phantoms", digest="0" * 64, images=1, groups=1)
    provenance = Provenance(data=data, settings="0" * 64)
    writer = BundleWriter(tmp_path / "bundle", name="b", kind="source", provenance=provenance)
    weights = {name: tensor.contiguous() for name, tensor in segmenter.state_dict().items()}
    writer.add("segmenters/source.safetensors", save(weights))
    writer.facts["segmentation"] = {
        "encoder": "unet",
        "classes": 2,
        "heads": ["unet", "aspp"],
        "class_ratio": [0.9, 0.1],
        "foreground_range": [0.01, 0.3],
        "flips": True,
    }
    bundle = writer.sign(key)
    site = Site(
        SiteSettings(
            name="north",
            store=tmp_path / "store",
            data=SiteData(kind="table", path=hospital, test_fraction=0.4),
            coordinator_key=public_hex(key),
            oracle=True,
            threads=1,
        )
    )
    parts = {
        name: np.frombuffer((bundle.folder / f"manifest.{end}").read_bytes(), dtype=np.uint8)
        for name, end in (("manifest", "json"), ("signature", "sig"))
    }
    site.store.put(f"bundle/{bundle.id}", Records(parts))
    for digest in bundle.manifest.blobs:
        site.store.put_bytes(f"blob/{digest}", bundle.blob(digest))
    return site, bundle.id


def asked(bundle, round=0, **changes):
    return Pretrain(
        study="trial",
        seed=3,
        bundle=bundle,
        image_size=SIZE,
        round=round,
        settings=SETTINGS.model_copy(update=changes),
    )


def ask(site, bundle, round=0, weights=None, **changes):
    message = request(asked(bundle, round, **changes), weights=weights or {})
    return pretrain(site, parse("train.pretrain", message), message)


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def test_rounds_follow_each_other_and_give_the_same_bits_again(site):
    site, bundle = site
    first = ask(site, bundle)
    pool = site.store.images("pool")
    assert first.config == {"examples": len(pool)}
    assert first.metrics.keys() == {"loss", "mim", "contrastive"}
    second = ask(site, bundle, 1, first.group("weights"))
    encoder = {
        name.removeprefix("encoder."): torch.from_numpy(np.array(array))
        for name, array in second.group("weights").items()
        if name.startswith("encoder.")
    }
    build_segmenter("unet", 2, SIZE, pretrained=False).encoder.load_state_dict(encoder)
    again = ask(site, bundle, 1, ask(site, bundle).group("weights"))
    assert to_bytes(second) == to_bytes(again)
    assert not equal(first.group("weights"), second.group("weights"))
    assert not list((site.store.folder / "checkpoints").glob("*"))


def test_the_start_is_the_shipped_segmenters_or_drawn_alike_everywhere(
    site, segmenter, monkeypatch
):
    site, bundle = site
    starts = []

    def untrained(model, *_):
        starts.append(model)
        return {"loss": 0.0}

    monkeypatch.setattr("sonofed_client.enclave.handlers.pretraining.pretrain_round", untrained)
    source = ask(site, bundle, start="source").group("weights")
    start = start_of(site, asked(bundle, start="source"), Records())
    assert equal(source, Records(dict(start)).group("weights"))
    shipped = segmenter.encoder.state_dict()
    assert all(np.array_equal(source[f"encoder.{name}"], shipped[name]) for name in shipped)
    drawn = ask(site, bundle).group("weights")
    site.settings = site.settings.model_copy(update={"name": "south"})
    assert equal(drawn, ask(site, bundle).group("weights"))
    assert not equal(drawn, source)


def test_a_round_gets_the_pools_images_with_their_sectors_and_patients(site, monkeypatch):
    site, bundle = site
    rounds = []

    def untrained(model, *arguments):
        rounds.append(arguments)
        return {"loss": 0.0}

    rows, images = site.images("pool", SIZE)
    images[..., : SIZE // 2] = 0
    monkeypatch.setattr(site, "images", lambda part, size: (rows, images))
    monkeypatch.setattr("sonofed_client.enclave.handlers.pretraining.pretrain_round", untrained)
    ask(site, bundle)
    ((shown, inside, groups, *_),) = rounds
    assert torch.equal(shown, images)
    assert torch.equal(inside, sectors(images)) and not inside[..., : SIZE // 4].any()
    # Several images are of one patient, whose frames must not be told apart.
    assert list(groups) == [row.group for row in rows] and len(set(groups)) < len(rows)


@pytest.mark.parametrize("flips", [True, False])
def test_crops_are_mirrored_where_the_bundle_allows_it(site, monkeypatch, flips):
    site, bundle = site
    facts = site.segmentation(bundle).model_copy(update={"flips": flips})
    monkeypatch.setattr(site, "segmentation", lambda _: facts)
    plain = to_bytes(ask(site, bundle))
    monkeypatch.setattr("sonofed_client.adaptation.contrastive.FLIP_PROBABILITY", 1.0)
    assert (to_bytes(ask(site, bundle)) == plain) != flips


def test_a_killed_round_goes_on_from_its_last_epoch(site, monkeypatch):
    site, bundle = site
    whole = ask(site, bundle)
    crops, calls = pretraining.random_crops, 0

    def killed(*arguments):
        nonlocal calls
        calls += 1
        if calls > steps + 2:
            raise KilledError
        return crops(*arguments)

    count = len(site.store.images("pool"))
    steps = 2 * len(pretraining.batches(count, SETTINGS.batch_size, 0))
    monkeypatch.setattr(pretraining, "random_crops", killed)
    with pytest.raises(KilledError):
        ask(site, bundle)
    (checkpoint,) = (site.store.folder / "checkpoints").iterdir()
    other = ask(site, bundle, contrastive="none")
    assert checkpoint.exists() and not equal(other.group("weights"), whole.group("weights"))
    calls = 0
    assert to_bytes(ask(site, bundle)) == to_bytes(whole)
    assert calls == steps
    assert not checkpoint.exists()


def test_a_failed_round_leaves_no_checkpoint(site, monkeypatch):
    site, bundle = site
    round_of, folder = pretraining.pretrain_round, site.store.folder / "checkpoints"

    def failing(*arguments):
        round_of(*arguments)
        assert len(list(folder.iterdir())) == 1
        raise DivergenceError("a loss is not finite")

    monkeypatch.setattr("sonofed_client.enclave.handlers.pretraining.pretrain_round", failing)
    with pytest.raises(DivergenceError):
        ask(site, bundle)
    assert not list(folder.iterdir())


def test_trainings_that_nobody_took_up_again_are_forgotten(site, monkeypatch):
    site, bundle = site
    folder = site.store.folder / "checkpoints"
    folder.mkdir(exist_ok=True)
    for age in range(9):
        path = folder / f"{age}.safetensors"
        path.write_bytes(b"")
        os.utime(path, (1000 - age, 1000 - age))
    with site.checkpoint(asked(bundle), Records()) as wanted:
        assert {path.stem for path in folder.iterdir()} == {"0", "1", "2", "3"}
        wanted.write_bytes(b"")
    for age in range(4):
        os.utime(folder / f"{age}.safetensors", (1000, 1000 + age))
    with pytest.raises(KilledError), site.checkpoint(asked(bundle), Records()) as wanted:
        wanted.write_bytes(b"")
        os.utime(wanted, (0, 0))
        raise KilledError
    with site.checkpoint(asked(bundle), Records()) as again:
        assert again == wanted and len(list(folder.iterdir())) == INTERRUPTED + 1


def test_sectors_are_found_once_a_snapshot(site, monkeypatch):
    site, _ = site
    _, images = site.images("pool", SIZE)
    found = pool_sectors(site, images)
    assert torch.equal(found, sectors(images))
    assert site.store.names("sectors/") == {f"sectors/{SIZE}/{site.snapshot}"}
    monkeypatch.setattr("sonofed_client.enclave.handlers.pretraining.sectors", None)
    assert torch.equal(pool_sectors(site, images), found)


def test_weights_that_do_not_fit_are_refused(site):
    site, bundle = site
    with pytest.raises(ParameterError, match="do not fit"):
        ask(site, bundle, 1, {"encoder.stranger": np.zeros(2, dtype=np.float32)})


def test_no_name_or_group_leaves(site):
    site, bundle = site
    sent = to_bytes(ask(site, bundle))
    secrets = {text for row in site.store.images() for text in (row.id, row.name, row.group)}
    assert not [text for text in secrets if text.encode() in sent]


def test_a_single_image_trains_nothing(site, monkeypatch):
    own, bundle = site
    rows, images = own.images("pool", SIZE)
    monkeypatch.setattr(own, "images", lambda part, size: (rows[:1], images[:1]))
    parameters = Pretrain(
        study="trial", seed=0, bundle=bundle, image_size=SIZE, round=0, settings=SETTINGS
    )
    reply = pretrain(own, parameters, request(parameters))
    assert reply.config == {"examples": 0} and not reply.arrays
