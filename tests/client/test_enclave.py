import csv
import shutil

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image
from safetensors.torch import save

from sonofed_client.adaptation.evaluation import evaluate
from sonofed_client.adaptation.pretraining import PretrainingModel
from sonofed_client.adaptation.ranking import keys
from sonofed_client.app import SITES_VARIABLE
from sonofed_client.enclave.enclave import HANDLERS, InProcessEnclave
from sonofed_client.enclave.handlers import reconstruction
from sonofed_client.enclave.intake import take_in
from sonofed_client.enclave.policy import STANDARD
from sonofed_client.enclave.site import load_weights, weights_of
from sonofed_client.enclave.starts import start_of
from sonofed_client.enclave.store import Store
from sonofed_client.settings import SiteData, SiteSettings, read_site
from sonofed_common.contract import actions
from sonofed_common.contract.actions import ACTIONS, request
from sonofed_common.contract.bundle import Bundle, BundleWriter
from sonofed_common.contract.errors import (
    BundleError,
    ConfigurationError,
    DataMissingError,
    DataUnreadableError,
    DivergenceError,
    OneClassError,
    OrderError,
    ParameterError,
    SiteEmptyError,
    UnknownActionError,
)
from sonofed_common.contract.recorddict import from_recorddict, to_recorddict
from sonofed_common.contract.records import Records, to_bytes
from sonofed_common.contract.results import SEGMENTATION_METRICS
from sonofed_common.contract.selection import WHOLE
from sonofed_common.contract.study import (
    Embedding,
    Finetuning,
    Infusion,
    Pretraining,
    PseudoLabels,
    Reconstruction,
    Selection,
)
from sonofed_common.models.encoders import build_encoder
from sonofed_common.models.segmenter import build_segmenter
from sonofed_common.security import load_or_create_signing_key, public_hex
from sonofed_simulations.engines.inline import InlineGrid
from sonofed_simulations.phantoms.dataset import write_dataset
from sonofed_simulations.phantoms.scanner import SCANNERS

IMAGES = 20
COMMON = {"study": "trial", "seed": 3}
NETWORK = "shufflenet_v2"
SEGMENTATION = {"train.pretrain", "train.segmenter", "train.ensemble", "evaluate.segmenter"}
WHOLE_POOL = np.array([[2**63, 0]], dtype=np.uint64)
NO_CUTS = np.empty((0, 2), dtype=np.uint64)


@pytest.fixture(scope="session")
def hospital(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hospital") / "north"
    return write_dataset(folder, SCANNERS["riverside"], IMAGES, 5, 64, 0.4)


@pytest.fixture(scope="session")
def bundle(laboratory):
    return Bundle.open(laboratory.prepare_source())


@pytest.fixture(scope="session")
def coordinator(laboratory):
    return load_or_create_signing_key(laboratory.key)


@pytest.fixture
def site(tmp_path, hospital, coordinator):
    data = SiteData(kind="table", path=hospital, test_fraction=0.4)
    return SiteSettings(
        name="north",
        store=tmp_path / "store",
        data=data,
        coordinator_key=public_hex(coordinator),
        auto_approve=(public_hex(coordinator),),
        oracle=True,
        threads=1,
    )


@pytest.fixture
def own(site, hospital, tmp_path):
    """Settings over a copy of the data that a test may spoil."""
    copy = shutil.copytree(hospital, tmp_path / "copy")
    return site.model_copy(update={"data": site.data.model_copy(update={"path": copy})})


def rewrite(folder, change):
    with (folder / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in map(change, rows) if row is not None]
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["image", "mask", "label", "patient", "device"])
        writer.writeheader()
        writer.writerows(rows)


def signed(bundle):
    return {
        name: np.frombuffer((bundle.folder / f"manifest.{end}").read_bytes(), dtype=np.uint8)
        for name, end in (("manifest", "json"), ("signature", "sig"))
    }


def blobs(bundle):
    return {d: np.frombuffer(bundle.blob(d), dtype=np.uint8) for d in bundle.manifest.blobs}


def install(enclave, bundle):
    message = request(actions.Install(**COMMON), **signed(bundle), blobs=blobs(bundle))
    return enclave.perform("train.install", message)


def pooled(bundle):
    return {**COMMON, "bundle": bundle.id, "image_size": 32}


def encode(bundle):
    return {
        **pooled(bundle),
        "classifier": NETWORK,
        "pairs": "reconstruction",
        "settings": Embedding(dimension=8, rounds=1),
        "reconstruction": Reconstruction(steps=1),
    }


def conversation(bundle, selection):
    """The requests of a whole study of one site, each made from the reply before it."""
    reply = yield "query.describe", request(actions.Describe(**COMMON, study_digest="0" * 64))
    reply = yield "query.missing", request(actions.Missing(**COMMON), **signed(bundle))
    yield (
        "train.install",
        request(actions.Install(**COMMON), **signed(bundle), blobs=blobs(bundle)),
    )
    redraw = actions.Reconstruct(**pooled(bundle), settings=Reconstruction(steps=1))
    reply = yield "train.reconstruct", request(redraw)
    assert reply.config["state"] == "done"
    reply = yield "train.embed", request(actions.Embed(**encode(bundle), round=0))
    student = reply.group("student")
    ask = actions.Cluster(**encode(bundle))
    reply = yield "query.cluster", request(ask, student=student)
    centroids = np.eye(2, 8, dtype=reply.arrays["sum"].dtype)
    yield "query.cluster", request(ask, centroids=centroids)
    scoring = actions.Score(**encode(bundle), selection=selection)
    yield "train.score", request(scoring, centroids=centroids)
    for column in ("uncertainty", "informativeness"):
        question = actions.Histogram(**COMMON, column=column, split=8)
        yield "query.histogram", request(question, edges=WHOLE[column], cuts=NO_CUTS)
    yield "train.select", request(actions.Select(**COMMON, stage="mark"), cuts=WHOLE_POOL)
    yield "query.annotations", request(actions.Annotations(**COMMON))
    yield "train.classifier", request(fine_tuning(bundle))
    yield "evaluate.classifier", request(evaluation(bundle))


