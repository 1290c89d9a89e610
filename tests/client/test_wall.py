import json
import sqlite3
import time

import numpy as np
import pytest
import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from sonofed_client.cli import app
from sonofed_client.enclave.forecast import asks
from sonofed_client.enclave.ledger import payload
from sonofed_client.enclave.policy import STANDARD, read_policy
from sonofed_client.enclave.store import open_store
from sonofed_client.enclave.wall import Wall, open_studies
from sonofed_client.settings import SiteData, SiteSettings
from sonofed_common.contract import actions
from sonofed_common.contract.actions import request
from sonofed_common.contract.errors import (
    ConfigurationError,
    LedgerError,
    ParameterError,
    PolicyError,
    StudyDeniedError,
    StudyWaitingError,
    UnknownActionError,
)
from sonofed_common.contract.records import Records
from sonofed_common.contract.study import Study
from sonofed_common.security import public_hex

KEY = public_hex(Ed25519PrivateKey.generate())
OTHER_KEY = public_hex(Ed25519PrivateKey.generate())
DESCRIPTION = Records(config={"site": "north"}, metrics={"pool": 20, "test": 10})
UPDATE = Records({"weights/w": np.ones(4, dtype=np.float32)}, {"examples": 30}, {"loss": 0.5})


def a_study(**values):
    cohort = {"sites": ["north"]}
    return Study(name="trial", seed=3, classifiers=("shufflenet_v2",), cohort=cohort, **values)


def describe(study, **changes):
    values = {"study": study.name, "seed": study.seed, "study_digest": study.digest()}
    return request(actions.Describe(**values, content=study, **changes))


def train(study, **changes):
    values = {
        "study": study.name,
        "seed": study.seed,
        "bundle": "0" * 64,
        "image_size": study.image_size,
        "classifier": "shufflenet_v2",
        "round": 0,
        "budget": 0,
        "settings": study.finetuning,
    }
    start = {"w": np.zeros(4, dtype=np.float32)}
    return request(actions.TrainClassifier(**values | changes), weights=start)


@pytest.fixture
def settings(tmp_path):
    data = SiteData(kind="table", path=tmp_path)
    return SiteSettings(name="north", store=tmp_path / "store", data=data, coordinator_key=KEY)


@pytest.fixture
def store(settings):
    return open_store(settings)


@pytest.fixture
def wall(settings, store):
    return Wall(settings, store)


def never(_):
    raise AssertionError("work was done")


def last(wall):
    """The latest entry that is no count of repetitions."""
    return [e for e in wall.ledger.entries() if not e["repeats"]][-1]


def tries(entries, outcome):
    return sum(max(1, e["repeats"]) for e in entries if e["outcome"] == outcome)


def approve(settings, study, ledger):
    open_studies(settings, ledger).approve(f"sha256:{study.digest()}")


def narrow(**changes):
    """The standard policy with other rules for training, and other budgets."""
    values = json.loads(read_policy(None).model_dump_json())
    values["actions"]["train.classifier"] |= changes.pop("rule", {})
    values["actions"]["train.classifier"]["arrays"][0] |= changes.pop("arrays", {})
    return read_policy(None).model_validate(values | changes)


def test_an_unknown_study_waits_until_a_person_approved_it(wall, settings):
    study = a_study()
    with pytest.raises(StudyWaitingError, match="enrol"):
        wall.perform("train.classifier", train(study), never)
    for _ in range(2):
        with pytest.raises(StudyWaitingError, match="approval"):
            wall.perform("query.describe", describe(study), never)
        with pytest.raises(StudyWaitingError, match="approval"):
            wall.perform("train.classifier", train(study), never)
    (known,) = open_studies(settings).known()
    assert known.content == study and known.state == "waiting"
    approve(settings, study, wall.ledger)
    assert wall.perform("query.describe", describe(study), lambda _: DESCRIPTION) == DESCRIPTION
    assert wall.perform("train.classifier", train(study), lambda _: UPDATE) == UPDATE
    entries = wall.ledger.entries()
    assert tries(entries, "refused") == 5 and tries(entries, "sent") == 2
    sent = next(e for e in reversed(entries) if e["outcome"] == "sent")
    assert (sent["study"], sent["study_digest"]) == ("trial", study.digest())
    assert sent["records"][0] == ["weights/w", "float32", [4]] and sent["round"] == 0
    assert sent["rule"] == "actions.train.classifier" and len(sent["sha256"]) == 64
    assert sent["bytes"] > UPDATE.nbytes and wall.ledger.verify() == len(entries)


