import tomllib

import numpy as np
import pytest
import tomli_w
import torch
from enclave_talk import NETWORK, encode, evaluation, fine_tuning, install, talk
from sklearn.metrics import roc_auc_score

from sonofed_client.adaptation.evaluation import predict
from sonofed_client.adaptation.finetuning import finetune_round
from sonofed_client.enclave.enclave import HANDLERS, InProcessEnclave
from sonofed_client.enclave.handlers.selection import labelled
from sonofed_client.enclave.intake import take_in
from sonofed_client.enclave.policy import STANDARD as STANDARD_FILE
from sonofed_client.enclave.site import load_weights
from sonofed_client.enclave.starts import start_of
from sonofed_client.enclave.store import Store
from sonofed_common.batch_norm import layers_of
from sonofed_common.contract import actions
from sonofed_common.contract.actions import request
from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.records import Records, to_bytes
from sonofed_common.contract.study import Aggregation, Embedding, Finetuning
from sonofed_common.models.classifiers import build_classifier
from sonofed_common.runtime import derive_seed


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


def test_a_round_of_scaffold_goes_on_from_the_control_variate_of_the_one_before(site, bundle):
    enclave, store = InProcessEnclave(site), Store(site.store)
    talk(enclave, bundle)
    values = {
        "settings": Finetuning(rounds=4, local_epochs=1, batch_size=16, optimizer="sgd"),
        "aggregation": Aggregation(strategy="scaffold"),
    }

    def round_of(number):
        asked = fine_tuning(bundle, **values, round=number)
        return enclave.perform("train.classifier", request(asked))

    replies = [round_of(0), round_of(1)]
    assert replies[0].group("control").keys() < replies[0].group("weights").keys()
    own = store.get(f"study/trial/control/{NETWORK}/0/0001").arrays
    for name, array in own.items():
        both = [reply.group("control")[name] for reply in replies]
        np.testing.assert_allclose(array, both[0] + both[1], rtol=1e-4, atol=1e-5)
    store.remove("job/")
    assert to_bytes(round_of(1)) == to_bytes(replies[1])
    with pytest.raises(ParameterError, match="do not fit the model"):
        asked = request(fine_tuning(bundle, **values, round=2), control={"w": np.ones(2)})
        enclave.perform("train.classifier", asked)


LOCAL = Finetuning(rounds=2, local_epochs=1, batch_norm="local")


def test_fedbn_goes_on_from_the_layers_that_stayed(site, bundle):
    enclave, store = InProcessEnclave(site), Store(site.store)
    talk(enclave, bundle)
    model = build_classifier(NETWORK, pretrained=False)
    layers = layers_of(model)

    def round_of(number, **weights):
        asked = request(fine_tuning(bundle, settings=LOCAL, round=number), **weights)
        return enclave.perform("train.classifier", asked)

    def tested(weights):
        asked = evaluation(bundle, batch_norm="local", budget=0)
        # Behind the wall: so few test images let no metric leave.
        return HANDLERS["evaluate.classifier"](enclave.site, asked, request(asked, weights=weights))

    first = round_of(0).group("weights")
    assert first.keys() | layers == model.state_dict().keys() and not first.keys() & layers
    asked = fine_tuning(bundle, settings=LOCAL)
    # What a policy that clips compares with.
    assert (
        Records(start_of(enclave.site, asked, request(asked))).group("weights").keys()
        == first.keys()
    )
    own = store.get(f"study/trial/layers/{NETWORK}/0/0000").arrays
    assert own.keys() == layers
    # What other sites made of the shared weights.
    shared = {name: 0.9 * array for name, array in first.items()}
    second = round_of(1, weights=shared)

    rows, images = enclave.site.images("pool", 32)
    labels = labelled(enclave.site, "trial", 0)
    index = [n for n, row in enumerate(rows) if row.id in labels]
    targets = torch.tensor([labels[rows[n].id] for n in index])
    seed = derive_seed(3, "north", NETWORK, 0, 1)
    load_weights(model, {**shared, **own})
    torch.manual_seed(seed)
    finetune_round(model, images[index], targets, LOCAL, 1, seed)
    last = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    kept = store.get(f"study/trial/layers/{NETWORK}/0/0001").arrays
    for name, array in {**second.group("weights"), **kept}.items():
        np.testing.assert_array_equal(array, last[name])
    probabilities = predict(model.eval(), enclave.site.images("test", 32)[1])
    test_labels = [int(row.label == 1) for row in enclave.site.store.images("test")]
    found = tested(second.group("weights")).metrics
    assert found["auroc"] == pytest.approx(roc_auc_score(test_labels, probabilities))
    assert found["brier"] == pytest.approx(np.mean((probabilities - test_labels) ** 2))

    store.remove("job/")
    assert to_bytes(round_of(1, weights=shared)) == to_bytes(second)


def test_a_clip_bounds_the_change_of_a_control_variate(site, bundle, tmp_path):
    values = tomllib.loads(STANDARD_FILE.read_text())
    for array in values["actions"]["train.classifier"]["arrays"]:
        array["clip"] = 0.01
    own = tmp_path / "own.toml"
    own.write_text(tomli_w.dumps(values))
    enclave = InProcessEnclave(site.model_copy(update={"policy": own}))
    talk(enclave, bundle)
    asked = fine_tuning(
        bundle,
        settings=Finetuning(rounds=1, local_epochs=1, batch_size=16, optimizer="sgd"),
        aggregation=Aggregation(strategy="scaffold"),
    )
    reply = enclave.perform("train.classifier", request(asked))
    change = np.concatenate([array.ravel() for array in reply.group("control").values()])
    assert np.linalg.norm(change) == pytest.approx(0.01, rel=1e-3)


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
