"""When the conductor takes a study's run for over."""

import os
import time

import pytest
import tomli_w

from sonofed_common.supervision.family import Identity
from sonofed_common.supervision.program import ProgramStatus
from sonofed_common.supervision.supervisor import Status, state_file
from sonofed_server.provisioning.project import Coordinator, Project
from sonofed_server.study.conductor import START_SECONDS, Conductor, _Start
from sonofed_server.study.desk import Wish, find

HERE = Identity.of(os.getpid())


@pytest.fixture
def coordinator(tmp_path):
    project = Project(name="trial", address="localhost:8443", sites=("north",), contact="it")
    coordinator = Coordinator(project, tmp_path / "coordinator")
    (coordinator.studies / "tiny").mkdir(parents=True)
    study = {"name": "tiny", "cohort": {"sites": ["north"]}}
    (coordinator.studies / "tiny" / "study.toml").write_text(tomli_w.dumps(study))
    coordinator.run.mkdir()
    return coordinator


def supervised(coordinator, superlink):
    """A supervisor that runs, with this SuperLink."""
    program = ProgramStatus(state="running", identity=superlink, restarts=0, since=0.0)
    status = Status(title="trial", supervisor=HERE, health_port=1, programs={"superlink": program})
    state_file(coordinator.run).write_text(status.model_dump_json())


def test_a_run_counts_as_over_with_its_superlink_and_not_with_the_supervisor(coordinator):
    conductor, entry = Conductor(coordinator), find(coordinator, "tiny")
    began = time.monotonic() - START_SECONDS / 2
    conductor._submitted["tiny"] = _Start(began, superlink=HERE, before=None)

    def over():
        return conductor._due(entry, Wish(attempts=1)), conductor._orphaned(entry)

    # Nobody says which SuperLink there is.
    assert over() == (False, False)
    supervised(coordinator, HERE)
    assert over() == (False, False)
    supervised(coordinator, HERE.model_copy(update={"started": HERE.started + 1}))
    assert over() == (True, True)
