"""Approval: what a person typed is what is decided, and nothing else holds or makes it heavy."""

import sqlite3

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sonofed_client.enclave.store import open_store
from sonofed_client.enclave.studies import MAX_AUTOMATIC, MAX_WAITING, Studies
from sonofed_client.enclave.wall import Wall, open_studies
from sonofed_client.settings import SiteData, SiteSettings
from sonofed_common.contract import actions
from sonofed_common.contract.actions import request
from sonofed_common.contract.errors import (
    ConfigurationError,
    LedgerError,
    StoreError,
    StudyDeniedError,
    StudyWaitingError,
)
from sonofed_common.contract.records import Records
from sonofed_common.contract.study import Study
from sonofed_common.security import public_hex

KEY, OTHER_KEY = (public_hex(Ed25519PrivateKey.generate()) for _ in range(2))
DESCRIPTION = Records(config={"site": "north"}, metrics={"pool": 20, "test": 10})


def a_study(name="trial", **values):
    cohort = {"sites": ["north"]}
    return Study(name=name, seed=3, classifiers=("shufflenet_v2",), cohort=cohort, **values)


APPROVED, HOSTILE = a_study(), a_study(finetuning={"local_epochs": 50})


def described(study, content=True):
    facts = {"study": study.name, "seed": study.seed, "study_digest": study.digest()}
    return actions.Describe(**facts, content=study if content else None)


def counting(study):
    return actions.Annotations(study=study.name, seed=study.seed)


def key(study, digits=64):
    return f"sha256:{study.digest()[:digits]}"


@pytest.fixture
def entries():
    return []


@pytest.fixture
def studies(tmp_path, entries):
    def open_them(automatic=False, coordinator=KEY):
        return Studies(tmp_path, coordinator, automatic, entries.append)

    return open_them


def wait(studies, *asking):
    for study in asking:
        with pytest.raises(StudyWaitingError):
            studies.approved(described(study))


def test_denying_a_name_denies_every_content_of_it(studies):
    known = studies()
    wait(known, APPROVED)
    known.approve(key(APPROVED))
    known.approved(described(APPROVED))
    wait(known, HOSTILE)
    assert {s.digest for s in known.deny("trial")} == {APPROVED.digest(), HOSTILE.digest()}
    for asked in (described(APPROVED), described(HOSTILE), counting(APPROVED)):
        with pytest.raises(StudyDeniedError):
            known.approved(asked)


def test_a_name_that_looks_like_a_digest_is_a_name(studies):
    known = studies()
    decoy = a_study(name=APPROVED.digest()[:12])
    wait(known, APPROVED, decoy)
    known.approve(key(APPROVED))
    (denied,) = known.deny(key(APPROVED, 12))
    assert denied.digest == APPROVED.digest()
    (denied,) = known.deny(decoy.name)
    assert denied.digest == decoy.digest()


def test_an_approval_needs_the_digest_that_was_read(studies):
    known = studies()
    wait(known, APPROVED)
    known.deny("trial")
    wait(known, HOSTILE)
    for bare in ("trial", APPROVED.digest(), key(APPROVED, 11), "sha256:", ""):
        with pytest.raises(ConfigurationError, match="of a content"):
            known.approve(bare)
    with pytest.raises(ConfigurationError, match="several contents"):
        known.one("trial")
    assert known.approve(key(APPROVED, 12)).digest == APPROVED.digest()
    known.approved(described(APPROVED))
    wait(known, HOSTILE)


def test_digits_that_begin_several_digests_mean_none(studies, entries):
    known = studies()
    asked = actions.Describe(study="a", seed=0, study_digest="ab" * 32)
    twin = actions.Describe(study="b", seed=0, study_digest="ab" * 31 + "00")
    for one in (asked, twin):
        with pytest.raises(StudyWaitingError):
            known.approved(one)
    with pytest.raises(ConfigurationError, match="more of the digits"):
        known.deny("sha256:" + "ab" * 8)
    assert known.deny("sha256:" + "ab" * 32)[0].name == "a" and len(entries) == 1


def test_a_decision_is_in_the_ledger_before_it_holds(studies, tmp_path):
    wait(studies(), APPROVED)

    def full(_):
        raise LedgerError("the disk is full")

    for record in (full, None):
        broken = Studies(tmp_path, KEY, record=record)
        with pytest.raises(LedgerError):
            broken.approve(key(APPROVED))
        wait(broken, APPROVED)
    automatic = Studies(tmp_path, KEY, True, full)
    with pytest.raises(LedgerError):
        automatic.approved(described(APPROVED))
    wait(studies(), APPROVED)


