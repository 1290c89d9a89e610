"""What the conductor and the commands of studies do without a SuperLink."""

import os
import signal
import subprocess

import pytest
import tomli_w
from two_programs import coordinator as program
from two_programs import run

from sonofed_common.runtime import write_atomically
from sonofed_common.supervision.family import Identity
from sonofed_common.supervision.supervisor import Status, state_file
from sonofed_server.commands import study as commands
from sonofed_server.provisioning.project import read_coordinator
from sonofed_server.study.conductor import Conductor
from sonofed_server.study.desk import Entry, Wish
from sonofed_server.study.workspace import Workspace


@pytest.fixture
def coordinator(project):
    with (project / "project.toml").open("a") as file:
        # Where nobody answers.
        file.write("superlink_port = 1\n")
    run(program, "init project.toml")
    return read_coordinator(project / "project.toml")


@pytest.fixture
def working():
    process = subprocess.Popen(["sleep", "10000"])
    yield process
    process.kill()
    process.wait()


def put(coordinator, name, process=None):
    workspace = Workspace(coordinator.studies / name)
    study = {"name": name, "cohort": {"sites": ["north", "south", "east"]}}
    write_atomically(workspace.study, tomli_w.dumps(study).encode())
    if process is not None:
        identity = Identity.of(process.pid)
        write_atomically(workspace.process, identity.model_dump_json().encode())
    return Entry(workspace)


def test_a_study_is_stopped_whatever_is_wrong_elsewhere(coordinator, working):
    """A damaged study, a damaged record and a SuperLink that is away keep no other study back."""
    put(coordinator, "a").workspace.failure.write_bytes(b"[]")
    entry = put(coordinator, "b", working)
    entry.want(Wish(wanted="stop"))
    write_atomically(coordinator.sites / "north.json", b"{")
    assert entry.state == "running"
    Conductor(coordinator).step()
    assert working.wait(60) == -signal.SIGKILL
    assert entry.state == "stopped"


def test_a_stop_that_nobody_sees_to_is_told(coordinator, working, monkeypatch):
    entry = put(coordinator, "tiny", working)
    own = Identity.of(os.getpid())
    up = Status(title="it", supervisor=own, health_port=1, programs={})
    write_atomically(state_file(coordinator.run), up.model_dump_json().encode())
    monkeypatch.setattr(commands, "STOP_SECONDS", 0.0)
    assert "still runs" in run(program, "study stop tiny", 91)
    assert entry.wish.wanted == "stop"
