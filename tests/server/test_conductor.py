"""What the conductor, the desk and the commands of studies do without a SuperLink."""

import json
import os
import signal
import subprocess
import time

import pytest
import tomli_w
from two_programs import coordinator as program
from two_programs import enrol, run

from sonofed_common.contract.bundle import BundleWriter
from sonofed_common.contract.errors import ConfigurationError, EngineError
from sonofed_common.contract.manifest import DataProvenance, Provenance
from sonofed_common.contract.study import read_study
from sonofed_common.runtime import write_atomically
from sonofed_common.security import load_signing_key
from sonofed_common.supervision.family import Identity
from sonofed_common.supervision.program import ProgramStatus
from sonofed_common.supervision.supervisor import Status, state_file
from sonofed_server.commands import study as commands
from sonofed_server.provisioning.project import read_coordinator
from sonofed_server.study import conductor as module
from sonofed_server.study.conductor import ATTEMPTS, START_SECONDS, Conductor, _Start
from sonofed_server.study.desk import Entry, Wish, put_on
from sonofed_server.study.engine import run_study
from sonofed_server.study.hindrance import hindrance, note
from sonofed_server.study.workspace import StudyState, Workspace, identity_of
from sonofed_simulations.engines.inline import InlineGrid


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


def test_a_damaged_wish_ends_no_study(coordinator, working):
    entry = put(coordinator, "tiny", working)
    write_atomically(entry.workspace.root / "wish.json", b"{")
    Conductor(coordinator).step()
    assert entry.state == "running"
    working.kill()
    working.wait()
    assert entry.state == "stopped"


def test_a_study_that_still_runs_has_no_reason_to_have_failed(coordinator, working):
    entry = put(coordinator, "tiny", working)
    reason = {"error": "internal", "message": "the coordinator met an error"}
    write_atomically(entry.workspace.failure, json.dumps(reason).encode())
    assert "study tiny: running\n" in run(program, "study status tiny")
    working.kill()
    working.wait()
    assert "study tiny: failed; the coordinator met an error" in run(program, "study status tiny")


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
    # Or another bundle is trained in its place, which nothing goes on with.
    before = workspace.checkpoint.read_bytes()
    write_bundle(coordinator, one, b"3")
    with pytest.raises(ConfigurationError, match="began with another bundle"):
        put_on(coordinator, file, one, None)
    assert "began with another bundle than" in run(program, "study resume tiny", 20)
    with pytest.raises(ConfigurationError, match="began with another bundle"):
        run_study(workspace, InlineGrid(2))
    assert workspace.checkpoint.read_bytes() == before


def supervised(coordinator, superlink, state="running", reason=""):
    """A supervisor that runs, with this SuperLink."""
    program = ProgramStatus(state=state, identity=superlink, restarts=0, since=0.0, reason=reason)
    here = Identity.of(os.getpid())
    status = Status(title="trial", supervisor=here, health_port=1, programs={"superlink": program})
    write_atomically(state_file(coordinator.run), status.model_dump_json().encode())


def test_a_run_counts_as_over_with_its_superlink_and_not_with_the_supervisor(coordinator):
    here = Identity.of(os.getpid())
    conductor, entry = Conductor(coordinator), put(coordinator, "tiny")
    began = time.monotonic() - START_SECONDS / 2
    conductor._submitted["tiny"] = _Start(began, superlink=here, before=None)

    def over():
        return conductor._due(entry, Wish(attempts=1)), conductor._orphaned(entry)

    # Nobody says which SuperLink there is.
    assert over() == (False, False)
    supervised(coordinator, here)
    assert over() == (False, False)
    supervised(coordinator, here.model_copy(update={"started": here.started + 1}))
    assert over() == (True, True)


def test_a_study_that_finishes_no_round_has_failed(coordinator, monkeypatch):
    entry, begun = put(coordinator, "tiny"), []
    monkeypatch.setattr(module, "submit", lambda *_: begun.append(entry.wish.attempts) or "1")
    entry.want(Wish())

    def begin():
        # It has begun nothing yet, so it waits for nothing.
        Conductor(coordinator)._begin(entry)

    for _ in range(ATTEMPTS - 1):
        begin()
    write_atomically(entry.workspace.checkpoint, b"a round")
    while entry.state == "waiting":
        begin()
    assert begun == [*range(ATTEMPTS), *range(1, ATTEMPTS)]
    assert "begun 6 times and finished no round" in entry.failure["message"]


def test_only_what_was_begun_counts(coordinator, monkeypatch):
    entry = put(coordinator, "tiny")
    entry.want(Wish())

    def refuse(*_):
        raise EngineError("the SuperLink did not do 'run'")

    monkeypatch.setattr(module, "submit", refuse)
    for _ in range(ATTEMPTS + 1):
        with pytest.raises(EngineError):
            Conductor(coordinator)._begin(entry)
    assert entry.state == "waiting" and entry.wish.attempts == 0


def test_who_asks_for_a_stop_while_a_study_begins_gets_it(coordinator, monkeypatch):
    entry = put(coordinator, "tiny")
    entry.want(Wish())
    monkeypatch.setattr(module, "submit", lambda *_: entry.want(Wish(wanted="stop")) or "1")
    Conductor(coordinator)._begin(entry)
    assert entry.wish.wanted == "stop"


@pytest.mark.parametrize(("state", "works"), [("running", True), ("silent", False)])
def test_a_superlink_that_hangs_is_asked_for_nothing(coordinator, monkeypatch, state, works):
    put(coordinator, "tiny").want(Wish())
    supervised(coordinator, Identity.of(os.getpid()), state)
    asked = []
    monkeypatch.setattr(module, "answers", lambda port: True)
    monkeypatch.setattr(module, "register", lambda _: [])
    monkeypatch.setattr(module, "submit", lambda *_: asked.append("run") or "1")
    Conductor(coordinator).step()
    assert bool(asked) == works


def test_why_a_study_waits_is_told(coordinator):
    entry = put(coordinator, "tiny")
    entry.want(Wish())
    assert "study tiny: waiting; the coordinator is not up" in run(program, "study status tiny")
    supervised(coordinator, Identity.of(os.getpid()))
    assert "yet to begin" in run(program, "study status tiny")
    # Of port 1, where nobody answers.
    Conductor(coordinator).step()
    reason = json.loads(run(program, "study status tiny --json"))["reason"]
    assert reason == "the SuperLink does not answer"
    note(coordinator, {"tiny": "it is refused"})
    assert hindrance(coordinator, "tiny") == "it is refused"
    assert "yet to begin" in hindrance(coordinator, "other")


def test_a_program_that_does_not_work_is_why_a_study_waits(coordinator):
    put(coordinator, "tiny").want(Wish())
    supervised(coordinator, None, state="waiting", reason="ended by signal 9")
    assert "superlink is waiting (ended by signal 9)" in run(program, "study status tiny")


def test_a_damaged_project_file_keeps_nobody_from_ending_what_runs(project, coordinator):
    supervised(coordinator, None)
    (project / "project.toml").write_text("listen = ")
    assert "superlink" in run(program, "status")
    state_file(coordinator.run).unlink()
    assert "was not up" in run(program, "down")
    assert "holds no keys" in run(program, "down --project elsewhere/project.toml", 20)