def fine_tuning(bundle, **changes):
    settings = Finetuning(rounds=1, local_epochs=1)
    values = {"classifier": NETWORK, "round": 0, "budget": 0, "settings": settings} | changes
    return actions.TrainClassifier(**pooled(bundle), **values)


def evaluation(bundle, **changes):
    values = {"classifier": NETWORK, "batch_norm": "site", "replicates": 20} | changes
    return actions.EvaluateClassifier(**pooled(bundle), **values)


RADIANS = Selection(combine="radians", budgets=(1.0,))


def talk(enclave, bundle, selection=RADIANS):
    script, replies = conversation(bundle, selection), []
    action, message = next(script)
    while True:
        replies.append((action, enclave.perform(action, message)))
        try:
            action, message = script.send(replies[-1][1])
        except StopIteration:
            return replies


def test_description_rounds_its_counts(site):
    enclave = InProcessEnclave(site)
    reply = enclave.perform(
        "query.describe", request(actions.Describe(**COMMON, study_digest="7" * 64))
    )
    assert reply.config["site"] == "north" and reply.config["study"] == "7" * 64
    store = Store(site.store)
    assert len(store.images()) == IMAGES
    for part, count in reply.metrics.items():
        assert count % 10 == 0 and count > 0 and abs(count - len(store.images(part))) < 10


def test_every_action_has_a_handler_and_nothing_else_is_done(site):
    assert HANDLERS.keys() == ACTIONS.keys()
    enclave = InProcessEnclave(site)
    with pytest.raises(UnknownActionError):
        enclave.perform("query.images", request(actions.Annotations(**COMMON)))
    with pytest.raises(ParameterError, match="study_digest"):
        enclave.perform("query.describe", Records(config=COMMON))


def test_no_name_patient_or_image_id_is_in_any_reply(site, bundle):
    replies = talk(InProcessEnclave(site), bundle)
    assert {action for action, _ in replies} == set(ACTIONS) - SEGMENTATION
    rows = Store(site.store).images()
    secrets = {text for row in rows for text in (row.id, row.name, row.group)}
    secrets |= {str(site.data.path), str(site.store)}
    assert len(secrets) > IMAGES
    for action, reply in replies:
        sent = to_bytes(reply)
        # Ids are also searched as the 64-bit numbers that they are.
        keys = {int(row.id, 16).to_bytes(8, end) for row in rows for end in ("little", "big")}
        found = [s for s in {*(text.encode() for text in secrets), *keys} if s in sent]
        assert not found, action
        assert not reply.arrays.keys() & {"embedding", "representativeness", "image", "pixels"}


@pytest.fixture(scope="session")
def segmenters(coordinator, bundle, tmp_path_factory):
    """A bundle of two branches; their range of foreground lets every round through."""
    provenance = bundle.manifest.provenance
    folder = tmp_path_factory.mktemp("segmenters") / "branches"
    writer = BundleWriter(folder, name="branches", kind="source", provenance=provenance)
    for seed, name in enumerate(BRANCHES):
        model = build_segmenter("unet", 2, 32, pretrained=False, seed=seed)
        weights = {k: tensor.contiguous() for k, tensor in model.state_dict().items()}
        writer.add(f"segmenters/{name}.safetensors", save(weights))
    writer.facts["segmentation"] = {
        "encoder": "unet",
        "classes": 2,
        "heads": ["unet", "aspp"],
        "class_ratio": [0.9, 0.1],
        "foreground_range": [0.0, 1.0],
        "flips": True,
    }
    return writer.sign(coordinator)


def pretraining(bundle, **changes):
    settings = Pretraining(patch_size=8, rounds=2, local_epochs=1)
    return actions.Pretrain(**pooled(bundle), **{"round": 0, "settings": settings} | changes)


def adaptation(bundle, **changes):
    values = {"branch": "source", "round": 0, "settings": PseudoLabels(strategy="tent")}
    return actions.TrainSegmenter(**pooled(bundle), **values | changes)


def mask_evaluation(bundle, **changes):
    infusion = Infusion(calibration="consensus")
    values = {"branches": BRANCHES, "infusion": infusion, "replicates": 20} | changes
    return actions.EvaluateSegmenter(**pooled(bundle), **values)


def talk_of_masks(enclave, bundle):
    """Replies to every action on segmenters, second rounds from the weights of the first."""
    install(enclave, bundle)
    replies = []
    for action, make in (("train.pretrain", pretraining), ("train.segmenter", adaptation)):
        reply = enclave.perform(action, request(make(bundle)))
        weights = reply.group("weights")
        again = enclave.perform(action, request(make(bundle, round=1), weights=weights))
        replies += [(action, reply), (action, again)]
    consensus = actions.TrainEnsemble(**pooled(bundle), branches=BRANCHES)
    reply = enclave.perform("train.ensemble", request(consensus))
    temperatures = np.exp(reply.arrays["log_temperatures"])
    ask = request(mask_evaluation(bundle), temperatures=temperatures)
    return [
        *replies,
        ("train.ensemble", reply),
        ("evaluate.segmenter", enclave.perform("evaluate.segmenter", ask)),
    ]


BRANCHES = ("source", "target")
MASK_REPLIES = {
    "train.pretrain": ("weights/", {"loss", "mim", "contrastive"}),
    "train.segmenter": ("weights/", {"loss", "foreground", "kept"}),
    "train.ensemble": ("log_temperatures", set()),
    "evaluate.segmenter": (
        "",
        {f"{name}{end}" for name in SEGMENTATION_METRICS for end in ("", "_low", "_high")},
    ),
}
"""Start of the names of the arrays and names of the metrics: all that a reply holds."""


