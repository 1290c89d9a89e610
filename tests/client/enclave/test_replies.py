import numpy as np
import pytest
from enclave_talk import (
    BRANCHES,
    COMMON,
    IMAGES,
    evaluation,
    install,
    pooled,
    rewrite,
    secrets_of,
    talk,
)
from PIL import Image

from sonofed_client.adaptation.pretraining import PretrainingModel
from sonofed_client.enclave.enclave import HANDLERS, InProcessEnclave
from sonofed_client.enclave.store import Store
from sonofed_common.contract import actions
from sonofed_common.contract.actions import ACTIONS, request
from sonofed_common.contract.errors import ParameterError, UnknownActionError
from sonofed_common.contract.records import Records, to_bytes
from sonofed_common.contract.results import SEGMENTATION_METRICS
from sonofed_common.contract.study_segmentation import Infusion, Pretraining, PseudoLabels
from sonofed_common.models.encoders import build_encoder
from sonofed_common.models.segmenter import build_segmenter

SEGMENTATION = {"train.pretrain", "train.segmenter", "train.ensemble", "evaluate.segmenter"}


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
    assert {action for action, _ in replies} == set(ACTIONS) - SEGMENTATION - {"train.synthesise"}
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
