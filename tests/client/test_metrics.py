"""What an enclave tells Prometheus, read as Prometheus reads it."""

import os
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sonofed_client.enclave.entry import Entry
from sonofed_client.enclave.jobs import Jobs
from sonofed_client.enclave.ledger import Ledger
from sonofed_client.enclave.metrics import keep_written
from sonofed_client.enclave.store import Store
from sonofed_client.metrics_file import STALE_SECONDS, metrics_file, read_metrics
from sonofed_common.contract.actions import ACTIONS


def told(socket):
    """Samples of what a supervisor reads, by name and labels."""
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in read_metrics(socket)
        for sample in family.samples
    }


@pytest.fixture
def socket(tmp_path):
    ledger = Ledger(tmp_path, Ed25519PrivateKey.generate())
    sent = {"outcome": "sent", "study": "trial", "action": "train.embed", "bytes": 100}
    ledger.append(Entry(**sent))
    ledger.append(Entry(**sent, privacy={"weights/* clip": 1.0, "weights/* noise": 0.5}))
    ledger.append(Entry(outcome="refused", action="train.embed"))
    ledger.append(
        Entry(outcome="refused", action='x"} 1\nsonofed_jobs{state="patient 7', repeats=7)
    )
    jobs = Jobs(object(), Store(tmp_path / "store"), lambda: "images")
    before = os.umask(0o077)
    try:
        keep_written(ledger, jobs, tmp_path / "enclave.sock")
        until = time.monotonic() + 60
        while not read_metrics(tmp_path / "enclave.sock"):
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        os.umask(before)
    return tmp_path / "enclave.sock"


def test_what_left_and_what_was_refused_is_counted(socket):
    found = told(socket)
    assert found["sonofed_ledger_entries_total", "sent", "train.embed"] == 2
    assert found["sonofed_ledger_entries_total", "refused", "train.embed"] == 1
    assert found["sonofed_sent_bytes_total", "trial"] == 200
    assert found["sonofed_noised_replies_total", "train.embed", "trial"] == 1


def test_a_first_refusal_will_be_an_increase(socket):
    found = told(socket)
    refused = {key[1:] for key in found if key[0] == "sonofed_ledger_entries_total"}
    assert {tuple(sorted(("refused", action))) for action in ("", *ACTIONS)} <= refused
    assert found["sonofed_ledger_entries_total", "query.describe", "refused"] == 0


def test_a_strangers_name_of_an_action_is_no_label(socket):
    assert told(socket)["sonofed_ledger_entries_total", "", "refused"] == 7
    assert "patient" not in metrics_file(socket).read_text()


def test_the_sockets_group_may_read_it_and_nobody_else(socket):
    until = time.monotonic() + 60
    while (mode := metrics_file(socket).stat().st_mode & 0o777) != 0o640:
        assert time.monotonic() < until, oct(mode)
        time.sleep(0.05)


def test_what_is_old_or_broken_is_not_told(socket):
    long_ago = time.time() - STALE_SECONDS - 1
    os.utime(metrics_file(socket), (long_ago, long_ago))
    assert read_metrics(socket) == []
    metrics_file(socket).write_text("sonofed_jobs{state=")
    assert read_metrics(socket) == []
    assert read_metrics(socket.with_name("nowhere.sock")) == []
