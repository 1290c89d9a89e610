"""Whole studies over enclave processes, against the same study with enclaves in process."""

import json
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from deployed.deployment import assert_same_bits, outcome, tiny
from sonofed_client.enclave.store import open_store
from sonofed_client.enclave.wall import open_ledger
from sonofed_client.settings import read_site
from sonofed_common.contract.errors import EngineError
from sonofed_common.runtime import Events
from sonofed_simulations.enclaves import enclave_processes
from sonofed_simulations.engines.inline import run_inline

pytestmark = pytest.mark.slow

SITE = Path(sys.executable).with_name("sonofed-site")


def lay_out(laboratory, root):
    study, sites = tiny(laboratory), laboratory.prepare_sites(0, root / "sites")
    return laboratory.workspace(study, laboratory.root / "source", root / "study"), sites


@pytest.fixture(scope="module")
def in_process(laboratory, tmp_path_factory):
    workspace, sites = lay_out(laboratory, tmp_path_factory.mktemp("in_process"))
    run_inline(workspace, sites, Events())
    return outcome(workspace, sites, "tiny"), [actions_sent(site) for site in sites]


def actions_sent(site):
    """What left, by its digest; the last installed bundle names the time of the study."""
    entries = open_ledger(open_store(read_site(site))).entries()
    sent = [e for e in entries if e["outcome"] == "sent" and e["action"] != "train.install"]
    return {(e["action"], e["round"], e["sha256"]) for e in sent}


def enclave_of(site):
    """The process that serves a site, not its guard."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            words = process.cmdline()
            if str(site) in words and not any("guard" in word for word in words):
                return process
    raise AssertionError(site)


@contextmanager
def killing(site):
    """Kill a site's enclave while a job is in its queue, and start it again."""
    store, started, killed, over = open_store(read_site(site)), [], [], threading.Event()

    def watch():
        while not over.wait(0.005):
            if store.names("queue/"):
                enclave = enclave_of(site)
                enclave.send_signal(signal.SIGKILL)
                psutil.wait_procs([enclave], timeout=10)
                killed.append(enclave.pid)
                started.append(subprocess.Popen([str(SITE), "enclave", "--site", str(site)]))
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.long
def test_a_study_survives_the_death_of_an_enclave(laboratory, in_process, tmp_path):
    workspace, sites = lay_out(laboratory, tmp_path)
    with enclave_processes(sites) as served, killing(served[0]) as killed:
        results = run_inline(workspace, served, Events())
    assert killed and results.missing_sites == ()
    assert_same_bits(outcome(workspace, sites, "tiny"), in_process[0])
    for site, as_ever in zip(sites, in_process[1], strict=True):
        assert actions_sent(site) == as_ever


def test_an_enclave_that_does_not_start_is_named(laboratory, tmp_path):
    _, sites = lay_out(laboratory, tmp_path)
    before = {p.pid for p in psutil.Process().children(recursive=True)}
    (read_site(sites[1]).store / "keys.json").write_text(json.dumps({"keys": {}}))
    named = pytest.raises(EngineError, match=r"hillview did not start; see .*enclave\.log")
    with named, enclave_processes(sites):
        raise AssertionError("it started")
    assert {p.pid for p in psutil.Process().children(recursive=True)} <= before
    assert sites[1].with_name("enclave.log").stat().st_size
