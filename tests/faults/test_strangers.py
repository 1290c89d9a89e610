"""Strangers call the front while a study runs: each is refused, and the study is none the worse."""

import time

import pytest

from deployed.deployment import assert_same_bits, needs_front, run, wait_for
from deployed.strangers import REFUSED, Caller, number_of, refusals, write_node_key
from sonofed_client.provisioning.request import read_node_key
from sonofed_common.contract.enrolment import EnrolmentRequest
from sonofed_common.contract.results import read_results
from sonofed_server.study.desk import find

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3000), needs_front]

PATHS = ("/v1/control/list-runs", "/v1/control/stop-run", "/v1/runtime/get-nodes", "/docs")


def renew_node_key(deployment, name):
    """Revoke a hospital's key, enrol it with another, and return the old one."""
    hospital, project = deployment.hospitals[name], deployment.project
    old = read_node_key(hospital)
    run("sonofed-coordinator", "revoke", name, "--project", project)
    run("sonofed-site", "down", "--folder", hospital.root)
    run("sonofed-site", "init", name, "--new-node-key", "--folder", hospital.root)
    words = EnrolmentRequest.read(hospital.request.read_bytes()).words
    enrol = ("enrol", hospital.request, "--words", words, "--project", project)
    run("sonofed-coordinator", *enrol)
    kit = deployment.coordinator.kits / f"{name}.zip"
    run("sonofed-site", "install", kit, "--folder", hospital.root)
    deployment.up(name)
    return old


def test_strangers_are_refused_and_harm_no_study(deployment, undisturbed, tmp_path):
    name, coordinator = deployment.names[0], deployment.coordinator
    revoked = Caller(coordinator, renew_node_key(deployment, name))
    unknown = Caller(coordinator, write_node_key(tmp_path / "stranger.key"))
    file = deployment.write("besieged")
    deployment.study("run", file, "--bundle", deployment.bundle)
    entry = find(coordinator, "besieged")
    wait_for(lambda: entry.checkpoint > 0)
    node, key = number_of(deployment, name)
    member = Caller(coordinator, key)
    assert member.beat(node) == 200
    (sent,) = member.sent
    rounds, before = 0, len(refusals(coordinator))

    def attack():
        nonlocal rounds
        for caller in (revoked, unknown):
            assert {caller.enter(), caller.register(), caller.fetch(node)} <= REFUSED
        assert member.again(sent) == member.steal(sent, node) == 401
        assert [deployment.call(path) for path in PATHS] == [404] * len(PATHS)
        rounds += 1
        # The front counts the calls of an address, and here the hospitals share the strangers'.
        time.sleep(1)
        return entry.state != "running"

    wait_for(attack)
    said = deployment.study("status", "besieged", "--follow")
    assert entry.state == "completed", said
    assert rounds > 1 and len(refusals(coordinator)) >= before + 8 * rounds
    assert read_results(entry.workspace.results).missing_sites == ()
    assert_same_bits(deployment.outcome("besieged"), undisturbed)