def secrets_of(site):
    """What may not leave a site, as bytes: names, ids, patients, paths and rows of pixels."""
    rows = Store(site.store).images()
    found = {t.encode() for row in rows for t in (row.id, row.name, row.group)}
    found |= {str(site.data.path).encode(), str(site.store).encode()}
    found |= {int(row.id, 16).to_bytes(8, end) for row in rows for end in ("little", "big")}
    kept = Store(site.store).get("pixels/32")
    for image in kept.arrays["pixels"] if kept else ():
        line = max(image[0], key=lambda pixels: len(np.unique(pixels)))
        if len(np.unique(line)) > 16:
            found |= {line.tobytes(), (line / np.float32(255)).tobytes()}
    return found


def test_replies_about_segmenters_hold_weights_and_means_alone(site, segmenters, caplog):
    caplog.set_level("DEBUG")
    replies = talk_of_masks(InProcessEnclave(site), segmenters)
    assert {action for action, _ in replies} == SEGMENTATION == set(MASK_REPLIES)
    secrets = secrets_of(site)
    assert len(secrets) > 5 * IMAGES
    for action, reply in replies:
        start, metrics = MASK_REPLIES[action]
        assert set(reply.config) == {"examples"} and set(reply.metrics) == metrics, action
        assert all(start and name.startswith(start) for name in reply.arrays), action
        sent = to_bytes(reply)
        assert not [secret for secret in secrets if secret in sent], action
    networks = {
        "train.pretrain": PretrainingModel(
            build_encoder("unet", False), pretraining(segmenters).settings, 32
        ),
        "train.segmenter": build_segmenter("unet", 2, 32, pretrained=False),
    }
    for action, reply in replies:
        if action in networks:
            state = networks[action].state_dict()
            shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
            assert {n: a.shape for n, a in reply.group("weights").items()} == shapes
    log = caplog.text.encode()
    assert not [secret for secret in secrets if secret in log]


def with_second_class(folder):
    """Give every mask a class that the segmenters do not know."""
    for path in (folder / "masks").iterdir():
        mask = Image.fromarray((np.asarray(Image.open(path)) > 0).astype(np.uint8) * 2)
        mask.putpalette(bytes(range(256)) * 3)
        mask.save(path)


def spoilt(kind, bundle):
    if kind == "weights":
        return "train.segmenter", request(adaptation(bundle), weights={"x": np.zeros(3)})
    if kind == "branch":
        return "train.segmenter", request(adaptation(bundle, branch="target-south"))
    return "evaluate.segmenter", request(mask_evaluation(bundle))


@pytest.mark.parametrize(
    ("kind", "error", "spoil"),
    [
        ("classes", ParameterError, with_second_class),
        ("weights", ParameterError, None),
        ("branch", ParameterError, None),
    ],
)
def test_errors_about_segmenters_hold_nothing_of_an_image(own, segmenters, kind, error, spoil):
    if spoil is not None:
        spoil(own.data.path)
    enclave = InProcessEnclave(own)
    install(enclave, segmenters)
    action, message = spoilt(kind, segmenters)
    with pytest.raises(error) as found:
        enclave.perform(action, message)
    assert not [secret for secret in secrets_of(own) if secret in found.value.message.encode()]


def test_counts_are_of_the_pool_and_of_whole_images(site, bundle):
    replies = talk(InProcessEnclave(site), bundle)
    pool = len(Store(site.store).images("pool"))
    for action, reply in replies:
        if action == "query.histogram":
            assert reply.arrays["counts"].dtype == np.int64 and reply.arrays["counts"].sum() == pool
    answers = dict(replies)
    assert answers["train.select"].config == {"selected": [pool]}
    assert answers["query.annotations"].metrics == {"done": pool, "total": pool}
    assert answers["train.classifier"].config == {"examples": pool}


def test_a_phase_before_what_it_needs_is_refused(site, bundle):
    enclave = InProcessEnclave(site)
    redraw = request(actions.Reconstruct(**pooled(bundle), settings=Reconstruction()))
    with pytest.raises(OrderError, match="ship"):
        enclave.perform("train.reconstruct", redraw)
    install(enclave, bundle)
    early = [
        ("train.embed", request(actions.Embed(**encode(bundle), round=0)), "reconstructions"),
        (
            "query.cluster",
            request(actions.Cluster(**encode(bundle)), centroids=np.eye(2, 8)),
            "embedding",
        ),
        (
            "train.score",
            request(actions.Score(**encode(bundle), selection=RADIANS), centroids=np.eye(2, 8)),
            "embedding",
        ),
        (
            "query.histogram",
            request(
                actions.Histogram(**COMMON, column="uncertainty", split=2),
                edges=WHOLE["uncertainty"],
                cuts=NO_CUTS,
            ),
            "scores",
        ),
        ("train.select", request(actions.Select(**COMMON, stage="mark"), cuts=NO_CUTS), "scores"),
        ("query.annotations", request(actions.Annotations(**COMMON)), "selection"),
        ("train.classifier", request(fine_tuning(bundle)), "selection"),
    ]
    for action, message, what in early:
        with pytest.raises(OrderError, match=what):
            enclave.perform(action, message)


def test_a_blob_that_was_tampered_with_is_refused_and_not_kept(site, bundle):
    enclave = InProcessEnclave(site)
    content = blobs(bundle)
    digest = max(content, key=lambda d: content[d].nbytes)
    content[digest] = content[digest].copy()
    content[digest][-1] ^= 1
    message = request(actions.Install(**COMMON), **signed(bundle), blobs=content)
    with pytest.raises(BundleError, match="damaged"):
        enclave.perform("train.install", message)
    reply = enclave.perform("query.missing", request(actions.Missing(**COMMON), **signed(bundle)))
    assert digest in reply.config["missing"]
    assert install(enclave, bundle).config == {"installed": bundle.id, "missing": []}


