"""What a coordinator tells Prometheus of its studies, and what reads it."""

import json
import os
import re
from pathlib import Path

import pytest
import tomli_w
import yaml
from prometheus_client.parser import text_string_to_metric_families

from sonofed_common.contract.results import PhaseCost
from sonofed_common.contract.study import read_study
from sonofed_common.supervision.family import Identity
from sonofed_common.supervision.metrics import exposition, program_metrics
from sonofed_common.supervision.program import ProgramStatus
from sonofed_server.provisioning.project import Coordinator, Project
from sonofed_server.study.metrics import study_metrics
from sonofed_server.study.workspace import StudyState, Workspace, identity_of

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture
def coordinator(tmp_path):
    project = Project(name="trial", address="localhost:8443", sites=("north",), contact="it")
    return Coordinator(project, tmp_path / "coordinator")


def put(coordinator, name, costs=(), events=(), running=False):
    folder = coordinator.studies / name
    folder.mkdir(parents=True)
    study = {"name": name, "cohort": {"sites": ["north", "south", "east"], "quorum": 2}}
    (folder / "study.toml").write_text(tomli_w.dumps(study))
    state = StudyState(done=["enrol"])
    state.facts["phases"] = [cost.model_dump() for cost in costs]
    state.save(
        folder / "checkpoint.safetensors", identity_of(read_study(folder / "study.toml"), "b")
    )
    if running:
        process = Identity.of(os.getpid())
        Workspace(folder).process.write_text(process.model_dump_json())
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))


def samples(text):
    families = text_string_to_metric_families(text.decode())
    return {
        (s.name, *sorted(s.labels.values())): s.value for family in families for s in family.samples
    }


def test_a_study_tells_its_phases_bytes_and_who_is_missing(coordinator):
    cost = PhaseCost(name="enrol", seconds=2.5, saves=1, bytes_to_sites=300, bytes_from_sites=20)
    lost = {"time": 1.0, "event": "site-failed", "site": "east", "reason": "gone"}
    put(coordinator, "trial", [cost], [lost], running=True)
    put(coordinator, "over", [cost], [lost])
    put(coordinator, "other")
    (coordinator.studies / "other" / "study.toml").write_text("name = 3")
    found = samples(exposition(lambda: study_metrics(coordinator)))
    assert found["sonofed_study_state", "stopped", "trial"] == 0
    assert found["sonofed_study_state", "running", "trial"] == 1
    assert found["sonofed_study_phases_done", "trial"] == 1
    assert found["sonofed_study_sites", "trial"] == 3
    assert found["sonofed_study_sites_missing", "trial"] == 1
    # Nobody is waited for any more.
    assert found["sonofed_study_sites_missing", "over"] == 0
    assert found["sonofed_study_quorum", "trial"] == 2
    assert found["sonofed_phase_seconds_total", "enrol", "trial"] == 2.5
    assert found["sonofed_phase_saves_total", "enrol", "trial"] == 1
    assert found["sonofed_phase_bytes_to_sites_total", "enrol", "trial"] == 300
    assert found["sonofed_phase_bytes_from_sites_total", "enrol", "trial"] == 20


def test_one_study_takes_no_other_from_the_metrics(coordinator, caplog):
    put(coordinator, "a")
    put(coordinator, "b")
    # Deeper than the reader of TOML goes.
    (coordinator.studies / "a" / "study.toml").write_text("name = " + "[" * 10**4)
    found = samples(exposition(lambda: study_metrics(coordinator)))
    assert found["sonofed_study_state", "b", "stopped"] == 1
    # Threads of enclaves that other tests left may log beside it.
    own = [record for record in caplog.records if record.name == study_metrics.__module__]
    assert [record.study for record in own] == ["a"]


def test_dashboard_and_alerts_ask_for_what_there_is(coordinator):
    put(coordinator, "trial", [PhaseCost(name="enrol", seconds=1)])
    program = ProgramStatus(state="running", identity=None, restarts=0, since=0.0)
    here = exposition(
        lambda: study_metrics(coordinator),
        lambda: program_metrics({"front": program}),
    )
    known = {name for name, *_ in samples(here)}
    # Those of an enclave, whose own test holds their names.
    known |= {f"sonofed_{n}" for n in ("jobs", "sent_bytes_total", "noised_replies_total")}
    # And what Prometheus itself says of each target.
    known |= {"sonofed_ledger_entries_total", "up"}
    dashboard = json.loads((DEPLOY / "grafana" / "sonofed.json").read_text())
    asked = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    settings = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    assert all(re.fullmatch("sonofed-.*", job["job_name"]) for job in settings["scrape_configs"])
    asked += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    for expression in asked:
        names = set(re.findall(r"\bsonofed_\w+|^up\b", expression))
        assert names and names <= known, expression
    names = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    assert names >= {"ProgramDown", "ProgramDoesNotLast"}
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    assert len({(p["x"], p["y"]) for p in places}) == len(places)


def test_prometheus_reads_the_ports_that_are_the_defaults(coordinator):
    from sonofed_client.provisioning.place import RelaySettings

    settings = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    targets = [job["static_configs"][0]["targets"] for job in settings["scrape_configs"]]
    ports = [coordinator.project.health_port, RelaySettings().health_port]
    assert targets == [[f"127.0.0.1:{port}"] for port in ports]
    assert all((DEPLOY / "prometheus" / name).is_file() for name in settings["rule_files"])
