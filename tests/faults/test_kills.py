"""Every process of a deployment dies at seven places of a study."""

import os
import random
import signal
import time

import pytest

from deployed.deployment import assert_same_bits, needs_front, wait_for
from sonofed_client.enclave.store import open_store
from sonofed_client.enclave.wall import open_ledger
from sonofed_client.settings import read_site
from sonofed_common.contract.results import read_results
from sonofed_common.supervision.supervisor import read_status
from sonofed_server.study.desk import find

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3000), needs_front]


def got_on(entry):
    """What a study has saved, and its finished phases: an enrolment that is repeated saves none."""
    events = entry.workspace.events
    # Its process writes the first one a moment after the study was put on.
    told = events.read_text() if events.exists() else ""
    return entry.checkpoint, told.count('"phase-finished"')


def count_restarts(deployment, hospital):
    """How often each program was started again, at the coordinator and at a hospital."""
    there, here = (read_status(d.run).programs for d in (deployment.coordinator, hospital))
    names = [(there, n) for n in ("superlink", "front", "conductor")]
    names += [(here, n) for n in ("enclave", "supernode")]
    return {name: programs[name].restarts for programs, name in names}


@pytest.mark.parametrize("turn", range(7))
def test_a_study_survives_the_death_of_every_process(deployment, undisturbed, turn):
    """Seven studies of six deaths: in each, every process dies at another place of the study."""
    dice, study = random.Random(turn), f"killed-{turn}"
    file = deployment.write(study)
    deployment.study("run", file, "--bundle", deployment.bundle)
    entry = find(deployment.coordinator, study)
    hospital = deployment.hospitals[deployment.names[turn % len(deployment.names)]]

    def of(folder, name):
        return lambda: read_status(folder).programs[name].identity

    coordinator = deployment.coordinator.run
    victims = {
        "ServerApp": lambda: entry.process,
        "SuperLink": of(coordinator, "superlink"),
        "front": of(coordinator, "front"),
        "conductor": of(coordinator, "conductor"),
        "enclave": of(hospital.run, "enclave"),
        "SuperNode": of(hospital.run, "supernode"),
    }
    restarts = count_restarts(deployment, hospital)
    order = list(victims.items())
    for name, victim in order[turn % len(order) :] + order[: turn % len(order)]:
        # Each dies in work that follows what was done since the one before died.
        before = got_on(entry)
        wait_for(lambda before=before: entry.state == "completed" or got_on(entry) != before)
        assert entry.state != "completed", f"it ended before {name} died"
        time.sleep(dice.uniform(0, 2))
        identity = wait_for(lambda victim=victim: (found := victim()) and found.alive and found)
        os.kill(identity.pid, signal.SIGKILL)
        wait_for(lambda identity=identity: not identity.alive)
    deployment.study("stop", study)
    assert entry.state == "stopped"
    deployment.study("resume", study, "--follow")
    now = deployment.study("status", study)
    assert entry.state == "completed", now
    assert read_results(entry.workspace.results).missing_sites == ()
    assert_same_bits(deployment.outcome(study), undisturbed)
    died = count_restarts(deployment, hospital)
    assert all(died[program] > restarts[program] for program in restarts)
    for one in deployment.hospitals.values():
        open_ledger(open_store(read_site(one.site))).verify()