def test_a_manifest_that_was_tampered_with_is_refused(site, bundle):
    enclave = InProcessEnclave(site)
    parts = signed(bundle)
    changed = parts["manifest"].tobytes().replace(b'"image_size":32', b'"image_size":64')
    assert changed != parts["manifest"].tobytes()
    parts["manifest"] = np.frombuffer(changed, dtype=np.uint8)
    for action, parameters in (
        ("query.missing", actions.Missing(**COMMON)),
        ("train.install", actions.Install(**COMMON)),
    ):
        with pytest.raises(BundleError, match="signature"):
            enclave.perform(action, request(parameters, **parts))
        with pytest.raises(ParameterError, match="send both"):
            enclave.perform(action, request(parameters, manifest=parts["manifest"]))


def test_a_bundle_of_another_key_or_a_stranger_blob_is_refused(site, bundle, tmp_path):
    enclave = InProcessEnclave(site)
    provenance = bundle.manifest.provenance
    writer = BundleWriter(tmp_path / "b", name="other", kind="source", provenance=provenance)
    writer.add("a", b"a")
    foreign = writer.sign(Ed25519PrivateKey.generate())
    with pytest.raises(BundleError, match="another key"):
        install(enclave, foreign)
    stranger = {"0" * 64: np.zeros(3, dtype=np.uint8)}
    with pytest.raises(BundleError, match="not part"):
        enclave.perform(
            "train.install",
            request(actions.Install(**COMMON), **signed(bundle), blobs=stranger),
        )
    assert Store(site.store).names("b") == set()


def test_a_bundle_counts_as_installed_once_it_is_whole(site, bundle):
    enclave = InProcessEnclave(site)
    content = blobs(bundle)
    last = sorted(content)[-1]
    part = {d: b for d, b in content.items() if d != last}
    reply = enclave.perform(
        "train.install", request(actions.Install(**COMMON), **signed(bundle), blobs=part)
    )
    assert reply.config == {"installed": None, "missing": [last]}
    with pytest.raises(OrderError):
        enclave.perform("evaluate.classifier", request(evaluation(bundle)))
    reply = enclave.perform(
        "train.install",
        request(actions.Install(**COMMON), **signed(bundle), blobs={last: content[last]}),
    )
    assert reply.config == {"installed": bundle.id, "missing": []}
    assert (
        enclave.perform("evaluate.classifier", request(evaluation(bundle))).config["examples"] > 0
    )


@pytest.mark.parametrize("per_class", [4, 5])
def test_a_test_over_few_images_of_a_class_tells_no_metric(own, bundle, per_class):
    own = own.model_copy(update={"data": own.data.model_copy(update={"test_fraction": 0.5})})
    rows = iter(range(4 * per_class))

    def balanced(row):
        number = next(rows, None)
        return None if number is None else {**row, "label": number % 2, "patient": number}

    rewrite(own.data.path, balanced)
    enclave = InProcessEnclave(own)
    install(enclave, bundle)
    reply = enclave.perform("evaluate.classifier", request(evaluation(bundle)))
    assert reply.config == {"examples": 2 * per_class}
    assert reply.metrics["images"] == 2 * per_class
    assert ("auroc" in reply.metrics) == (len(reply.metrics) > 1) == (per_class == 5)


def test_a_repeated_job_gives_its_first_reply_without_training(site, bundle, monkeypatch):
    enclave = InProcessEnclave(site)
    first = {a: to_bytes(r) for a, r in talk(enclave, bundle) if a in JOB_REQUESTS}

    def untouched(*_):
        raise AssertionError("the job ran again")

    for action in JOB_REQUESTS:
        monkeypatch.setitem(HANDLERS, action, untouched)
    again = InProcessEnclave(site)
    for action, make in JOB_REQUESTS.items():
        assert to_bytes(again.perform(action, request(make(bundle)))) == first[action]
    with pytest.raises(AssertionError, match="ran again"):
        again.perform("evaluate.classifier", request(evaluation(bundle, batch_norm="global")))


JOB_REQUESTS = {
    "train.embed": lambda bundle: actions.Embed(**encode(bundle), round=0),
    "train.classifier": fine_tuning,
    "evaluate.classifier": evaluation,
}


@pytest.mark.parametrize("action", ["train.embed", "train.classifier"])
def test_an_interrupted_training_goes_on_from_its_last_epoch(site, bundle, tmp_path, action):
    def make():
        if action == "train.classifier":
            return fine_tuning(bundle, settings=Finetuning(rounds=1, local_epochs=3))
        settings = Embedding(dimension=8, rounds=1, local_epochs=3)
        return actions.Embed(**encode(bundle) | {"settings": settings}, round=0)

    def opened(settings):
        enclave = InProcessEnclave(settings)
        talk(enclave, bundle)
        return enclave

    def interrupt(event):
        if event["event"] == "progress" and event.get("epoch") == 3:
            raise KeyboardInterrupt

    # The same key, for the ids' order is the images'.
    site = site.model_copy(update={"image_key": "0" * 64})
    enclave = opened(site)
    folder = site.store / "checkpoints"
    assert not list(folder.glob("*"))
    enclave.site.events.listeners.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        enclave.perform(action, request(make()))
    assert len(list(folder.iterdir())) == 1
    seen = []
    enclave.site.events.listeners[:] = [seen.append]
    resumed = enclave.perform(action, request(make()))
    assert {e["epoch"] for e in seen if e["event"] == "progress"} == {3}
    assert not list(folder.iterdir())
    other = opened(site.model_copy(update={"store": tmp_path / "other"}))
    assert to_bytes(resumed) == to_bytes(other.perform(action, request(make())))


