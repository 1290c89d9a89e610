import csv

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image
from safetensors.torch import save

from sonofed_client.adaptation.ensemble import (
    CONSENSUS_IMAGES,
    branch_probabilities,
    consensus_log_temperatures,
)
from sonofed_client.adaptation.spacing import evenly_spaced
from sonofed_client.enclave.enclave import InProcessEnclave
from sonofed_client.enclave.handlers import ensemble
from sonofed_client.enclave.handlers.ensemble import predict_site
from sonofed_client.enclave.intake import take_in
from sonofed_client.enclave.site import Site
from sonofed_client.enclave.store import Store
from sonofed_client.settings import SiteData, SiteSettings
from sonofed_common.batch_norm import adapt_batch_norm
from sonofed_common.contract import actions
from sonofed_common.contract.actions import request
from sonofed_common.contract.bundle import BundleWriter, DataProvenance, Provenance
from sonofed_common.contract.errors import (
    DataUnreadableError,
    DivergenceError,
    ParameterError,
    SiteEmptyError,
)
from sonofed_common.contract.records import Records, to_bytes
from sonofed_common.contract.results import SEGMENTATION_METRICS
from sonofed_common.contract.segmentation import SegmentationFacts
from sonofed_common.contract.study_segmentation import Infusion
from sonofed_common.models.infusion import InfusionHead, fit_temperature
from sonofed_common.models.segmenter import build_segmenter
from sonofed_common.security import public_hex
from sonofed_common.segmentation_metrics import score_images, segmentation_metrics

IMAGES, SIZE, CLASSES = 12, 32, 3
COMMON = {"study": "trial", "seed": 3}
BRANCHES = ("source", "target")
KEY = Ed25519PrivateKey.generate()
FACTS = SegmentationFacts(
    encoder="unet",
    classes=CLASSES,
    heads=("unet", "aspp"),
    class_ratio=(0.8, 0.1, 0.1),
    foreground_range=(0.1, 0.3),
    flips=True,
)


def write(folder, rows):
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "mask", "label", "patient"])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def rows(tmp_path):
    """Wide images without labels, two of a patient; where a mask says 1 the image is bright."""
    folder = tmp_path / "data"
    folder.mkdir()
    generator = np.random.default_rng(0)
    rows = []
    for n in range(IMAGES):
        classes = np.zeros((48, 96), dtype=np.uint8)
        top, left = generator.integers(4, 20), generator.integers(4, 60)
        classes[top : top + 24, left : left + 30] = 1
        classes[2:5, 2:5] = 2
        grey = 30 + 10 * generator.random(classes.shape) + 200 * (classes == 1)
        Image.fromarray(grey.astype(np.uint8)).save(folder / f"{n}.png")
        mask = Image.fromarray(classes, mode="P")
        mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
        mask.save(folder / f"{n}-mask.png")
        row = {"image": f"{n}.png", "mask": f"{n}-mask.png", "label": "", "patient": f"p{n // 2}"}
        rows.append(row)
    write(folder, rows)
    return rows


@pytest.fixture
def settings(tmp_path, rows):
    data = SiteData(kind="table", path=tmp_path / "data", test_fraction=0.5)
    return SiteSettings(
        name="north",
        store=tmp_path / "store",
        data=data,
        coordinator_key=public_hex(KEY),
        image_key="0" * 64,
        threads=1,
        auto_approve=(public_hex(KEY),),
    )


def segmenter(seed):
    return build_segmenter("unet", CLASSES, SIZE, FACTS.heads, pretrained=False, seed=seed)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    provenance = Provenance(
        data=DataProvenance(name="phantoms", digest="0" * 64, images=1, groups=1), settings="0" * 64
    )
    folder = tmp_path_factory.mktemp("bundle")
    writer = BundleWriter(folder, name="trial", kind="source", provenance=provenance)
    networks = {name: segmenter(seed) for seed, name in enumerate(BRANCHES)}
    networks["broken"] = segmenter(5)
    torch.nn.init.constant_(networks["broken"].heads[0].last.bias, float("nan"))
    for name, model in networks.items():
        state = {n: t.contiguous().clone() for n, t in model.state_dict().items()}
        writer.add(f"segmenters/{name}.safetensors", save(state))
    writer.facts = {"segmentation": FACTS.model_dump(mode="json")}
    return writer.sign(KEY)


