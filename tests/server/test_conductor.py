"""What the conductor, the desk and the commands of studies do without a SuperLink."""

import json
import os
import signal
import socket
import subprocess
import time
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
import tomli_w
from PIL import Image
from two_programs import coordinator as program
from two_programs import enrol, run

from sonofed_common.contract.bundle import BundleWriter
from sonofed_common.contract.errors import ConfigurationError, EngineError
from sonofed_common.contract.manifest import DataProvenance, Provenance
from sonofed_common.contract.records import Records, to_bytes
from sonofed_common.contract.segmentation import needing_source_data
from sonofed_common.contract.study import Study, read_study
from sonofed_common.runtime import write_atomically
from sonofed_common.security import load_signing_key
from sonofed_common.supervision.family import Identity
from sonofed_common.supervision.program import ProgramStatus
from sonofed_common.supervision.supervisor import Status, alone, state_file
from sonofed_server.commands import study as commands
from sonofed_server.provisioning import programs
from sonofed_server.provisioning.front import front_file
from sonofed_server.provisioning.programs import CONDUCTOR_SECONDS, beside
from sonofed_server.provisioning.project import read_coordinator
from sonofed_server.source.settings import read_source
from sonofed_server.study import conductor as module
from sonofed_server.study import flower, registration
from sonofed_server.study.conductor import (
    ATTEMPTS,
    START_SECONDS,
    STEP_SECONDS,
    Conductor,
    _Start,
)
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


@pytest.mark.parametrize("kept", ["[]", "null", "3", '"x"', "{}", '{"error": "quorum"}', "{", ""])
def test_a_damaged_record_of_a_failure_is_told_as_one(coordinator, kept):
    entry = put(coordinator, "a")
    put(coordinator, "b")
    entry.workspace.failure.write_text(kept)
    assert run(program, "study list").split() == ["failed", "a", "stopped", "b"]
    assert "study a: failed; why it failed is not known" in run(program, "study status a")
    supervised(coordinator, None)
    write_bundle(coordinator, entry.workspace.bundle, b"weights")
    run(program, "study resume a")
    assert entry.state == "waiting"


@pytest.mark.parametrize(
    "line", ["5", "[]", '{"time": 1}', '{"event": "asked"}', '{"time": 1, "event": 2}', "[" * 10**5]
)
def test_a_damaged_event_is_passed_over(coordinator, line):
    entry = put(coordinator, "a")
    lost = {"time": 1, "event": "site-failed", "site": "east", "reason": "gone"}
    of_no_sites = {"time": 1, "event": "asked", "action": "train.embed", "sites": 3}
    lines = [line, json.dumps(of_no_sites), json.dumps(lost), line]
    entry.workspace.events.write_text("\n".join(lines))
    assert "east: missing: gone" in run(program, "study status a")


@pytest.mark.parametrize(
    "config", [{}, {"done": 3}, {"facts": []}, {"facts": {"phases": [{}]}}, {"facts": {"sites": 1}}]
)
def test_a_damaged_checkpoint_keeps_no_status_back(coordinator, config):
    entry = put(coordinator, "a")
    write_atomically(entry.workspace.checkpoint, to_bytes(Records({}, config)))
    assert "0 of 9 phases done" in run(program, "study status a")


def test_a_status_reads_no_weights(coordinator):
    checkpoint = put(coordinator, "a").workspace.checkpoint
    StudyState(done=["enrol"], arrays={"w": np.ones(1000)}).save(checkpoint, "")
    # Those that are not there cannot be read.
    os.truncate(checkpoint, checkpoint.stat().st_size - 7000)
    assert "1 of 9 phases done" in run(program, "study status a")


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


def write_bundle(coordinator, folder, text, settings="0" * 64, facts=MappingProxyType({})):
    data = DataProvenance(name="phantoms", digest="0" * 64, images=1, groups=1)
    provenance = Provenance(data=data, settings=settings)
    writer = BundleWriter(folder, name="source", kind="source", provenance=provenance)
    writer.add("classifiers/resnet18.safetensors", text)
    writer.facts = dict(facts)
    return writer.sign(load_signing_key(coordinator.signing_key)).id


def test_a_study_keeps_the_bundle_that_it_began_with(project, coordinator):
    for name in ("north", "south"):
        enrol(name, name)
    one, other = project / "one", project / "other"
    kept = write_bundle(coordinator, one, b"1")
    write_bundle(coordinator, other, b"2")
    file = project / "tiny.toml"
    study = {"name": "tiny", "cohort": {"sites": ["north", "south"]}, "classifiers": ["resnet18"]}
    study["phases"] = ["enrol", "ship", "embed"]
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


SEGMENTATION = {
    "encoder": "unet",
    "classes": 2,
    "heads": ["unet", "aspp"],
    "class_ratio": [0.9, 0.1],
    "foreground_range": [0.0, 0.5],
    "flips": True,
}