@pytest.mark.parametrize("merge", ["fedavg", "fedema"])
def test_a_second_study_shares_jobs_unless_they_build_on_the_first(site, bundle, merge):
    enclave = InProcessEnclave(site)
    install(enclave, bundle)
    values = encode(bundle) | {
        "pairs": "augmentation",
        "settings": Embedding(dimension=8, rounds=2, merge=merge),
    }
    for study in ("first", "second"):
        enclave.perform("train.embed", request(actions.Embed(**values | {"study": study}, round=0)))
    store = Store(site.store)
    assert len(store.names("job/")) == {"fedavg": 1, "fedema": 2}[merge]
    kept = {"study/first/student/0000", "study/second/student/0000"} if merge == "fedema" else set()
    assert store.names("study/") == kept


def test_a_round_of_fedema_killed_before_its_result_was_kept_is_done_again_alike(site, bundle):
    enclave = InProcessEnclave(site)
    install(enclave, bundle)
    settings = Embedding(dimension=8, rounds=3, merge="fedema")
    values = encode(bundle) | {"pairs": "augmentation", "settings": settings}

    def round_of(number: int) -> bytes:
        return to_bytes(
            enclave.perform("train.embed", request(actions.Embed(**values, round=number)))
        )

    first = [round_of(0), round_of(1)]
    store = Store(site.store)
    store.remove("job/")
    assert round_of(1) == first[1]
    round_of(2)
    assert {name[-4:] for name in store.names("study/")} == {"0001", "0002"}


def test_rounds_of_fedema_that_are_asked_for_downwards_leave_few_students(site, bundle):
    enclave, store = InProcessEnclave(site), Store(site.store)
    install(enclave, bundle)
    settings = Embedding(dimension=8, rounds=7, merge="fedema")
    values = encode(bundle) | {"pairs": "augmentation", "settings": settings}
    for number in (6, 5, 4, 3, 2, 1):
        enclave.perform("train.embed", request(actions.Embed(**values, round=number)))
        kept = {name[-4:] for name in store.names("study/trial/student/")}
        # The last that was done stays, for the next round merges with it.
        assert kept == {f"{number:04d}", "0006"}


def test_a_job_of_other_labels_is_another_job(site, bundle):
    enclave = InProcessEnclave(site)
    talk(enclave, bundle)
    first = enclave.perform("train.classifier", request(fine_tuning(bundle)))
    store = Store(site.store)
    store.annotate([(i, 1 - y) for i, y in store.annotations().items()], "expert")
    second = enclave.perform("train.classifier", request(fine_tuning(bundle)))
    assert to_bytes(first) != to_bytes(second)


def test_another_key_gives_other_ids_of_the_same_images(site):
    taken = {}
    for key in ("0" * 64, "1" * 64, "0" * 64):
        store = Store(site.store)
        snapshot = take_in(site.model_copy(update={"image_key": key}), store)
        known = {image.name: image.id for image in store.images()}
        assert taken.setdefault(key, (snapshot, known)) == (snapshot, known)
    (first, ids), (second, others) = taken.values()
    assert first != second and ids.keys() == others.keys()
    assert not set(ids.values()) & set(others.values())


def test_two_sites_of_the_same_images_do_the_same(site, bundle, tmp_path):
    site = site.model_copy(update={"image_key": "0" * 64})
    twin = site.model_copy(update={"store": tmp_path / "twin"})
    first, second = (talk(InProcessEnclave(s), bundle) for s in (site, twin))
    assert [to_bytes(r) for _, r in first] == [to_bytes(r) for _, r in second]


@pytest.mark.parametrize(
    ("action", "make"),
    [
        ("train.classifier", lambda b: request(fine_tuning(b), weights={"w": np.ones(2)})),
        ("train.classifier", lambda b: request(fine_tuning(b, budget=1))),
        ("evaluate.classifier", lambda b: request(evaluation(b, classifier="densenet121"))),
        ("query.cluster", lambda b: request(actions.Cluster(**encode(b)))),
        ("query.cluster", lambda b: request(actions.Cluster(**encode(b)), centroids=np.eye(2, 9))),
        (
            "train.score",
            lambda b: request(
                actions.Score(**encode(b), selection=RADIANS), centroids=np.eye(2, 9)
            ),
        ),
        ("train.score", lambda b: request(actions.Score(**encode(b), selection=RADIANS))),
        ("train.select", lambda b: request(actions.Select(**COMMON, stage="mark"))),
        ("train.select", lambda b: request(actions.Select(**COMMON, stage="mark"), cuts=NO_CUTS)),
        (
            "query.histogram",
            lambda b: request(actions.Histogram(**COMMON, column="identity", split=2)),
        ),
        (
            "query.histogram",
            lambda b: request(
                actions.Histogram(**COMMON, column="identity", split=2),
                edges=WHOLE["identity"],
                cuts=NO_CUTS,
            ),
        ),
        (
            "train.select",
            lambda b: request(actions.Select(**COMMON, stage="mark"), cuts=np.array(np.uint64(1))),
        ),
        (
            "query.cluster",
            lambda b: request(actions.Cluster(**encode(b)), centroids=2 * np.eye(2, 8)),
        ),
        (
            "query.cluster",
            lambda b: request(
                actions.Cluster(**encode(b)), centroids=np.tile(np.eye(1, 8), (65, 1))
            ),
        ),
    ],
)
def test_records_that_do_not_fit_are_refused(talked, bundle, action, make):
    with pytest.raises(ParameterError):
        talked.perform(action, make(bundle))


@pytest.fixture(scope="module")
def talked(tmp_path_factory, hospital, bundle, coordinator):
    store = tmp_path_factory.mktemp("talked") / "store"
    data = SiteData(kind="table", path=hospital, test_fraction=0.4)
    key = public_hex(coordinator)
    enclave = InProcessEnclave(
        SiteSettings(
            name="north",
            store=store,
            data=data,
            coordinator_key=key,
            auto_approve=(key,),
            oracle=True,
            threads=1,
        )
    )
    talk(enclave, bundle)
    return enclave