def test_a_denied_study_is_refused_also_if_it_was_approved(wall, settings):
    study = a_study()
    with pytest.raises(StudyWaitingError):
        wall.perform("query.describe", describe(study), never)
    approve(settings, study, wall.ledger)
    wall.perform("query.describe", describe(study), lambda _: DESCRIPTION)
    open_studies(settings, wall.ledger).deny("trial")
    for action, message in (
        ("query.describe", describe(study)),
        ("train.classifier", train(study)),
    ):
        with pytest.raises(StudyDeniedError):
            wall.perform(action, message, never)
        assert last(wall)["outcome"] == "refused"


def test_another_content_of_the_name_waits_and_the_approved_one_goes_on(wall, settings):
    study, longer = a_study(), a_study(finetuning={"local_epochs": 50})
    with pytest.raises(StudyWaitingError):
        wall.perform("query.describe", describe(study), never)
    approve(settings, study, wall.ledger)
    wall.perform("query.describe", describe(study), lambda _: DESCRIPTION)
    with pytest.raises(StudyWaitingError):
        wall.perform("query.describe", describe(longer), never)
    wall.perform("train.classifier", train(study), lambda _: UPDATE)
    with pytest.raises(StudyDeniedError, match="settings"):
        wall.perform("train.classifier", train(longer), never)
    assert last(wall)["study_digest"] == study.digest()


def test_a_content_that_is_not_of_its_digest_is_refused(wall):
    study = a_study()
    message = describe(study)
    message.config["content"]["finetuning"]["local_epochs"] = 50
    with pytest.raises(ParameterError, match="digest"):
        wall.perform("query.describe", message, never)
    message.config["content"] = {"name": "trial", "phasen": []}
    with pytest.raises(ParameterError, match="phasen"):
        wall.perform("query.describe", message, never)
    assert [e["outcome"] for e in wall.ledger.entries()] == ["refused"] * 2


def test_an_approval_is_of_one_coordinator(wall, settings, store):
    study = a_study()
    with pytest.raises(StudyWaitingError):
        wall.perform("query.describe", describe(study), never)
    approve(settings, study, wall.ledger)
    other = settings.model_copy(update={"coordinator_key": OTHER_KEY})
    for action, message in (
        ("train.classifier", train(study)),
        ("query.describe", describe(study)),
    ):
        with pytest.raises(StudyWaitingError):
            Wall(other, store).perform(action, message, never)
    wall.perform("query.describe", describe(study), lambda _: DESCRIPTION)


def test_a_study_without_its_content_cannot_be_approved(wall, settings):
    study = a_study()
    values = {"study": "trial", "seed": 3, "study_digest": study.digest()}
    with pytest.raises(StudyWaitingError):
        wall.perform("query.describe", request(actions.Describe(**values)), never)
    with pytest.raises(ConfigurationError, match="unread"):
        approve(settings, study, wall.ledger)
    with pytest.raises(StudyWaitingError):
        wall.perform("query.describe", describe(study), never)
    approve(settings, study, wall.ledger)


def test_a_site_that_approves_by_itself_still_holds_a_study_to_its_content(settings, store):
    wall = Wall(settings.model_copy(update={"auto_approve": (KEY,)}), store)
    study = a_study()
    wall.perform("query.describe", describe(study), lambda _: DESCRIPTION)
    wall.perform("train.classifier", train(study), lambda _: UPDATE)
    with pytest.raises(StudyDeniedError, match="seed"):
        wall.perform("train.classifier", train(study, seed=4), never)


@pytest.fixture
def open_wall(settings, store):
    """A wall that approves by itself, under a given policy."""

    def make(policy=None):
        automatic = settings.model_copy(update={"auto_approve": (KEY,)})
        return Wall(automatic, store, policy=policy)

    return make