def test_what_was_approved_by_itself_waits_once_that_is_switched_off(studies, entries):
    unread = actions.Describe(study="other", seed=1, study_digest="ab" * 32)
    for asked in (described(APPROVED), unread):
        assert studies(automatic=True).approved(asked).decided_by == "automatic"
    assert [(e.outcome, e.study, "by itself" in e.message) for e in entries] == [
        ("approved", "trial", True),
        ("approved", "other", True),
    ]
    known = studies()
    assert {s.state for s in known.known()} == {"waiting"}
    for asked in (described(APPROVED), counting(APPROVED), unread):
        with pytest.raises(StudyWaitingError):
            known.approved(asked)
    with pytest.raises(ConfigurationError, match="unread"):
        known.approve("sha256:" + "ab" * 32)
    assert known.approve(key(APPROVED)).decided_by == "person"
    known.approved(counting(APPROVED))
    assert [e.outcome for e in entries] == ["approved"] * 3


def test_a_digest_that_came_first_under_another_name_does_not_keep_it(studies):
    known = studies()
    early = described(APPROVED, content=False).model_copy(update={"study": "zzz"})
    with pytest.raises(StudyWaitingError):
        known.approved(early)
    wait(known, APPROVED)
    (study,) = known.known()
    assert (study.name, study.content) == ("trial", APPROVED)
    for automatic in (False, True):
        with pytest.raises(StudyDeniedError, match="another name"):
            studies(automatic).approved(early)


def test_strangers_studies_push_out_no_study_that_waits_and_no_decision(studies):
    known = studies()
    early, late = a_study(name="early"), a_study(name="late")
    wait(known, APPROVED, early)
    known.approve(key(APPROVED))
    flood = [a_study(name=f"s{n}") for n in range(MAX_WAITING + 3)]
    wait(known, *flood, early, late)
    names = [s.name for s in known.known()]
    assert names == ["trial", "early", *(s.name for s in flood[: MAX_WAITING - 1])]
    assert known.approved(counting(APPROVED)).digest == APPROVED.digest()
    assert known.approve(key(early)).name == "early"
    # There is room again, and the next that asks has it.
    wait(known, late)
    assert known.known()[-1].name == "late"


def test_studies_that_were_approved_by_themselves_push_each_other_out(studies):
    wait(studies(), APPROVED)
    known = studies(automatic=True)
    many = [a_study(name=f"s{n}") for n in range(MAX_AUTOMATIC + 3)]
    for study in many:
        assert known.approved(described(study)).state == "approved"
    assert [s.name for s in known.known()] == ["trial", *(s.name for s in many[3:])]


def test_a_request_reads_one_row_whatever_waits(studies, monkeypatch):
    known = studies()
    wait(known, *(a_study(name=f"s{n}") for n in range(20)))
    wait(known, APPROVED)
    known.approve(key(APPROVED))
    read = []
    validated = Study.model_validate_json
    monkeypatch.setattr(
        Study, "model_validate_json", lambda text: read.append(1) or validated(text)
    )
    known.approved(counting(APPROVED))
    assert len(read) == 1


def test_a_forgotten_study_waits_anew(studies, entries):
    known = studies()
    wait(known, APPROVED, HOSTILE)
    known.approve(key(APPROVED))
    assert len(known.forget("trial")) == 2 and known.known() == []
    with pytest.raises(StudyWaitingError, match="does not know"):
        known.approved(counting(APPROVED))
    wait(known, APPROVED)
    assert [(e.outcome, e.message) for e in entries[1:]] == [
        ("note", "forgotten; it was approved"),
        ("note", "forgotten; it was waiting"),
    ]


def test_a_list_of_another_version_or_of_no_table_is_named(studies, tmp_path):
    wait(studies(), APPROVED)
    path = tmp_path / "studies.sqlite"
    assert path.stat().st_mode & 0o077 == 0
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 7")
    with pytest.raises(StoreError, match="another version"):
        studies().known()
    path.write_bytes(b"no table" * 100)
    with pytest.raises(StoreError, match="cannot be used"):
        studies().known()


def test_an_sqlite_sentence_does_not_name_a_file(studies, tmp_path):
    wait(studies(), APPROVED)
    path = tmp_path / "studies.sqlite"
    path.unlink()
    path.mkdir()
    with pytest.raises(StoreError, match="list of studies") as refused:
        studies().approved(counting(APPROVED))
    assert "sqlite" not in refused.value.message and str(tmp_path) not in refused.value.message