def test_an_unknown_classifier_is_refused(talked, bundle):
    with pytest.raises((ParameterError, ConfigurationError), match="shufflenet_v2"):
        talked.perform(
            "evaluate.classifier", request(evaluation(bundle, classifier="shufflenetv2"))
        )


def test_pooled_ranks_that_do_not_fit_are_refused_and_not_kept(site, bundle):
    enclave = InProcessEnclave(site)
    talk(enclave, bundle)
    ranked = Selection(budgets=(1.0,))
    scoring = actions.Score(**encode(bundle), selection=ranked)
    enclave.perform("train.score", request(scoring, centroids=np.eye(2, 8)))
    one = {"starts": np.zeros(1, dtype=np.uint64), "cumulative": np.array([0, 12])}
    bad = [
        {},
        {"uncertainty/starts": one["starts"]},
        {
            f"{c}/{k}": v.astype(float)
            for c in ("uncertainty", "representativeness")
            for k, v in one.items()
        },
    ]
    for ranks in bad:
        with pytest.raises(ParameterError):
            enclave.perform(
                "train.select", request(actions.Select(**COMMON, stage="rank"), ranks=ranks)
            )
    question = actions.Histogram(**COMMON, column="uncertainty", split=2)
    reply = enclave.perform(
        "query.histogram", request(question, edges=WHOLE["uncertainty"], cuts=NO_CUTS)
    )
    assert reply.arrays["counts"].sum() == len(Store(site.store).images("pool"))


def test_the_ranks_of_a_selection_come_once(site, bundle):
    enclave = InProcessEnclave(site)
    talk(enclave, bundle)
    settings = Selection(combine="rank", budgets=(1.0,))
    scoring = request(actions.Score(**encode(bundle), selection=settings), centroids=np.eye(2, 8))

    def send(change):
        arrays = {}
        for column, scores in Store(site.store).get("study/trial/scores").arrays.items():
            starts, sizes = np.unique(keys(scores), return_counts=True)
            sizes[-1] += change
            cumulative = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
            arrays |= {f"{column}/starts": starts, f"{column}/cumulative": cumulative}
        message = request(actions.Select(**COMMON, stage="rank"), ranks=arrays)
        return enclave.perform("train.select", message)

    enclave.perform("train.score", scoring)
    for _ in range(2):
        send(0)
    with pytest.raises(ParameterError, match="score again"):
        send(1)
    enclave.perform("train.score", scoring)
    send(1)


def test_a_bundle_without_diffusion_says_so(site, bundle, coordinator, tmp_path):
    enclave = InProcessEnclave(site)
    provenance = bundle.manifest.provenance
    writer = BundleWriter(tmp_path / "b", name="bare", kind="source", provenance=provenance)
    writer.add("a", b"a")
    bare = writer.sign(coordinator)
    install(enclave, bare)
    with pytest.raises(ParameterError, match="no diffusion"):
        enclave.perform(
            "train.reconstruct",
            request(actions.Reconstruct(**pooled(bare), settings=Reconstruction())),
        )


def test_slices_do_not_change_reconstructions(site, bundle, tmp_path):
    site = site.model_copy(update={"image_key": "0" * 64})
    settings = Reconstruction(steps=1, batch_size=4)
    done = []
    for store, slice_seconds in (("whole", 60), ("slices", 1e-9)):
        enclave = InProcessEnclave(site.model_copy(update={"store": tmp_path / store}))
        install(enclave, bundle)
        ask = request(
            actions.Reconstruct(**pooled(bundle), settings=settings, slice_seconds=slice_seconds)
        )
        for _ in range(IMAGES):
            reply = enclave.perform("train.reconstruct", ask)
            if reply.config["state"] == "done":
                break
            assert 0 <= reply.config["done"] < reply.config["total"] and not reply.metrics
        done.append(to_bytes(reply))
    assert done[0] == done[1]


def test_old_reconstructions_go_but_none_of_the_pool_at_hand(site, bundle, monkeypatch):
    monkeypatch.setattr(reconstruction, "JOB_CACHE_BYTES", 0)
    enclave, store = InProcessEnclave(site), Store(site.store)
    install(enclave, bundle)
    pool = len(store.images("pool"))
    kept, models = set(), 8
    for guidance in range(models):
        settings = Reconstruction(steps=1, guidance=guidance)
        before = kept
        enclave.perform(
            "train.reconstruct", request(actions.Reconstruct(**pooled(bundle), settings=settings))
        )
        kept = store.names("reconstruction/")
        assert len(kept - before) == pool
    assert pool <= len(kept) < models * pool
    # The pool's images are a few bytes larger than their pixels, and floats four times as large.
    assert len(kept) >= 3 * pool


def test_old_embeddings_go(site, bundle, monkeypatch):
    monkeypatch.setattr(Store.trim, "__defaults__", (2000,))
    enclave, store = InProcessEnclave(site), Store(site.store)
    install(enclave, bundle)
    seen = set()
    for seed in range(4):
        values = encode(bundle) | {"pairs": "augmentation", "seed": seed}
        reply = enclave.perform("train.embed", request(actions.Embed(**values, round=0)))
        ask = request(actions.Cluster(**values), student=reply.group("student"))
        reply = enclave.perform("query.cluster", ask)
        seen |= store.names("embedding/")
        centroids = np.eye(2, 8, dtype=reply.arrays["sum"].dtype)
        again = enclave.perform(
            "query.cluster", request(actions.Cluster(**values), centroids=centroids)
        )
        assert again.arrays["counts"].sum() == reply.config["examples"]
    assert 1 <= len(store.names("embedding/")) < len(seen) == 4