@pytest.mark.parametrize(
    "reply",
    [
        Records({"pixels": np.zeros((2, 4), dtype=np.float32)}),
        Records({"weights/w": np.zeros(4, dtype=np.uint8)}),
        Records(config={"names": ["patient-7.png"]}),
        Records(config={"examples": "patient-7.png"}),
        Records(metrics={"auc": 1.0}),
    ],
)
def test_what_the_policy_does_not_name_is_held_and_stands_in_the_ledger(open_wall, reply):
    wall = open_wall()
    with pytest.raises(PolicyError) as error:
        wall.perform("train.classifier", train(a_study()), lambda _: reply)
    assert "patient" not in str(error.value) and "pixels" not in str(error.value)
    entry = last(wall)
    assert (entry["outcome"], entry["bytes"], entry["sha256"]) == ("refused", 0, "")
    assert [r[0] for r in entry["records"]] == [*reply.arrays, *reply.config, *reply.metrics]
    assert entry["rule"].startswith("actions.train.classifier.")


def test_an_unknown_action_and_bad_parameters_stand_in_the_ledger(open_wall):
    wall = open_wall()
    with pytest.raises(UnknownActionError):
        wall.perform("query.images\x1b[2J" + "x" * 100, Records(config={"study": "../x"}), never)
    assert last(wall)["study"] == "" and len(last(wall)["action"]) == 64
    with pytest.raises(ParameterError):
        wall.perform("train.classifier", Records(config={"study": "trial", "seed": -1}), never)
    assert (last(wall)["study"], last(wall)["outcome"]) == ("trial", "refused")


def test_work_that_fails_is_recorded_without_a_strange_text(open_wall):
    wall = open_wall()

    def fail(_):
        raise ValueError("/data/patient-7.png")

    with pytest.raises(ValueError, match="patient"):
        wall.perform("train.classifier", train(a_study()), fail)
    assert last(wall)["outcome"] == "failed" and "patient" not in json.dumps(last(wall))


def test_nothing_leaves_without_the_ledger(open_wall, settings):
    wall = open_wall()
    (settings.store / "ledger.head").unlink()
    with pytest.raises(LedgerError):
        wall.perform("train.classifier", train(a_study()), lambda _: UPDATE)


def test_budgets_count_what_left_before(open_wall):
    size = UPDATE.nbytes + 200
    wall = open_wall(narrow(study_bytes=2 * size, day_bytes=10 * size))
    study = a_study()
    sent = 0
    with pytest.raises(PolicyError, match="per study"):
        for _ in range(5):
            wall.perform("train.classifier", train(study), lambda _: UPDATE)
            sent += 1
    assert sent >= 2 and wall.ledger.sent_bytes("trial") <= 2 * size
    assert open_wall(narrow(study_bytes=10 * size)).perform(
        "train.classifier", train(study), lambda _: UPDATE
    )


def test_noise_is_added_once_for_the_same_question_and_reply(open_wall):
    wall = open_wall(narrow(arrays={"clip": 1.0, "noise": 0.5}, rule={"releases": 9}))
    study = a_study()
    first, again = (
        wall.perform("train.classifier", train(study), lambda _: UPDATE) for _ in range(2)
    )
    assert first.digest() == again.digest() != UPDATE.digest()
    entries = wall.ledger.entries()
    assert entries[0]["privacy"] == {"weights/* clip": 1.0, "weights/* noise": 0.5}
    assert entries[1]["privacy"] == {} and entries[0]["sha256"] == entries[1]["sha256"]
    other = wall.perform("train.classifier", train(study, round=1), lambda _: UPDATE)
    assert other.digest() != first.digest()
    assert np.linalg.norm(UPDATE.arrays["weights/w"]) > 1.0


def test_noise_cannot_be_averaged_away(open_wall):
    own = narrow(arrays={"clip": 1.0, "noise": 0.5}, rule={"releases": 3})
    wall, study = open_wall(own), a_study()
    for extra in ("junk", "weight/w", "weights"):
        message = train(study)
        message.arrays[extra] = np.array([7])
        with pytest.raises(ParameterError, match="does not take"):
            wall.perform("train.classifier", message, never)
    replies = []
    for step in range(4):
        message = train(study)
        message.arrays["weights/w"] += np.float32(step) * np.finfo(np.float32).eps
        if step < 3:
            replies.append(wall.perform("train.classifier", message, lambda _: UPDATE))
            continue
        for restarted in (wall, open_wall(own)):
            with pytest.raises(PolicyError, match="no more noised replies") as error:
                restarted.perform("train.classifier", message, lambda _: UPDATE)
            assert error.value.rule == "actions.train.classifier.releases"
    assert len({r.digest() for r in replies}) == 3
    again = wall.perform("train.classifier", train(study), lambda _: UPDATE)
    assert again.digest() == replies[0].digest()
    assert wall.ledger.noised_replies("trial", "train.classifier") == 3
    assert wall.ledger.noised_replies("other", "train.classifier") == 0


