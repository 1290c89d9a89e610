"""Links that fail or are slow, between machines that are namespaces of this one's network."""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from deployed.deployment import (
    Deployment,
    assert_same_bits,
    needs_front,
    undisturbed,
    wait_for,
)
from deployed.network import Machines, needs_namespaces
from sonofed_client.enclave.store import open_store
from sonofed_client.enclave.wall import open_ledger
from sonofed_client.settings import read_site
from sonofed_common.contract.results import read_results
from sonofed_common.runtime import SILENT
from sonofed_server.study.desk import find
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.scenarios.scenario import read_scenario

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(3000),
    needs_front,
    needs_namespaces(),
]

CUT_SECONDS = 60
SLOW = {"rate": 2_000_000, "delay": 0.1}
"""Bits a second, and seconds each way: 200 ms there and back."""

EXCHANGE_BYTES = 40_000_000
LARGE = Path(__file__).with_name("large.toml")
ONE_ROUND = {
    "phases": ["enrol", "ship", "select", "annotate", "classifier"],
    "finetuning": {"rounds": 1},
}


def trained(deployment, name, study):
    """Outcomes of a hospital's rounds of training, by round, as its ledger has them."""
    ledger = open_ledger(open_store(read_site(deployment.hospitals[name].site)))
    ledger.verify()
    rounds = {}
    for entry in ledger.entries():
        if entry["study"] == study and entry["action"] == "train.classifier":
            rounds.setdefault(entry["round"], []).append((entry["outcome"], entry["sha256"]))
    return rounds


def assert_once(deployment, study, rounds):
    """Each hospital gave one contribution to each round, however often that was sent."""
    for name in deployment.names:
        given = trained(deployment, name, study)
        assert sorted(given) == list(range(rounds))
        for sent in given.values():
            assert {outcome for outcome, _ in sent} == {"sent"} and len(set(sent)) == 1


def reaches(machines, name, port):
    command = f"exec 3<>/dev/tcp/{machines.address}/{port}"
    at = machines.at(name)
    done = subprocess.run([*at, "timeout", "5", "bash", "-c", command], capture_output=True)
    return done.returncode == 0


def test_a_study_goes_on_after_a_link_was_down(laboratory, root, tmp_path):
    with Machines(laboratory.scenario.hospitals) as machines:
        deployment = Deployment(laboratory, root, machines)
        try:
            deployment.up()
            file = deployment.write("cut")
            deployment.study("run", file, "--bundle", deployment.bundle)
            entry = find(deployment.coordinator, "cut")
            name, port = deployment.names[0], deployment.coordinator.project.port
            wait_for(lambda: deployment.standing("cut").phase == "classifier")
            saved = entry.checkpoint
            wait_for(lambda: entry.checkpoint > saved)
            machines.cut(name)
            assert not reaches(machines, name, port) and entry.state == "running"
            time.sleep(CUT_SECONDS)
            now = json.loads(deployment.study("status", "cut", "--json"))
            assert now["state"] == "running" and now["sites"][name].startswith("awaited: ")
            machines.mend(name)
            wait_for(lambda: reaches(machines, name, port))
            said = deployment.study("status", "cut", "--follow")
            assert entry.state == "completed", said
            assert read_results(entry.workspace.results).missing_sites == ()
            assert_once(deployment, "cut", 4)
            assert_same_bits(deployment.outcome("cut"), undisturbed(laboratory, tmp_path))
        finally:
            deployment.down()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Two hospitals, and a model of 45 MB."""
    laboratory = Laboratory(
        read_scenario(str(LARGE)), tmp_path_factory.mktemp("large"), None, SILENT
    )
    laboratory.prepare_source()
    laboratory.prepare_sites(0)
    return laboratory


@pytest.mark.skipif(
    not os.access("/dev/net/tun", os.W_OK), reason="needs /dev/net/tun, for the slow link"
)
def test_a_large_exchange_over_a_slow_link_is_whole_and_seen(large, root, tmp_path):
    """The slow link is a program's, for kernels without netem: see `deployed.slow_link`."""
    slow = next(iter(large.scenario.hospitals))
    with Machines(large.scenario.hospitals, {slow: SLOW}) as machines:
        deployment = Deployment(large, root, machines)
        try:
            deployment.up()
            file = deployment.write("slow", **ONE_ROUND)
            deployment.study("run", file, "--bundle", deployment.bundle)
            entry = find(deployment.coordinator, "slow")
            seen = []

            def over():
                seen.append(deployment.standing("slow"))
                time.sleep(5)
                return entry.state in ("completed", "failed")

            wait_for(over)
            said = deployment.study("report", "slow")
            assert entry.state == "completed", said
            results = read_results(entry.workspace.results)
            assert results.missing_sites == ()
            cost = {phase.name: phase for phase in results.phases}["classifier"]
            assert cost.bytes_from_sites > 2 * EXCHANGE_BYTES
            assert_once(deployment, "slow", 1)
            # Weights go to the hospitals as they are shipped, and come back from training.
            for action in ("train.install", "train.classifier"):
                during = [
                    n for n in seen if n.asked == action and n.sites[slow].startswith("await")
                ]
                assert "crossed the front since" in during[-1].lines()[2]
                crossed = [now.crossed_bytes for now in during]
                assert crossed == sorted(crossed) and crossed[-1] > EXCHANGE_BYTES / 2, crossed
                assert len({n // 5_000_000 for n in crossed}) > 3, crossed
            assert_same_bits(
                deployment.outcome("slow"),
                undisturbed(large, tmp_path, **ONE_ROUND),
            )
        finally:
            deployment.down()
