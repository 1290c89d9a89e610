"""Hospitals that are gone: above the quorum a study goes on, below it ends and can be resumed."""

import json
import time
from pathlib import Path

import pytest

from deployed.deployment import Deployment, needs_front, wait_for
from sonofed_common.contract.errors import QuorumError
from sonofed_common.contract.results import read_results
from sonofed_common.runtime import SILENT
from sonofed_server.study.desk import find
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.scenarios.scenario import read_scenario

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3000), needs_front]

FOUR = Path(__file__).with_name("four.toml")
ROUNDS = {
    "phases": ["enrol", "ship", "select", "annotate", "classifier"],
    "finetuning": {"rounds": 2},
}
QUORUM_EXIT = QuorumError.exit_code


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    root = tmp_path_factory.mktemp("four")
    laboratory = Laboratory(read_scenario(str(FOUR)), root, None, SILENT)
    laboratory.prepare_source()
    laboratory.prepare_sites(0)
    return laboratory


@pytest.fixture
def deployment(four, root):
    deployment = Deployment(four, root)
    try:
        deployment.up()
        yield deployment
    finally:
        deployment.down()


def test_a_quorum_goes_on_and_less_than_a_quorum_ends_until_they_return(deployment):
    west, south = "west", "south"
    first = begin(deployment, "first")
    deployment.lose(west)
    said = deployment.study("status", "first", "--follow")
    assert first.state == "completed", said
    results = read_results(first.workspace.results)
    assert results.missing_sites == (west,)
    assert west in said and "missing" in said
    told = next(x for x in deployment.study("report", "first").splitlines() if x.startswith(west))
    assert "missing: classifier: " in told
    for name in set(deployment.names) - {west}:
        site = results.sites[name]
        assert site.missing_reason is None
        assert site.classifiers["shufflenet_v2"].adapted is not None

    deployment.up(west)
    second = begin(deployment, "second")
    lost = time.time()
    deployment.lose(west)
    deployment.lose(south)
    said = deployment.study("status", "second", "--follow", code=QUORUM_EXIT)
    reason = second.failure.message
    assert second.state == "failed" and reason in said
    assert "2 of 4 sites, below the quorum of 3" in reason and west in reason and south in reason
    failed = next(e for e in events(second) if e["event"] == "study-failed")
    assert failed["time"] - lost < deadline(deployment)
    now = json.loads(deployment.study("status", "second", "--json"))
    assert all("missing" in now["sites"][name] for name in (west, south))

    deployment.up(west, south)
    said = deployment.study("resume", "second", "--follow")
    assert second.state == "completed", said
    assert read_results(second.workspace.results).missing_sites == ()


def begin(deployment, name):
    """Start a study, and return it when its first round of training is saved."""
    file = deployment.write(name, **ROUNDS)
    deployment.study("run", file, "--bundle", deployment.bundle)
    entry = find(deployment.coordinator, name)
    wait_for(lambda: [e for e in events(entry) if is_round(e)])
    return entry


def is_round(event):
    return event.get("task", "").startswith("classifier ") and event["done"] >= 1


def events(entry):
    if not entry.workspace.events.exists():
        return []
    lines = entry.workspace.events.read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def deadline(deployment):
    # What was asked just before they were lost may have had its own.
    return 2 * deployment.laboratory.scenario.study.cohort.deadline_seconds