def test_a_noised_reply_that_was_held_back_counts_when_it_leaves(open_wall, monkeypatch):
    clock = [time.time()]
    monkeypatch.setattr("time.time", lambda: clock[0])
    one_a_day = payload(UPDATE)[0]
    noised = {"arrays": {"clip": 1.0, "noise": 0.5}, "rule": {"releases": 2}}
    wall, study = open_wall(narrow(**noised, day_bytes=one_a_day)), a_study()
    wall.perform("train.classifier", train(study), lambda _: UPDATE)
    with pytest.raises(PolicyError, match="per day"):
        wall.perform("train.classifier", train(study, round=1), lambda _: UPDATE)
    clock[0] += 2 * 86400
    wall.perform("train.classifier", train(study, round=1), lambda _: UPDATE)
    assert wall.ledger.noised_replies("trial", "train.classifier") == 2


def test_a_policy_for_another_coordinator_opens_no_wall(settings, store):
    with pytest.raises(PolicyError, match="coordinator_key"):
        Wall(settings, store, policy=narrow(coordinators=[OTHER_KEY]))
    Wall(settings, store, policy=narrow(coordinators=[OTHER_KEY, KEY]))


def call(*words, code=0):
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def file(settings, tmp_path):
    path = tmp_path / "site.toml"
    values = settings.model_dump(mode="json", exclude_none=True)
    path.write_text(tomli_w.dumps(values))
    return path


def test_a_damaged_study_does_not_hide_the_others(wall, file, settings):
    other = a_study().model_copy(update={"name": "other"})
    for study in (a_study(), other):
        with pytest.raises(StudyWaitingError):
            wall.perform("query.describe", describe(study), never)
    with sqlite3.connect(settings.store / "studies.sqlite") as connection:
        connection.execute("UPDATE studies SET content = '}' WHERE name = 'trial'")
    listed = call("studies", "list", "--site", file, code=84)
    assert "waiting   other" in listed and "'trial' is damaged" in listed
    call("studies", "deny", "other", "--site", file)
    assert "is forgotten" in call("studies", "forget", "trial", "--site", file)
    assert "denied    other" in call("studies", "list", "--site", file)


def test_a_hospital_reads_and_decides(wall, file):
    study = a_study(finetuning={"local_epochs": 7})
    assert "no study" in call("studies", "list", "--site", file)
    with pytest.raises(StudyWaitingError):
        wall.perform("query.describe", describe(study), never)
    assert "waiting   trial" in call("studies", "list", "--site", file)
    shown = call("studies", "show", "trial", "--site", file)
    assert study.digest() in shown and KEY in shown
    assert "finetuning.local_epochs = 7" in shown and "20% of the pool" in shown
    assert "train.classifier (4 times): weights/*" in shown
    key = f"sha256:{study.digest()}"
    assert f"studies approve {key} --site" in shown
    assert "of a content" in call("studies", "approve", "trial", "--site", file, code=20)
    assert "may work" in call("studies", "approve", key, "--site", file)
    assert wall.perform("query.describe", describe(study), lambda _: DESCRIPTION) == DESCRIPTION
    assert "refused" in call("studies", "deny", key[:19], "--site", file)
    with pytest.raises(StudyDeniedError):
        wall.perform("query.describe", describe(study), never)
    assert [e["outcome"] for e in wall.ledger.entries()] == [
        "refused",
        "approved",
        "sent",
        "denied",
        "refused",
    ]
    assert "no study that this site knows" in call(
        "studies", "deny", "other", "--site", file, code=20
    )
    assert "is forgotten" in call("studies", "forget", "trial", "--site", file)
    assert "no study" in call("studies", "list", "--site", file)


def test_a_hospital_reads_and_checks_its_ledger(open_wall, file, settings, tmp_path):
    wall = open_wall()
    wall.perform("train.classifier", train(a_study()), lambda _: UPDATE)
    with pytest.raises(UnknownActionError):
        wall.perform("\x1b[31mquery", Records(), never)
    shown = call("ledger", "show", "--site", file, "--keys")
    assert "weights/w float32 4" in shown and "1 messages" in shown and "\x1b[31m" not in shown
    assert "2 entries, all sound" in call("ledger", "verify", "--site", file)
    out = tmp_path / "ledger.jsonl"
    assert "2 entries" in call("ledger", "export", out, "--site", file)
    assert len(out.read_text().splitlines()) == 3
    head = json.loads((settings.store / "ledger.head").read_text())
    (settings.store / "ledger.head").write_text(json.dumps(head | {"entries": 1}))
    assert "head was edited" in call("ledger", "verify", "--site", file, code=83)