@pytest.mark.parametrize(
    "flip",
    [
        "content = replace(content, '\"seed\":3', '\"seed\":s')",
        "content = replace(content, '\"name\"', '\"nale\"')",
        "content = CAST(replace(CAST(content AS BLOB), X'7B', X'FB') AS TEXT)",
        "state = 'apprnved'",
        "digest = 'g' || substr(digest, 2)",
        "seen = 'x'",
    ],
)
def test_a_damaged_study_is_named_and_the_others_go_on(studies, entries, tmp_path, flip):
    known, other = studies(), a_study(name="other")
    wait(known, APPROVED, other)
    known.approve(key(APPROVED))
    with sqlite3.connect(tmp_path / "studies.sqlite") as connection:
        connection.execute(f"UPDATE studies SET {flip} WHERE name = 'trial'")
    assert [study.name for study in known.known()] == ["other"]
    damaged = (
        known.check,
        lambda: known.find("trial"),
        lambda: known.deny("trial"),
        lambda: known.approved(counting(APPROVED)),
    )
    for ask in damaged:
        with pytest.raises(StoreError, match=r"study 'trial' is damaged; forget"):
            ask()
    assert known.approve(key(other)).name == "other"
    assert known.forget("trial") == ["trial (damaged)"]
    assert (entries[-1].study, entries[-1].message) == ("trial", "forgotten; it was damaged")
    known.check()
    wait(known, APPROVED)
    assert len(known.known()) == 2


@pytest.fixture
def settings(tmp_path):
    data = SiteData(kind="table", path=tmp_path)
    return SiteSettings(name="north", store=tmp_path / "store", data=data, coordinator_key=KEY)


@pytest.mark.parametrize("then", ["deny", "forget"])
def test_a_reply_is_held_if_the_study_was_denied_during_the_work(settings, then):
    store = open_store(settings)
    wall = Wall(settings, store)
    known = open_studies(settings, wall.ledger)
    message = request(described(APPROVED))
    with pytest.raises(StudyWaitingError):
        wall.perform("query.describe", message, lambda _: DESCRIPTION)
    known.approve(key(APPROVED))

    def work(_):
        getattr(known, then)("trial")
        return DESCRIPTION

    with pytest.raises((StudyDeniedError, StudyWaitingError)):
        wall.perform("query.describe", message, work)
    outcomes = [e["outcome"] for e in wall.ledger.entries() if not e["repeats"]]
    assert "sent" not in outcomes and outcomes[-1] == "refused"


@pytest.mark.parametrize("then", ["deny", "forget"])
def test_a_reply_that_waits_is_held_if_the_study_was_denied_since(settings, then):
    store = open_store(settings)
    wall = Wall(settings, store)
    known = open_studies(settings, wall.ledger)
    message = request(described(APPROVED))
    with pytest.raises(StudyWaitingError):
        wall.perform("query.describe", message, lambda _: DESCRIPTION)
    known.approve(key(APPROVED))
    confirm = wall.admit("query.describe", message)
    confirm()
    # Another content that takes the name does not make the first one's reply leave.
    getattr(known, then)(key(APPROVED))
    with pytest.raises(StudyWaitingError):
        wall.perform("query.describe", request(described(HOSTILE)), lambda _: DESCRIPTION)
    known.approve(key(HOSTILE))
    with pytest.raises((StudyDeniedError, StudyWaitingError)):
        confirm()
    last = [e for e in wall.ledger.entries() if not e["repeats"]][-1]
    assert (last["outcome"], last["study_digest"]) == ("refused", APPROVED.digest())


def test_a_request_can_be_refused_before_it_is_queued(settings):
    wall = Wall(settings, open_store(settings))
    weights = {"w": np.zeros(4, dtype=np.float32)}
    train = actions.TrainClassifier(
        study="trial",
        seed=3,
        bundle="0" * 64,
        image_size=APPROVED.image_size,
        classifier="shufflenet_v2",
        round=0,
        budget=0,
        settings=APPROVED.finetuning,
    )
    with pytest.raises(StudyWaitingError):
        wall.admit("train.classifier", request(train, weights=weights))
    (entry,) = wall.ledger.entries()
    assert (entry["outcome"], entry["action"]) == ("refused", "train.classifier")