def describe(enclave, digest):
    message = request(actions.Describe(**COMMON, study_digest=digest * 64))
    enclave.perform("query.describe", message)


def test_another_study_of_the_same_name_finds_nothing_of_the_first(site, bundle):
    enclave, store = InProcessEnclave(site), Store(site.store)
    talk(enclave, bundle)
    kept = store.names("study/trial/")
    assert {"study/trial/selected", "study/trial/embedding"} < kept
    store.put("study/trial-2/selected", Records(config={"ids": []}))
    describe(enclave, "0")
    assert store.names("study/trial/") == kept
    describe(enclave, "1")
    assert store.names("study/") == {"study/trial/digest", "study/trial-2/selected"}


def test_a_selection_that_begins_forgets_the_one_before(site, bundle):
    enclave = InProcessEnclave(site)
    talk(enclave, bundle)
    scoring = actions.Score(**encode(bundle), selection=RADIANS)
    enclave.perform("train.score", request(scoring, centroids=np.eye(2, 8)))
    with pytest.raises(OrderError, match="selection"):
        enclave.perform("query.annotations", request(actions.Annotations(**COMMON)))


@pytest.mark.parametrize("oracle", [True, False])
def test_an_oracle_is_not_waited_for_where_it_knows_no_label(own, bundle, oracle):
    own = own.model_copy(update={"oracle": oracle})
    forget_labels(own.data.path)
    enclave = InProcessEnclave(own)
    install(enclave, bundle)
    everything = Selection(strategy="random", scope="per_site", budgets=(1.0,))
    enclave.perform("train.score", request(actions.Score(**encode(bundle), selection=everything)))
    enclave.perform("train.select", request(actions.Select(**COMMON, stage="mark"), cuts=NO_CUTS))
    pool = Store(own.store).images("pool")
    known = sum(row.label is not None for row in pool)
    assert 0 < known < len(pool)
    reply = enclave.perform("query.annotations", request(actions.Annotations(**COMMON)))
    expected = (known, known) if oracle else (0, len(pool))
    assert (reply.metrics["done"], reply.metrics["total"]) == expected


def test_first_rounds_are_clipped_from_what_every_site_starts_with(site, bundle, tmp_path):
    clip = 1e-3
    policy = tmp_path / "policy.toml"
    text = STANDARD.read_text(encoding="utf-8")
    policy.write_text(text.replace("numbers = 80_000_000", f"numbers = 80_000_000, clip = {clip}"))
    enclave = InProcessEnclave(site.model_copy(update={"policy": policy}))
    install(enclave, bundle)
    embed = actions.Embed(**encode(bundle) | {"pairs": "augmentation"}, round=0)
    everything = Selection(strategy="random", scope="per_site", budgets=(1.0,))
    enclave.perform("train.score", request(actions.Score(**encode(bundle), selection=everything)))
    enclave.perform("train.select", request(actions.Select(**COMMON, stage="mark"), cuts=NO_CUTS))
    for action, parameters, group in (
        ("train.embed", embed, "student"),
        ("train.classifier", fine_tuning(bundle), "weights"),
    ):
        reply = enclave.perform(action, request(parameters)).group(group)
        start = Records(dict(start_of(enclave.site, parameters, request(parameters)))).group(group)
        floats = [n for n, a in start.items() if a.dtype.kind == "f"]
        change = sum(((reply[n].astype(float) - start[n]) ** 2).sum() for n in floats) ** 0.5
        # Changes this small lose up to some percent of themselves to float32.
        assert reply.keys() == start.keys() and 0.5 * clip < change < 1.5 * clip
        assert enclave.ledger.entries()[-1]["privacy"][f"{group}/* clip"] == clip


def intake(site):
    InProcessEnclave(site)
    return Store(site.store)


def test_no_patient_is_on_both_sides(site):
    store = intake(site)
    pool, test = ({row.group for row in store.images(part)} for part in ("pool", "test"))
    assert pool and test and not pool & test
    assert {row.label for row in store.images("test")} == {0, 1}


def test_a_corrupt_image_is_skipped_and_reported_on_site_only(own, bundle):
    bad = sorted((own.data.path / "images").glob("*.png"))[3]
    bad.write_bytes(bad.read_bytes()[:100])
    store = intake(own)
    assert len(store.images()) == IMAGES - 1
    assert f"images/{bad.name}" not in {row.name for row in store.images()}
    (skipped,) = store.get("intake").config["skipped"]
    assert skipped == {"name": f"images/{bad.name}", "reason": skipped["reason"]}
    assert skipped["reason"]


def test_intake_happens_once_and_again_for_other_settings(own):
    first = intake(own)
    rows = first.images()
    shutil.rmtree(own.data.path)
    assert intake(own).images() == rows
    other = own.model_copy(update={"data": own.data.model_copy(update={"split_seed": 1})})
    with pytest.raises(DataMissingError):
        intake(other)
    assert intake(own).images() == rows