def install(enclave, bundle):
    parts = {
        name: np.frombuffer((bundle.folder / f"manifest.{end}").read_bytes(), dtype=np.uint8)
        for name, end in (("manifest", "json"), ("signature", "sig"))
    }
    blobs = {d: np.frombuffer(bundle.blob(d), dtype=np.uint8) for d in bundle.manifest.blobs}
    enclave.perform("train.install", request(actions.Install(**COMMON), **parts, blobs=blobs))


@pytest.fixture
def enclave(settings, bundle):
    enclave = InProcessEnclave(settings)
    install(enclave, bundle)
    return enclave


def pooled(bundle):
    return {**COMMON, "bundle": bundle.id, "image_size": SIZE}


def evaluation(bundle, **changes):
    values = {"branches": BRANCHES, "infusion": Infusion(), "replicates": 20} | changes
    return actions.EvaluateSegmenter(**pooled(bundle), **values)


def test_masks_lie_over_their_images(settings):
    site = Site(settings)
    seen = 0
    for part in ("pool", "test"):
        held, images = site.images(part, SIZE)
        index, masks = site.masks(part, SIZE)
        assert index == list(range(len(held)))
        assert masks.shape == (len(index), 1, SIZE, SIZE) and masks.dtype == torch.uint8
        assert set(masks.unique().tolist()) == {0, 1, 2}
        bright = images[index] > 0.5
        union = (bright | (masks == 1)).sum()
        assert (bright & (masks == 1)).sum() / union > 0.8
        seen += len(index)
    assert seen == IMAGES


def test_without_labels_the_split_is_of_patients_with_masks(settings, rows):
    folder = settings.data.path
    write(
        folder, [{**row, "mask": "" if n % 3 == 0 else row["mask"]} for n, row in enumerate(rows)]
    )
    site = Site(settings)
    pool, test = site.store.images("pool"), site.store.images("test")
    masked = {row["image"] for n, row in enumerate(rows) if n % 3}
    assert test and pool and not {row.group for row in test} & {row.group for row in pool}
    assert {row.name for row in test} <= masked
    assert {row.label for row in (*pool, *test)} == {None}
    assert len(site.masks("test", SIZE)[0]) == len(test)
    index, _ = site.masks("pool", SIZE)
    assert {pool[n].name for n in index} == {row.name for row in pool} & masked
    left_out = sum(site.store.get("intake").config["excluded"].values())
    assert len(pool) + len(test) + left_out == IMAGES


@pytest.mark.parametrize("patients", [0, 1])
def test_a_site_without_masks_of_two_patients_takes_part_untested(settings, rows, bundle, patients):
    masked = [
        {**row, "mask": row["mask"] if n < 2 * patients else ""} for n, row in enumerate(rows)
    ]
    write(settings.data.path, masked)
    enclave = InProcessEnclave(settings)
    install(enclave, bundle)
    site = Site(settings)
    assert len(site.store.images("pool")) == IMAGES and not site.store.images("test")
    assert site.images("test", SIZE)[1].shape == (0, 1, SIZE, SIZE)
    reply = enclave.perform("evaluate.segmenter", request(evaluation(bundle)))
    assert reply.config == {"examples": 0} and not reply.metrics
    asked = actions.Describe(**COMMON, study_digest="0" * 64)
    described = enclave.perform("query.describe", request(asked))
    assert described.metrics == {"pool": 10, "test": 0}