def test_a_policy_that_was_edited_since_the_start_is_told(file, settings, store, tmp_path):
    own = tmp_path / "policy.toml"
    own.write_text(STANDARD.read_text(encoding="utf-8"))
    settings = settings.model_copy(update={"policy": own})
    file.write_text(tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True)))
    assert "no enclave of this site has started" in call("policy", "check", "--site", file)
    started = Wall(settings, store)
    assert "the enclave holds this policy" in call("policy", "check", "--site", file)
    own.write_text(own.read_text().replace("day_bytes = 200", "day_bytes = 100"))
    told = call("policy", "check", "--site", file)
    assert f"another policy, digest {started.policy.digest()}" in told
    Wall(settings, store)
    assert "the enclave holds this policy" in call("policy", "check", "--site", file)


def test_a_hospital_checks_and_tries_its_policy(file, settings, tmp_path):
    assert "train.classifier: weights/*" in call("policy", "check", "--site", file)
    study = tmp_path / "study.toml"
    values = a_study(phases=("enrol", "ship", "pretrain")).model_dump(
        mode="json", exclude_none=True
    )
    study.write_text(tomli_w.dumps(values))
    assert "refuses nothing" in call("policy", "test", study, "--site", file)
    own = tmp_path / "policy.toml"
    text = STANDARD.read_text(encoding="utf-8")
    own.write_text(text.replace('"mim", ', ""))
    site = settings.model_copy(update={"policy": own}).model_dump(mode="json", exclude_none=True)
    file.write_text(tomli_w.dumps(site))
    refused = call("policy", "test", study, "--site", file, code=80)
    assert "train.pretrain" in refused and "metric" in refused
    sharing = a_study(
        phases=("enrol", "ship", "select", "annotate", "synthesise", "classifier"),
        selection={"strategy": "random", "budgets": [0.2]},
        finetuning={"replay": 0.5},
    )
    own.write_text(text)
    study.write_text(tomli_w.dumps(sharing.model_dump(mode="json", exclude_none=True)))
    told = call("policy", "test", study, "--site", file)
    assert "take part all the same:\ntrain.synthesise" in told and "nothing more that" in told
    assert "take part all the same:\n- train.synthesise" in "\n".join(
        asks(sharing, read_policy(own), 100)
    )
    own.write_text(text.replace('name = "standard"', f'name = "x"\ncoordinators = ["{OTHER_KEY}"]'))
    for asked in (("check",), ("test", study)):
        assert "coordinators" in call("policy", *asked, "--site", file, code=80)
    own.write_text(text.replace("day_bytes", "day_byte"))
    assert "did you mean 'day_bytes'" in call("policy", "check", "--site", file, code=20)


def test_only_a_named_coordinator_is_approved_without_a_person(settings, store):
    study = a_study()
    assert settings.auto_approve == ()
    for named, oracle in (((), True), ((OTHER_KEY,), True), ((OTHER_KEY,), False)):
        update = {"auto_approve": named, "oracle": oracle}
        with pytest.raises(StudyWaitingError):
            Wall(settings.model_copy(update=update), store).perform(
                "query.describe", describe(study), never
            )
    wall = Wall(settings.model_copy(update={"auto_approve": (OTHER_KEY, KEY)}), store)
    wall.perform("query.describe", describe(study), lambda _: DESCRIPTION)
    with pytest.raises(ValueError, match="auto_approve"):
        SiteSettings.model_validate(settings.model_dump() | {"auto_approve": ["everybody"]})


def test_repeated_refusals_are_shown_as_a_count(open_wall, file):
    wall = open_wall()
    for _ in range(4):
        with pytest.raises(UnknownActionError):
            wall.perform("query.images", Records(), never)
    wall.ledger.settle()
    shown = call("ledger", "show", "--site", file)
    assert "3 more within a minute" in shown and "4 were refused" in shown
    assert "2 entries, all sound" in call("ledger", "verify", "--site", file)