def test_an_interrupted_intake_is_done_again(site, monkeypatch):
    rows = intake(site).images()
    other = site.model_copy(update={"data": site.data.model_copy(update={"split_seed": 1})})
    with monkeypatch.context() as interrupted:
        interrupted.setattr(Store, "put_bytes", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            intake(other)
    assert intake(site).images() == rows


def test_images_that_went_after_the_intake_are_missed(own, bundle):
    enclave = InProcessEnclave(own)
    install(enclave, bundle)
    next((own.data.path / "images").glob("*.png")).unlink()
    with pytest.raises(DataUnreadableError, match="intake"):
        enclave.perform("evaluate.classifier", request(evaluation(bundle)))


def test_a_missing_folder(own):
    shutil.rmtree(own.data.path)
    with pytest.raises(DataMissingError) as error:
        intake(own)
    assert error.value.exit_code == 10


def test_a_site_without_usable_images(own):
    rewrite(own.data.path, lambda row: {**row, "label": "normal"})
    with pytest.raises(SiteEmptyError, match="north") as error:
        intake(own)
    assert error.value.exit_code == 11


def test_a_site_whose_scanner_has_no_images(own):
    data = own.data.model_copy(update={"devices": ("absent",)})
    with pytest.raises(SiteEmptyError):
        intake(own.model_copy(update={"data": data}))


def test_a_table_without_images(own):
    rewrite(own.data.path, lambda row: None)
    with pytest.raises(SiteEmptyError):
        intake(own)


def test_one_class(own):
    rewrite(own.data.path, lambda row: row if row["label"] == "0" else None)
    with pytest.raises(OneClassError, match="north") as error:
        intake(own)
    assert error.value.exit_code == 12


def test_a_class_of_one_patient_cannot_be_tested(own):
    malignant = iter([{"label": "1", "patient": "only"}])

    def one_malignant_patient(row):
        return row if row["label"] == "0" else next(({**row, **m} for m in malignant), None)

    rewrite(own.data.path, one_malignant_patient)
    with pytest.raises(OneClassError, match="two patients"):
        intake(own)


def forget_labels(folder):
    """Take the label of every image but each patient's first."""
    seen = set()

    def forget(row):
        first = row["patient"] not in seen
        seen.add(row["patient"])
        return row if first else {**row, "label": ""}

    rewrite(folder, forget)


def test_unlabelled_images_join_the_pool_unless_their_patient_is_tested(own):
    lines = (own.data.path / "table.csv").read_text().splitlines()
    header = lines[0].split(",")
    rows = [dict(zip(header, line.split(","), strict=True)) for line in lines[1:]]
    images = {}
    for row in rows:
        images.setdefault(row["patient"], []).append(row["image"])
    assert any(len(names) > 1 for names in images.values())
    forget_labels(own.data.path)
    store = intake(own)
    held = store.images("test")
    tested = {row.group for row in held}
    assert {row.label for row in held} == {0, 1}
    pool = store.images("pool")
    assert {row.label for row in pool} == {0, 1, None}
    assert not tested & {row.group for row in pool}
    excluded = store.get("intake").config["excluded"]
    assert sum(excluded.values()) == len(rows) - len(pool) - len(held)


def test_images_left_out_are_counted(own):
    first = iter(["normal"])
    rewrite(own.data.path, lambda row: {**row, "label": next(first, row["label"])})
    assert intake(own).get("intake").config["excluded"] == {"normal, without a lesion": 1}


def test_an_image_replaced_under_its_name_is_another_image(own, bundle):
    enclave = InProcessEnclave(own)
    install(enclave, bundle)
    enclave.perform("evaluate.classifier", request(evaluation(bundle)))
    store = Store(own.store)
    before = {row.name: row.id for row in store.images()}
    name = store.images("test")[0].name
    other = next(n for n in before if n != name)
    (own.data.path / name).write_bytes((own.data.path / other).read_bytes())
    assert {row.name: row.id for row in intake(own).images()} == before
    take_in(own, store, again=True)
    after = {row.name: row.id for row in store.images()}
    assert {n for n in before if before[n] != after[n]} == {name}
    enclave.perform("evaluate.classifier", request(evaluation(bundle)))
    assert len(store.names("job/")) == 2
    rows = {row.name: row.position for row in store.images()}
    kept = store.get("pixels/32").arrays["pixels"]
    assert np.array_equal(kept[rows[name]], kept[rows[other]])


def test_an_image_that_changed_without_an_intake_is_noticed(own, bundle):
    enclave = InProcessEnclave(own)
    install(enclave, bundle)
    first, second, *_ = sorted((own.data.path / "images").glob("*.png"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(DataUnreadableError, match="intake"):
        enclave.perform("evaluate.classifier", request(evaluation(bundle)))


def test_weights_of_another_type_or_with_a_negative_variance_are_refused():
    model = torch.nn.BatchNorm1d(2)
    good = weights_of(model)
    load_weights(model, good)
    bad = {
        "weight": good["weight"].astype(np.float64),
        "running_var": np.array([1, -1], dtype=np.float32),
    }
    for name, array in bad.items():
        with pytest.raises(ParameterError):
            load_weights(model, {**good, name: array})


def test_predictions_that_are_no_numbers_are_a_divergence():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    torch.nn.init.constant_(model[1].bias, float("nan"))
    with pytest.raises(DivergenceError):
        evaluate(model, torch.zeros(2, 1, 2, 2), [0, 1], ["a", "b"], None, 0, 0)


def test_a_site_that_cannot_be_opened_keeps_its_paths(tmp_path, monkeypatch):
    missing = tmp_path / "secret-ward.toml"
    monkeypatch.setenv(SITES_VARIABLE, str(missing))
    grid = InlineGrid(1)
    content = to_recorddict(request(actions.Annotations(**COMMON)))
    (node,) = grid.get_node_ids()
    message = grid.create_message(content, "query.annotations", node, "0")
    (reply,) = grid.send_and_receive([message])
    assert from_recorddict(reply.content).config == {
        "error": "configuration",
        "message": "this site is not ready; its own log says why",
    }


def test_settings_are_read_strictly(tmp_path, site):
    path = tmp_path / "site.toml"
    text = f"""
name = "north"
store = "{site.store}"
coordinator_key = "{site.coordinator_key}"
auto_approve = ["{site.coordinator_key}"]
oracle = true
threads = 1
[data]
kind = "table"
path = "{site.data.path}"
test_fraction = 0.4
"""
    path.write_text(text)
    assert read_site(path) == site
    path.write_text(text.replace("test_fraction", "test_fractoin"))
    with pytest.raises(ConfigurationError, match="did you mean 'test_fraction'"):
        read_site(path)
    path.write_text(f'image_key = "secret"\n{text}')
    with pytest.raises(ConfigurationError, match="image_key"):
        read_site(path)