def test_a_study_is_told_before_it_starts_what_it_lacks_of_the_source(project, coordinator):
    enrol()
    file, source = project / "seg.toml", project / "source.toml"
    phases = ["enrol", "ship", "pretrain", "supervise", "evaluate"]
    study = {"name": "seg", "cohort": {"sites": ["north"]}, "phases": phases, "image_size": 32}
    file.write_text(tomli_w.dumps(study))
    wanted = {"name": "breast", "data": {"kind": "table", "path": "set"}, "segmentation": {}}
    source.write_text(tomli_w.dumps(wanted))
    (project / "set").mkdir()
    (project / "set" / "table.csv").write_text("image\na.png\n")
    Image.new("L", (8, 8)).save(project / "set" / "a.png")
    write_bundle(coordinator, project / "bare", b"1")
    said = run(program, "study check seg.toml --bundle bare", 20)
    assert "holds no segmenter, which phase 'pretrain' works on" in said
    facts = {"image_size": 32, "segmentation": SEGMENTATION}
    write_bundle(coordinator, project / "full", b"1", read_source(source).digest(), facts)
    for command in ("check", "run"):
        ask = f"study {command} seg.toml --bundle full"
        assert "'supervise' works on the source's" in run(program, ask, 20)
        assert "name its file by --source" in run(program, f"{ask} --data .", 20)
        assert "table does not exist" in run(program, f"{ask} --source source.toml --data no", 10)
    with pytest.raises(ConfigurationError, match="'supervise' works on"):
        put_on(coordinator, file, project / "full", None)
    ask = "study check seg.toml --bundle full --source source.toml"
    assert "source breast: trained this bundle; 1 images" in run(program, ask)
    assert put_on(coordinator, file, project / "full", (source, project)).state == "stopped"
    write_bundle(coordinator, project / "full", b"1", facts=facts)
    assert "source.toml holds other settings" in run(program, ask, 20)
    write_bundle(coordinator, project / "full", b"1", facts=facts | {"image_size": 64})
    assert "was trained on 64" in run(program, ask, 20)


@pytest.mark.parametrize(
    ("settings", "needing"),
    [
        ({"phases": ["pretrain"]}, []),
        ({"phases": ["ensemble", "evaluate"], "infusion": {"rule": "gate"}}, []),
        ({"phases": ["pseudo_label", "ensemble"]}, ["ensemble"]),
        ({"phases": ["pseudo_label", "ensemble"], "infusion": {"calibration": "none"}}, []),
        ({"phases": ["pretrain", "supervise", "evaluate"]}, ["supervise"]),
        (
            {
                "phases": ["pretrain", "supervise", "ensemble"],
                "infusion": {"rule": "gate", "calibration": "none"},
            },
            ["supervise", "ensemble"],
        ),
    ],
)
def test_which_phases_work_on_the_sources_data(settings, needing):
    phases = ["enrol", "ship", *settings["phases"]]
    study = Study.model_validate(
        {"name": "seg", "cohort": {"sites": ["north"]}, **settings, "phases": phases}
    )
    assert needing_source_data(study) == needing


def supervised(coordinator, superlink, state="running", reason=""):
    """A supervisor that runs, with this SuperLink."""
    program = ProgramStatus(state=state, identity=superlink, restarts=0, since=0.0, reason=reason)
    here = Identity.of(os.getpid())
    status = Status(title="trial", supervisor=here, health_port=1, programs={"superlink": program})
    write_atomically(state_file(coordinator.run), status.model_dump_json().encode())


def test_a_conductor_that_hangs_is_seen(coordinator, monkeypatch):
    assert CONDUCTOR_SECONDS > flower.SECONDS
    monkeypatch.setattr(programs, "find_nginx", lambda: "nginx")
    project = coordinator.root.parent / "project.toml"
    *_, conductor = programs.programs(coordinator, project)
    coordinator.run.mkdir(exist_ok=True)
    assert not conductor.ready()
    process = subprocess.Popen(conductor.command, stderr=subprocess.DEVNULL)

    def gets_on(seconds):
        coordinator.conductor_sign.touch()
        os.utime(coordinator.conductor_sign, (0, 0))
        until = time.monotonic() + seconds
        ready = False
        while not ready and time.monotonic() < until:
            time.sleep(0.05)
            # No SuperLink runs here that it could tell of the hospitals.
            coordinator.registered.touch()
            ready = conductor.ready()
        return ready

    try:
        assert gets_on(60)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert not gets_on(3 * STEP_SECONDS)
        process.send_signal(signal.SIGCONT)
        assert gets_on(60)
    finally:
        process.kill()
        process.wait()


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


def test_a_second_up_leaves_the_front_of_the_first_alone(coordinator):
    coordinator.run.mkdir(exist_ok=True)
    with alone(coordinator.run / "supervisor.lock", ""):
        second = subprocess.run([beside("sonofed-coordinator"), "up"], capture_output=True)
    assert second.returncode == 91 and b"up already" in second.stderr
    assert not front_file(coordinator).exists()


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
    assert "begun 6 times and finished no round" in entry.failure.message


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


def test_it_is_shown_that_hospitals_are_registered(coordinator, monkeypatch):
    monkeypatch.setattr(registration, "ask", lambda *_: {"nodes": []})
    Conductor(coordinator).step()
    assert not coordinator.registered.exists()
    with socket.socket() as superlink:
        superlink.bind(("127.0.0.1", 0))
        superlink.listen()
        port = {"superlink_port": superlink.getsockname()[1]}
        project = coordinator.project.model_copy(update=port)
        Conductor(replace(coordinator, project=project)).step()
    assert coordinator.registered.exists()


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
