"""What the conductor, the desk and the commands of studies do without a SuperLink."""

import os
import signal
import subprocess

import pytest
import tomli_w
from two_programs import coordinator as program
from two_programs import enrol, run

from sonofed_common.contract.bundle import BundleWriter
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.manifest import DataProvenance, Provenance
from sonofed_common.contract.study import read_study
from sonofed_common.runtime import write_atomically
from sonofed_common.security import load_signing_key
from sonofed_common.supervision.family import Identity
from sonofed_common.supervision.supervisor import Status, state_file
from sonofed_server.commands import study as commands
from sonofed_server.provisioning.project import read_coordinator
from sonofed_server.study.conductor import Conductor
from sonofed_server.study.desk import Entry, Wish, put_on
from sonofed_server.study.workspace import StudyState, Workspace, identity_of


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


def write_bundle(coordinator, folder, text):
    data = DataProvenance(name="phantoms", digest="0" * 64, images=1, groups=1)
    provenance = Provenance(data=data, settings="0" * 64)
    writer = BundleWriter(folder, name="source", kind="source", provenance=provenance)
    writer.add("classifiers/resnet18.safetensors", text)
    return writer.sign(load_signing_key(coordinator.signing_key)).id


def test_a_study_keeps_the_bundle_that_it_began_with(project, coordinator):
    for name in ("north", "south"):
        enrol(name, name)
    one, other = project / "one", project / "other"
    kept = write_bundle(coordinator, one, b"1")
    write_bundle(coordinator, other, b"2")
    file = project / "tiny.toml"
    study = {"name": "tiny", "cohort": {"sites": ["north", "south"]}, "classifiers": ["resnet18"]}
    file.write_text(tomli_w.dumps(study))
    workspace = put_on(coordinator, file, one, None).workspace
    with pytest.raises(ConfigurationError, match="began with another bundle"):
        put_on(coordinator, file, other, None)
    assert workspace.bundle.resolve() == one
    # The folder is moved, before and after the study's first round; the bundle is the same.
    one.rename(project / "moved")
    put_on(coordinator, file, project / "moved", None)
    assert workspace.bundle.resolve() == project / "moved"
    state = StudyState(facts={"started": "now"})
    state.save(workspace.checkpoint, identity_of(read_study(file), kept))
    (project / "moved").rename(one)
    with pytest.raises(ConfigurationError, match="began with another bundle"):
        put_on(coordinator, file, other, None)
    put_on(coordinator, file, one, None)
    # Or another bundle is trained in its place.
    write_bundle(coordinator, one, b"3")
    with pytest.raises(ConfigurationError, match="began with another bundle"):
        put_on(coordinator, file, one, None)
