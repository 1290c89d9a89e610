import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image
from safetensors.torch import load
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.configuration import validate
from sonofed_common.contract.errors import (
    BundleError,
    ConfigurationError,
    DataMissingError,
    OneClassError,
)
from sonofed_common.contract.records import from_bytes
from sonofed_common.models.classifiers import build_classifier
from sonofed_common.models.stack import DiffusionStack
from sonofed_common.runtime import Events
from sonofed_common.security import load_or_create_signing_key
from sonofed_server.cli import app
from sonofed_server.source.classifiers import class_weights, probabilities
from sonofed_server.source.data import load_source
from sonofed_server.source.settings import SourceSettings, read_source
from sonofed_server.source.statistics import SMALLEST, feature_statistics, spherical_kmeans
from sonofed_server.source.training import train_source

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw().hex()
SIZE = 32


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_set(folder, patients=24, normals=2, labels=("benign", "malignant"), corrupt=False):
    """Noise with a dark disc (benign) or a dark bar (malignant), two images a patient."""
    folder.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(0)
    rows = ["image,label,patient,device"]
    for patient in range(patients + normals):
        label = "normal" if patient >= patients else labels[patient % len(labels)]
        for view in range(2):
            pixels = draws.integers(120, 255, (SIZE, SIZE))
            y, x = np.mgrid[:SIZE, :SIZE] - SIZE // 2
            lesion = {"benign": x**2 + y**2 < 60, "malignant": abs(x - y) < 4, "normal": x > 99}
            pixels[lesion[label]] //= 5
            name = f"{patient:03d}_{view}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
            rows.append(f"{name},{label},p{patient},{'one' if patient % 4 < 2 else 'two'}")
    if corrupt:
        good = (folder / "000_0.png").read_bytes()
        (folder / "000_0.png").write_bytes(good[: len(good) // 2])
    (folder / "table.csv").write_text("\n".join(rows))
    return folder


def settings_of(**changes):
    values = {
        "name": "trial",
        "seed": 3,
        "image_size": SIZE,
        "classifiers": ["shufflenet_v2"],
        "threads": 1,
        "data": {"kind": "table", "path": "set", "test_fraction": 0.25},
        "training": {"epochs": 2, "learning_rate": 1e-3, "batch_size": 8},
        "diffusion": {"kind": "none"},
    }
    return validate(SourceSettings, values | changes, "test")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_set(folder / "set")
    return folder


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    seen = []
    out = tmp_path_factory.mktemp("out") / "bundle"
    settings = settings_of(
        diffusion={"kind": "tiny", "epochs": 1, "batch_size": 16, "learning_rate": 1e-3}
    )
    path = train_source(settings, root, out, KEY, Events(listeners=[seen.append]))
    return settings, Bundle.open(path, PUBLIC), seen


def test_parts_share_no_patient_and_normals_are_dropped(root):
    source = load_source(settings_of(), root)
    pool, test = ({s.group for s in p.samples} for p in (source.pool, source.test))
    assert not pool & test
    assert len(pool | test) == 24
    assert source.provenance.images == 48 and source.provenance.groups == 24
    for part in (source.pool, source.test):
        assert part.images.shape == (len(part.labels), 1, SIZE, SIZE)
        assert [s.label for s in part.samples] == part.labels.tolist()
        assert set(part.labels.tolist()) == {0, 1}


def test_the_data_digest_sees_pixels_and_labels(root, tmp_path):
    before = load_source(settings_of(), root).provenance.digest
    assert before == load_source(settings_of(seed=99), root).provenance.digest
    write_set(tmp_path / "set")
    image = tmp_path / "set" / "003_1.png"
    pixels = np.array(Image.open(image))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(image)
    assert load_source(settings_of(), tmp_path).provenance.digest != before


def test_devices_are_filtered_by_prefix(root):
    data = {"kind": "table", "path": "set", "devices": ["on"], "test_fraction": 0.25}
    source = load_source(settings_of(data=data), root)
    assert {s.device for s in source.pool.samples + source.test.samples} == {"one"}
    with pytest.raises(DataMissingError, match="one, two"):
        load_source(settings_of(data=data | {"devices": ["three"]}), root)


def test_a_corrupt_image_is_skipped_and_counted(tmp_path):
    write_set(tmp_path / "set", corrupt=True)
    seen = []
    source = load_source(settings_of(), tmp_path, Events(listeners=[seen.append]))
    assert source.provenance.images == 47
    (counts,) = [e for e in seen if e["event"] == "source data"]
    assert counts["skipped"] == 1
    assert counts["training"] + counts["held_out"] == 47


def test_one_class_is_refused(tmp_path):
    write_set(tmp_path / "set", labels=("malignant",))
    with pytest.raises(OneClassError, match="no benign"):
        load_source(settings_of(), tmp_path)


def test_only_normals_is_refused(tmp_path):
    write_set(tmp_path / "set", patients=0, normals=3)
    with pytest.raises(DataMissingError, match="benign or malignant"):
        load_source(settings_of(), tmp_path)


def test_class_weights_balance_the_classes():
    labels = torch.tensor([0, 0, 0, 1])
    weights = class_weights(labels)
    assert weights[labels].mean().item() == pytest.approx(1)
    assert (weights[0] * 3).item() == pytest.approx(weights[1].item())


def test_bundle_holds_what_a_site_needs(trained, tmp_path):
    settings, bundle, _ = trained
    assert bundle.manifest.facts["image_size"] == SIZE
    model = build_classifier("shufflenet_v2", pretrained=False)
    model.load_state_dict(load(bundle.read("classifiers/shufflenet_v2.safetensors")))
    facts = bundle.manifest.facts["classifiers"]["shufflenet_v2"]
    assert 0 <= facts["threshold_at_specificity_90"] <= 1.01
    for path in (p for p in bundle.paths if p.startswith("diffusion/")):
        file = tmp_path / "stack" / path.removeprefix("diffusion/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bundle.read(path))
    assert DiffusionStack.load(tmp_path / "stack").image_size == SIZE
    assert bundle.manifest.facts["diffusion"]["canny"]
    assert bundle.manifest.provenance.settings == settings.digest()


def test_facts_are_those_of_the_shipped_weights_on_held_out_images(trained, root):
    settings, bundle, _ = trained
    test = load_source(settings, root).test
    model = build_classifier("shufflenet_v2", pretrained=False)
    model.load_state_dict(load(bundle.read("classifiers/shufflenet_v2.safetensors")))
    predicted = probabilities(model.eval(), test.images).double().numpy()
    labels = test.labels.numpy()
    facts = bundle.manifest.facts["classifiers"]["shufflenet_v2"]
    assert facts["metrics"]["auroc"] == pytest.approx(roc_auc_score(labels, predicted))
    below = (predicted[labels == 0] < facts["threshold_at_specificity_90"]).mean()
    assert below >= 0.9


def test_progress_is_told_for_each_part(trained):
    _, _, seen = trained
    progress = {e["task"]: e for e in seen if e["event"] == "progress"}
    assert set(progress) == {"read source data", "train shufflenet_v2", "diffusion"}
    assert all(e["done"] == e["total"] for e in progress.values())


def test_nothing_but_the_bundle_is_left(trained):
    _, bundle, _ = trained
    assert sorted(p.name for p in bundle.folder.iterdir()) == [
        "blobs",
        "manifest.json",
        "manifest.sig",
    ]
    assert sorted(bundle.manifest.blobs) == sorted(
        p.name for p in (bundle.folder / "blobs").iterdir()
    )


def test_a_finished_bundle_is_kept_as_it_is(trained, root):
    settings, bundle, _ = trained
    seen = []
    train_source(settings, root, bundle.folder, KEY, Events(listeners=[seen.append]))
    assert Bundle.open(bundle.folder).id == bundle.id
    assert not any(e.get("task", "").startswith("train") for e in seen)


@pytest.mark.parametrize("what", ["manifest.json", "manifest.sig", "blobs"])
def test_a_changed_bundle_is_an_error_and_stays(trained, root, tmp_path, what):
    settings, bundle, _ = trained
    copy = shutil.copytree(bundle.folder, tmp_path / "bundle")
    path = copy / what if what != "blobs" else sorted((copy / "blobs").iterdir())[0]
    changed = path.read_bytes()[:-2] + b"xx"
    path.write_bytes(changed)
    with pytest.raises(BundleError, match=r"not as it was signed .* delete the folder"):
        train_source(settings, root, copy, KEY)
    assert path.read_bytes() == changed


def test_the_bundle_names_no_image_and_no_patient(trained):
    _, bundle, _ = trained
    text = (bundle.folder / "manifest.json").read_text()
    assert ".png" not in text and '"p1"' not in text and "set" not in json.loads(text)["files"]


def unit_clusters(sizes, dimension=16, spread=0.05):
    generator = torch.Generator().manual_seed(1)
    directions = torch.linalg.qr(torch.randn(dimension, len(sizes), generator=generator))[0].T
    points = [
        d + spread * torch.randn(n, dimension, generator=generator)
        for d, n in zip(directions, sizes, strict=True)
    ]
    return torch.cat(points), directions


def test_kmeans_finds_separate_clusters():
    points, directions = unit_clusters([30, 20, 10, 40])
    unit = torch.nn.functional.normalize(points, dim=1)
    centroids, counts = spherical_kmeans(unit, 4, seed=0)
    assert sorted(counts.tolist()) == [10, 20, 30, 40]
    assert ((centroids @ directions.T).amax(1) > 0.99).all()
    assert torch.allclose(centroids.norm(dim=1), torch.ones(4))


def test_no_disclosed_centroid_stands_for_fewer_than_five_images():
    points, _ = unit_clusters([30, 20, 1, 4])
    statistics = feature_statistics(points, seed=0)
    assert sorted(statistics["counts"].tolist()) == [20, 30]
    similarity = statistics["centroids"] @ torch.nn.functional.normalize(points[50:], dim=1).T
    assert similarity.max() < 0.5
    assert feature_statistics(points[: SMALLEST - 1], seed=0) == {}


def test_shipped_statistics_match_the_features(trained):
    _, bundle, _ = trained
    arrays = from_bytes(bundle.read("source/shufflenet_v2.safetensors")).arrays
    assert np.allclose(np.linalg.norm(arrays["centroids"], axis=1), 1, atol=1e-6)
    assert arrays["counts"].min() >= SMALLEST
    assert arrays["similarity_histogram"].shape == (100,)
    assert arrays["similarity_histogram"].sum() + 12 == pytest.approx(48, abs=4)
    assert 0 < np.linalg.norm(arrays["mean"]) <= 1 + 1e-6


def test_unknown_names_are_refused_with_a_hint(tmp_path):
    path = tmp_path / "source.toml"
    path.write_text('name = "x"\nclasifiers = ["resnet18"]\n[data]\nkind = "table"\n')
    with pytest.raises(ConfigurationError, match="did you mean 'classifiers'"):
        read_source(path)
    path.write_text('name = "x"\nclassifiers = ["resnet19"]\n[data]\nkind = "table"\n')
    with pytest.raises(ConfigurationError, match="resnet18"):
        read_source(path)
    path.write_text('name = "x"\n[data]\nkind = "table"\n[diffusion]\nkind = "sd15"\n')
    with pytest.raises(ConfigurationError, match="biomedclip"):
        read_source(path)


TOML = """
name = "trial"
seed = 3
image_size = 32
classifiers = ["shufflenet_v2"]
threads = 1

[data]
kind = "table"
path = "set"
test_fraction = 0.25

[training]
epochs = 4
batch_size = 8

[diffusion]
kind = "none"
"""


@pytest.fixture(scope="module")
def toml(root):
    path = root / "source.toml"
    path.write_text(TOML)
    return path


def start(toml, out, key):
    main = "from sonofed_server.cli import app; app()"
    arguments = ["source", "train", str(toml), "--out", str(out), "--key", str(key)]
    paths = os.pathsep.join(str(p) for p in sys.path if p)
    return subprocess.Popen(
        [sys.executable, "-c", main, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(root, toml, tmp_path):
    interrupted, whole = tmp_path / "interrupted", tmp_path / "whole"
    process = start(toml, interrupted, tmp_path / "key.pem")
    try:
        for line in process.stderr:
            event = json.loads(line)
            if event.get("task") == "train shufflenet_v2" and event["epoch"] == 3:
                break
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    assert not (interrupted / "manifest.json").exists()
    assert list(interrupted.glob("checkpoints/*/shufflenet_v2.safetensors"))

    seen = []
    key = load_or_create_signing_key(tmp_path / "key.pem")
    settings = read_source(toml)
    train_source(settings, root, interrupted, key, Events(listeners=[seen.append]))
    epochs = {event.get("epoch") for event in seen}
    assert 4 in epochs and 1 not in epochs

    train_source(settings, root, whole, key)
    first, second = Bundle.open(interrupted), Bundle.open(whole)
    assert first.paths == second.paths
    weights, statistics = first.paths
    assert first.manifest.files[weights] == second.manifest.files[weights]
    assert first.manifest.facts == second.manifest.facts
    digests = {from_bytes(bundle.read(statistics)).digest() for bundle in (first, second)}
    assert len(digests) == 1


def invoke(toml, out, *more):
    key = toml.parent / "key.pem"
    arguments = ["source", "train", str(toml), "--out", str(out), "--key", str(key), *more]
    return CliRunner().invoke(app, arguments)


def test_command_prints_the_bundle_and_the_key_to_trust(toml, tmp_path):
    done = invoke(toml, tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    assert str(tmp_path / "out") in done.stdout
    Bundle.open(tmp_path / "out", public_key=done.stdout.split()[-1])
    assert all(json.loads(line)["event"] for line in done.stderr.splitlines())


def test_command_fails_with_one_sentence_and_the_catalogues_exit_code(toml, tmp_path):
    write_set(tmp_path / "set", labels=("malignant",))
    failed = invoke(toml, tmp_path / "out", "--data", str(tmp_path))
    assert failed.exit_code == OneClassError.exit_code
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("error: the training part") and last.endswith("[one-class]")

    missing = invoke(toml, tmp_path / "out", "--data", str(tmp_path / "nowhere"))
    assert missing.exit_code == DataMissingError.exit_code
    unknown = invoke(tmp_path / "none.toml", tmp_path / "out")
    assert unknown.exit_code == ConfigurationError.exit_code
    assert not (tmp_path / "out" / "manifest.json").exists()