@pytest.mark.parametrize("count", [1, 4])
def test_means_over_few_images_stay(settings, rows, bundle, count):
    """Images of one patient each: ``count`` in the pool, or ``count`` with masks."""
    folder = settings.data.path
    few = [{**row, "mask": "", "patient": row["image"]} for row in rows[:count]]
    write(folder, few)
    enclave = InProcessEnclave(settings)
    install(enclave, bundle)
    ask = request(actions.TrainEnsemble(**pooled(bundle), branches=BRANCHES))
    reply = enclave.perform("train.ensemble", ask)
    assert reply.config == {"examples": 0} and not reply.arrays["log_temperatures"].any()
    write(folder, [{**row, "patient": row["image"]} for row in rows[: 2 * count]])
    masked = settings.model_copy(update={"store": folder.parent / "other"})
    enclave = InProcessEnclave(masked)
    install(enclave, bundle)
    assert len(Site(masked).masks("test", SIZE)[0]) == count
    reply = enclave.perform("evaluate.segmenter", request(evaluation(bundle)))
    assert reply.config == {"examples": 0} and not reply.metrics


def test_a_site_with_labels_keeps_its_split_and_has_masks(settings, rows):
    labelled = [{**row, "label": n // 2 % 2} for n, row in enumerate(rows)]
    labelled[0]["mask"] = ""
    write(settings.data.path, labelled)
    site = Site(settings)
    assert {row.label for row in site.store.images("test")} == {0, 1}
    names = set()
    for part in ("pool", "test"):
        held = site.store.images(part)
        names |= {held[n].name for n in site.masks(part, SIZE)[0]}
    assert names == {row["image"] for row in rows[1:]}


def test_a_corrupt_mask_is_reported_and_its_image_kept(settings, rows):
    path = settings.data.path / rows[3]["mask"]
    path.write_bytes(path.read_bytes()[:-40])
    site = Site(settings)
    (skipped,) = site.store.get("intake").config["skipped"]
    assert skipped == {"name": "3.png", "reason": "a mask cannot be decoded"}
    assert len(site.store.images()) == IMAGES - sum(
        site.store.get("intake").config["excluded"].values()
    )
    assert "3.png" not in {row.name for row in site.store.images("test")}


def test_another_mask_is_another_snapshot(settings, rows):
    site = Site(settings)
    before, (_, masks) = site.snapshot, site.masks("test", SIZE)
    name = site.store.images("test")[0].name
    path = settings.data.path / next(row["mask"] for row in rows if row["image"] == name)
    mask = Image.open(path)
    mask.paste(1, (0, 0, 96, 48))
    mask.save(path)
    fresh = Site(settings)
    with pytest.raises(DataUnreadableError, match="intake"):
        fresh.masks("test", 16)
    assert take_in(settings, Store(settings.store), again=True) != before
    assert not torch.equal(site.masks("test", SIZE)[1], masks)
    assert len(site.masks("test", SIZE)[1]) == len(masks)


def test_metrics_are_those_of_the_infused_branches(enclave, bundle, settings):
    temperatures = np.array([0.5, 2.0])
    ask = request(evaluation(bundle), temperatures=temperatures)
    reply = enclave.perform("evaluate.segmenter", ask)
    site = Site(settings)
    _, images = site.images("test", SIZE)
    _, pool = site.images("pool", SIZE)
    index, masks = site.masks("test", SIZE)
    models = [segmenter(seed).eval() for seed in range(2)]
    for model in models:
        adapt_batch_norm(model, pool)
    head = InfusionHead(2, Infusion(), CLASSES)
    head.load({"temperatures": temperatures})
    with torch.inference_mode():
        p, _ = head(torch.stack([model.probabilities(images[index]) for model in models]))
    expected = segmentation_metrics(score_images(p, masks))
    assert reply.config == {"examples": len(index)} and not reply.arrays
    assert set(reply.metrics) == {
        f"{name}{end}" for name in SEGMENTATION_METRICS for end in ("", "_low", "_high")
    }
    for name, value in expected.items():
        assert reply.metrics[name] == pytest.approx(value, rel=1e-5)
        assert reply.metrics[f"{name}_low"] <= value <= reply.metrics[f"{name}_high"]
    again = InProcessEnclave(settings.model_copy(update={"store": settings.store.parent / "other"}))
    install(again, bundle)
    assert to_bytes(again.perform("evaluate.segmenter", ask)) == to_bytes(reply)


def test_statistics_are_kept_where_the_study_wants_them_global(enclave, bundle):
    values = {"infusion": Infusion(rule="mean"), "replicates": 0}
    replies = [
        enclave.perform("evaluate.segmenter", request(evaluation(bundle, batch_norm=b, **values)))
        for b in ("site", "global")
    ]
    assert replies[0].metrics != replies[1].metrics
    assert tuple(replies[0].metrics) == SEGMENTATION_METRICS


def test_predictions_come_with_rows_images_and_weights(enclave, bundle, settings):
    site = Site(settings)
    parameters = evaluation(bundle)
    rows, images = site.images("test", SIZE)
    parts = list(predict_site(site, parameters, request(parameters)))
    assert [row for part in parts for row in part.rows] == rows
    assert torch.equal(torch.cat([part.images for part in parts]), images)
    for part in parts:
        assert part.probabilities.shape == (len(part.rows), CLASSES, SIZE, SIZE)
        assert part.weights.shape == (2, len(part.rows), SIZE, SIZE)
        assert len(part.scores()) == len(part.rows)


def test_a_consensus_calibrates_each_branch_against_the_others(enclave, bundle, settings):
    ask = request(actions.TrainEnsemble(**pooled(bundle), branches=(*BRANCHES, "source")))
    reply = enclave.perform("train.ensemble", ask)
    found = reply.arrays["log_temperatures"]
    assert found.shape == (3,) and found.dtype == np.float64
    assert found[0] == found[2] != found[1]
    assert reply.config == {"examples": len(Store(settings.store).images("pool"))}
    assert not reply.metrics
    _, pool = Site(settings).images("pool", SIZE)
    models = [segmenter(seed).eval() for seed in range(2)]
    for model in models:
        adapt_batch_norm(model, pool)
    with torch.inference_mode():
        p = [model.probabilities(pool).movedim(1, -1).flatten(0, 2) for model in models]
    others = [p[0] + p[1], 2 * p[0], p[0] + p[1]]
    expected = [
        fit_temperature(own.log(), other.argmax(1))
        for own, other in zip((p[0], p[1], p[0]), others, strict=True)
    ]
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-3)


def test_a_branch_alone_needs_no_consensus():
    images = torch.rand(3, 1, SIZE, SIZE)
    assert consensus_log_temperatures([segmenter(0)], images).tolist() == [0]
    assert consensus_log_temperatures([segmenter(0), segmenter(1)], images[:0]).tolist() == [0, 0]


def test_a_consensus_of_many_images_is_of_evenly_spaced_ones():
    images = torch.rand(80, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(2))
    models = [segmenter(0), segmenter(1)]
    for model in models:
        adapt_batch_norm(model, images)
    found = consensus_log_temperatures(models, images)
    few = consensus_log_temperatures(models, evenly_spaced(images, CONSENSUS_IMAGES))
    assert found.tolist() == few.tolist()
    assert found.tolist() != consensus_log_temperatures(models, images[:64]).tolist()


def test_statistics_are_of_evenly_spaced_pool_images(enclave, bundle, settings, monkeypatch):
    monkeypatch.setattr(ensemble, "BATCH_NORM_IMAGES", 4)
    parameters = evaluation(bundle, branches=("source",))
    (prediction,) = predict_site(Site(settings), parameters, request(parameters))
    _, pool = Site(settings).images("pool", SIZE)
    model = segmenter(0).eval()
    adapt_batch_norm(model, evenly_spaced(pool, 4))
    with torch.inference_mode():
        expected = model.probabilities(prediction.images)
    assert torch.allclose(prediction.probabilities, expected, atol=1e-5)


def test_batches_keep_the_order_of_images_and_leave_gradients_on():
    images = torch.rand(5, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    models = [segmenter(0), segmenter(1)]
    parts = []
    for part in branch_probabilities(models, images, 2):
        assert torch.is_grad_enabled()
        parts.append(part)
    assert [part.shape[1] for part in parts] == [2, 2, 1]
    whole = next(iter(branch_probabilities(models, images)))
    torch.testing.assert_close(torch.cat(parts, 1), whole)


def test_mirrored_branches_predict_the_mean_of_image_and_mirror(bundle, settings):
    site = Site(settings)
    install(InProcessEnclave(settings), bundle)
    parameters = evaluation(bundle, infusion=Infusion(rule="mean", mirrored=True))
    parts = list(predict_site(site, parameters, Records()))
    images = torch.cat([part.images for part in parts])
    _, pool = site.images("pool", SIZE)
    expected = []
    for seed in range(len(BRANCHES)):
        model = segmenter(seed).eval()
        adapt_batch_norm(model, pool)
        with torch.inference_mode():
            mirror = model.probabilities(images.flip(-1)).flip(-1)
            expected.append((model.probabilities(images) + mirror) / 2)
    said = torch.cat([part.probabilities for part in parts])
    torch.testing.assert_close(said, sum(expected) / 2)


def test_nothing_is_mirrored_where_classes_have_a_side(enclave, bundle, monkeypatch):
    sided = FACTS.model_copy(update={"flips": False})
    monkeypatch.setattr(Site, "segmentation", lambda site, bundle: sided)
    enclave.perform("evaluate.segmenter", request(evaluation(bundle)))
    mirrored = evaluation(bundle, infusion=Infusion(mirrored=True))
    with pytest.raises(ParameterError, match="a side; leave it off"):
        enclave.perform("evaluate.segmenter", request(mirrored))


def test_requests_that_do_not_fit_are_refused(enclave, bundle):
    gate = evaluation(bundle, infusion=Infusion(rule="gate"))
    for message, what in (
        (request(evaluation(bundle), temperatures=np.ones(3)), "temperatures"),
        (request(evaluation(bundle), temperatures=np.array([1, np.inf])), "temperatures"),
        (request(gate), "gate"),
        (request(evaluation(bundle, branches=("absent",))), "segmenters/absent"),
    ):
        with pytest.raises(ParameterError, match=what):
            enclave.perform("evaluate.segmenter", message)
    with pytest.raises(DivergenceError):
        enclave.perform("evaluate.segmenter", request(evaluation(bundle, branches=("broken",))))


def test_masks_of_classes_that_the_segmenters_do_not_know_are_refused(settings, rows, bundle):
    for row in rows:
        path = settings.data.path / row["mask"]
        mask = Image.open(path)
        mask.paste(3, (40, 40, 44, 44))
        mask.save(path)
    enclave = InProcessEnclave(settings)
    install(enclave, bundle)
    with pytest.raises(ParameterError, match=r"class 3.* know 3"):
        enclave.perform("evaluate.segmenter", request(evaluation(bundle)))


def test_a_site_without_test_masks_is_not_tested(settings, rows, bundle):
    unmasked = [{**row, "mask": "", "label": n // 2 % 2} for n, row in enumerate(rows)]
    write(settings.data.path, unmasked)
    enclave = InProcessEnclave(settings)
    install(enclave, bundle)
    ask = request(evaluation(bundle))
    assert enclave.perform("evaluate.segmenter", ask).config == {"examples": 0}
    with pytest.raises(SiteEmptyError, match="no test image with a mask"):
        next(predict_site(Site(settings), evaluation(bundle), ask))
