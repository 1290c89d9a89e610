import json
import os
import signal
import subprocess
import sys
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sonofed_client.enclave import refusals
from sonofed_client.enclave.entry import Entry
from sonofed_client.enclave.ledger import Ledger
from sonofed_client.enclave.refusals import KINDS
from sonofed_common.contract.errors import CATALOGUE, LedgerError
from sonofed_common.contract.names import ACTION_NAMES

KEY = Ed25519PrivateKey.generate()
SENT = Entry(outcome="sent", study="trial", action="query.describe", bytes=3)


KNOWN = [(action, code) for code in CATALOGUE for action in ACTION_NAMES]
"""What a stranger can be refused for: more kinds than a window tells apart."""


def refused(kind=0, outcome="refused", study="trial"):
    """An entry, and the code of the error that it is about."""
    action, code = KNOWN[kind]
    return Entry(outcome=outcome, study=study, action=action, message=f"no {kind}"), code


def tries(entries):
    return sum(max(1, e["repeats"]) for e in entries if e["outcome"] != "sent")


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path, KEY)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(refusals, "WINDOW_SECONDS", 0.2)


def until(holds):
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_refusal_stands_at_once_and_its_repetitions_as_one_count(ledger, tmp_path):
    beside = Ledger(tmp_path, KEY)
    for _ in range(500):
        ledger.refuse(*refused())
    assert [e["repeats"] for e in beside.entries()] == [0]
    ledger.append(SENT)
    ledger.refuse(*refused())
    first, sent, count = ledger.entries()
    assert sent["outcome"] == "sent" and (first["repeats"], count["repeats"]) == (0, 500)
    for name in ("outcome", "action"):
        assert first[name] == count[name]
    assert "[internal]" in count["message"]
    assert beside.verify() == 3


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kinds=st.lists(
        st.tuples(st.integers(0, 2 * KINDS), st.sampled_from(["refused", "failed", "sent"])),
        max_size=120,
    )
)
def test_every_try_is_counted_and_few_are_written(tmp_path_factory, kinds):
    ledger = Ledger(tmp_path_factory.mktemp("ledger"), KEY)
    for kind, outcome in kinds:
        ledger.append(SENT) if outcome == "sent" else ledger.refuse(*refused(kind, outcome))
    entries = ledger.entries()
    sent = sum(outcome == "sent" for _, outcome in kinds)
    assert sum(e["outcome"] == "sent" for e in entries) == sent
    assert tries(entries) == len(kinds) - sent
    assert len(entries) - sent <= 2 * KINDS + 1
    assert ledger.verify() == len(entries)


def test_what_is_beyond_the_kinds_of_a_window_counts_together(ledger):
    for kind in range(KINDS + 40):
        ledger.refuse(*refused(kind))
    *known, others = ledger.entries()
    assert [e["message"] for e in known] == [f"no {kind}" for kind in range(KINDS)]
    assert others["repeats"] == 40 and "other kinds" in others["message"]


def test_what_a_stranger_writes_makes_no_kind(ledger):
    for n in range(100):
        strange = Entry(
            outcome="refused",
            study=f"study {n}",
            study_digest=f"{n:064x}",
            action=f"query.{n}",
            rule=f"rule {n}",
            message=f"{n} is no action",
        )
        ledger.refuse(strange, "unknown-action")
    assert [e["repeats"] for e in ledger.entries()] == [0, 99]


def test_whatever_strangers_send_a_study_that_was_decided_on_has_its_entries(ledger):
    for kind in range(KINDS + 40):
        ledger.refuse(*refused(kind))
    own = [refused(kind, study="ours") for kind in range(KINDS)]
    for _ in range(3):
        for entry, code in own:
            ledger.refuse(entry, code, True)
    # An action that there is not is a stranger's, whatever study it names.
    ledger.refuse(Entry(outcome="refused", study="ours", action="eval"), "unknown-action", True)
    about = [e for e in ledger.entries() if e["study"] == "ours"]
    assert [e["message"] for e in about if not e["repeats"]] == [e.message for e, _ in own]
    assert [e["repeats"] for e in about if e["repeats"]] == [2] * KINDS


def test_a_window_closes_by_itself_and_another_opens(ledger, tmp_path, short):
    beside = Ledger(tmp_path, KEY)
    for _ in range(3):
        ledger.refuse(*refused())
    until(lambda: [e["repeats"] for e in beside.entries()] == [0, 2])
    until(lambda: not ledger._refusals._is_open)
    ledger.refuse(*refused())
    assert [e["repeats"] for e in beside.entries()] == [0, 2, 0]
    until(lambda: not ledger._refusals._is_open)
    assert len(beside.entries()) == 3


def test_counts_wait_for_a_ledger_that_can_be_written(ledger, tmp_path, short, caplog):
    head = tmp_path / "ledger.head"
    for _ in range(3):
        ledger.refuse(*refused())
    kept = head.read_bytes()
    head.unlink()
    until(lambda: "waits" in caplog.text)
    with pytest.raises(LedgerError, match="head"):
        ledger.refuse(*refused(1))
    head.write_bytes(kept)
    until(lambda: tries(Ledger(tmp_path, KEY).entries()) == 3)


@pytest.mark.parametrize("killed", [False, True])
def test_a_process_that_ends_leaves_its_counts_and_one_that_is_killed_loses_them(tmp_path, killed):
    key = KEY.private_bytes_raw().hex()
    code = f"""
import os, signal
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sonofed_client.enclave.entry import Entry
from sonofed_client.enclave.ledger import Ledger
key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex({key!r}))
ledger = Ledger(Path({str(tmp_path)!r}), key)
for _ in range(5):
    ledger.refuse(Entry(outcome="refused", message="no"), "parameters")
if {killed}:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code])
    assert done.returncode == (-signal.SIGKILL if killed else os.EX_OK)
    ledger = Ledger(tmp_path, KEY)
    assert [e["repeats"] for e in ledger.entries()] == ([0] if killed else [0, 4])
    assert ledger.verify() == (1 if killed else 2)


def test_entries_of_before_there_were_counts_stay_valid(ledger, tmp_path, monkeypatch):
    dump = Entry.model_dump
    with monkeypatch.context() as earlier:
        earlier.setattr(Entry, "model_dump", lambda s, **how: dump(s, exclude={"repeats"}, **how))
        ledger.append(refused()[0])
    ledger.refuse(*refused())
    ledger.refuse(*refused())
    assert [e["repeats"] for e in ledger.entries()] == [0, 0, 1] and ledger.verify() == 3
    ledger.export(tmp_path / "out")
    _, old, _, new = map(json.loads, (tmp_path / "out").read_text().splitlines())
    assert "repeats" not in old["body"] and '"repeats": 1' in new["body"]
