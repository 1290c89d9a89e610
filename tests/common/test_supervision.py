import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from itertools import pairwise

import pytest

from sonofed_common.contract.errors import DeploymentError
from sonofed_common.supervision.control import START_SECONDS, say_status, start_detached, stop
from sonofed_common.supervision.family import Identity, members
from sonofed_common.supervision.logs import set_large_aside
from sonofed_common.supervision.program import (
    FAILED_PROBES,
    LONGEST_PAUSE,
    PROBE_PAUSE,
    Child,
    Program,
    answers_on,
    mark,
)
from sonofed_common.supervision.supervisor import alone, left_running, read_status, state_file

PATIENCE = 300

SUPERVISOR = """
import sys
from pathlib import Path
from sonofed_common.supervision.logs import set_large_aside
from sonofed_common.supervision.probes import Endpoint
from sonofed_common.supervision.program import Program
from sonofed_common.supervision.supervisor import supervise

folder = Path(sys.argv[1])
sleep = (sys.executable, "-c", "import time; time.sleep(10_000)")
# A grandchild with a session of its own, as Flower's are, and an environment of its own for one.
nest = (
    "import subprocess, sys, time;"
    "sleep = [sys.executable, '-c', 'import time; time.sleep(10_000)'];"
    "subprocess.Popen(sleep, start_new_session=True);"
    "subprocess.Popen(sleep, env={});"
    f"open({str(folder / 'nested')!r}, 'w').close();"
    "time.sleep(10_000)"
)
programs = [
    Program("plain", sleep, lambda: True),
    Program("nest", (sys.executable, "-c", nest), (folder / "nested").exists),
]
supervise(folder, "the test", int(sys.argv[2]), programs)
"""


def wait_for(condition):
    until = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


def is_free(folder):
    """Whether the last thread of a killed supervisor has given its lock back."""
    with suppress(DeploymentError), alone(folder / "supervisor.lock", ""):
        return True


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def asked(port, path="/healthz", method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path)
    answer = connection.getresponse()
    return answer.status, answer.read()


def family(folder):
    status = read_status(folder)
    return [
        pid
        for name in ("plain", "nest")
        for pid in members(mark(folder, name), status.programs[name].identity if status else None)
    ]


@contextmanager
def up(folder, script=SUPERVISOR):
    port = free_port()
    start_detached(folder, [sys.executable, "-c", script, str(folder), str(port)], "the test")
    try:
        yield port
    finally:
        stop(folder, "the test")


def test_a_family_is_watched_and_ends_whole(tmp_path):
    with up(tmp_path) as port:
        code, body = asked(port)
        assert code == 200 and json.loads(body)["healthy"]
        assert asked(port, "/other")[0] == 404
        assert asked(port, method="HEAD") == (200, b"")
        code, body = asked(port, "/metrics")
        assert code == 200 and b'sonofed_program_up{program="nest"} 1.0' in body
        everyone = family(tmp_path)
        assert len(everyone) == 4
        with pytest.raises(DeploymentError, match="up already"):
            start_detached(tmp_path, ["true"], "the test")
    assert read_status(tmp_path) is None
    assert not any(Identity.of(pid) for pid in everyone)
    assert stop(tmp_path, "the test") is False


def test_what_cannot_be_told_harms_nothing_else_and_is_logged_as_json(tmp_path):
    script = SUPERVISOR.replace("programs)", "programs, lambda: 1 / 0)")
    script = f"from sonofed_common import log\nlog.configure('supervisor')\n{script}"
    with up(tmp_path, script) as port:
        assert asked(port, "/metrics")[0] == 500 and asked(port)[0] == 200
        with socket.create_connection(("127.0.0.1", port)) as caller:
            # Who hangs up in the middle of the question.
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            caller.sendall(b"GET /heal")
        wait_for(lambda: "could not be given" in (tmp_path / "supervisor.log").read_text())
    said = [json.loads(line) for line in (tmp_path / "supervisor.log").read_text().splitlines()]
    errors = [line["error"] for line in said if "error" in line]
    assert errors == ["ZeroDivisionError", "ConnectionResetError"]


def test_who_is_killed_is_started_again_without_what_it_left(tmp_path):
    with up(tmp_path) as port:
        before = read_status(tmp_path).programs
        nest = members(mark(tmp_path, "nest"), before["nest"].identity)
        assert len(nest) == 3
        (tmp_path / "nested").unlink()
        os.kill(before["nest"].identity.pid, signal.SIGKILL)

        def again():
            now = read_status(tmp_path).programs["nest"]
            return now.state == "running" and now.restarts == 1 and now

        after = wait_for(again)
        assert after.reason == "ended by signal 9"
        assert not set(nest) & set(members(mark(tmp_path, "nest"), after.identity))
        assert not any(Identity.of(pid) for pid in nest)
        assert read_status(tmp_path).programs["plain"] == before["plain"]
        assert asked(port)[0] == 200


@pytest.fixture(params=["whole", "damaged"])
def damage(request):
    """What happens to the state of a supervisor that was killed."""
    return lambda folder: request.param == "whole" or state_file(folder).write_bytes(b"{")


def test_a_killed_supervisor_leaves_nothing_that_the_next_would_meet(tmp_path, damage):
    with up(tmp_path):
        first = read_status(tmp_path).supervisor
        everyone = family(tmp_path)
        os.kill(first.pid, signal.SIGKILL)
        wait_for(lambda: not first.alive and is_free(tmp_path))
        damage(tmp_path)
        assert read_status(tmp_path) is None
    # Else the next family counts as ready before it is there.
    (tmp_path / "nested").unlink()
    with up(tmp_path):
        assert not any(Identity.of(pid) for pid in everyone)
        assert len(family(tmp_path)) == 4


def test_what_a_killed_supervisor_left_is_told_and_ended(tmp_path, capsys, damage):
    with up(tmp_path):
        supervisor = read_status(tmp_path).supervisor
        everyone = family(tmp_path)
        os.kill(supervisor.pid, signal.SIGKILL)
        wait_for(lambda: not supervisor.alive and is_free(tmp_path))
        damage(tmp_path)
        left = left_running(tmp_path)
        assert sorted(left) == ["nest", "plain"]
        assert say_status(tmp_path, "the test", json=False) == 1
        assert f"{', '.join(left)} run on" in capsys.readouterr().out
        assert say_status(tmp_path, "the test", json=True) == 1
        assert json.loads(capsys.readouterr().out) == {"left_running": left}
        assert stop(tmp_path, "the test") is True
        assert not any(Identity.of(pid) for pid in everyone)
        assert left_running(tmp_path) == [] and stop(tmp_path, "the test") is False
        assert say_status(tmp_path, "the test", json=False) == 1
        assert capsys.readouterr().out == "the test is not up\n"


def test_who_dies_is_started_again_where_nothing_can_be_written(tmp_path):
    """As on a full disk: the state is written as soon as it can be, and nobody ends meanwhile."""
    with up(tmp_path) as port:
        before = read_status(tmp_path).programs
        state_file(tmp_path).unlink()
        state_file(tmp_path).mkdir()
        os.kill(before["plain"].identity.pid, signal.SIGKILL)

        def again():
            code, body = asked(port)
            return code == 200 and json.loads(body)["programs"]["plain"]["restarts"] == 1

        wait_for(again)
        state_file(tmp_path).rmdir()
        after = wait_for(lambda: read_status(tmp_path)).programs
        assert after["plain"].restarts == 1 and after["nest"] == before["nest"]
        assert (tmp_path / "supervisor.log").read_text().count("cannot be written") == 1


@pytest.mark.parametrize("name", ["new.log", "sign"])
def test_what_a_program_needs_and_cannot_have_is_told_and_tried_again(tmp_path, name):
    (tmp_path / name).mkdir()
    program = Program("new", ("sleep", "1000"), lambda: True, sign=tmp_path / "sign")
    child = Child(program, tmp_path)
    try:
        child.step()
        assert child.status.state == "waiting" and "Is a directory" in child.status.reason
        (tmp_path / name).rmdir()
        wait_for(lambda: child.step() and child.status.state == "running")
    finally:
        child.end()


def test_a_supervisor_whose_state_is_damaged_is_up(tmp_path):
    with up(tmp_path) as port:
        state_file(tmp_path).write_bytes(b"{")
        for ask in (
            lambda: say_status(tmp_path, "the test", json=False),
            lambda: stop(tmp_path, "the test"),
            lambda: start_detached(tmp_path, ["true"], "the test"),
        ):
            with pytest.raises(DeploymentError, match=r"is up, and .* cannot be read"):
                ask()
        assert left_running(tmp_path) == [] and asked(port)[0] == 200
        # Whatever changes is written.
        os.kill(json.loads(asked(port)[1])["programs"]["plain"]["identity"]["pid"], signal.SIGKILL)
        wait_for(lambda: read_status(tmp_path))


def test_a_damaged_state_is_written_anew_each_minute(tmp_path):
    short = "import sonofed_common.supervision.supervisor as its\nits.MINUTE = 0.5\n"
    with up(tmp_path, short + SUPERVISOR):
        state_file(tmp_path).write_bytes(b"{")
        wait_for(lambda: read_status(tmp_path))


def test_pauses_grow_to_a_limit(tmp_path, monkeypatch):
    child = Child(Program("brief", ("false",), lambda: False), tmp_path)
    now, starts = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    while len(starts) < 11:
        if child.status.state == "starting":
            child._process.wait()
        child.step()
        if child.status.state == "starting":
            starts.append(now[0])
        elif child.status.state == "waiting":
            now[0] += 0.25
    pauses = [b - a for a, b in pairwise(starts)]
    assert child.status.restarts == len(pauses)
    assert pauses[:4] == [0.5, 1, 2, 4] and pauses[-1] == LONGEST_PAUSE
    assert child.status.reason == "ended by exit code 1"
    child.end()


def test_who_does_not_answer_for_long_is_silent_and_not_started_again(tmp_path, monkeypatch):
    now, answers = [0.0], [True]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    child = Child(Program("mute", ("sleep", "1000"), lambda: answers[0]), tmp_path)

    def after(probes):
        for _ in range(probes):
            now[0] += PROBE_PAUSE
            child.step()
        return child.status.state

    try:
        assert after(3) == "running"
        answers[0] = False
        assert after(FAILED_PROBES - 1) == "running"
        assert after(1) == "silent" and child.status.reason == "did not answer"
        answers[0] = True
        assert after(1) == "running" and child.status.restarts == 0
        # A few that fail now and then are no silence.
        for _ in range(3):
            answers[0] = False
            after(FAILED_PROBES - 1)
            answers[0] = True
            assert after(1) == "running"
    finally:
        monkeypatch.undo()
        child.end()


def test_the_sign_of_an_earlier_start_tells_nothing(tmp_path):
    sign = tmp_path / "sign"
    sign.touch()
    child = Child(Program("new", ("sleep", "1000"), sign.exists, sign=sign), tmp_path)
    try:
        child.step()
        child.step()
        assert child.status.state == "starting"
        sign.touch()
        child.step()
        assert child.status.state == "running"
    finally:
        child.end()


def test_a_program_that_is_not_there_is_named(tmp_path):
    child = Child(Program("absent", (str(tmp_path / "no"),), lambda: True), tmp_path)
    child.step()
    assert child.status.state == "waiting" and "No such file" in child.status.reason
    assert child.status.restarts == 0


def test_a_taken_port_and_an_early_end_are_told(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-c", SUPERVISOR, str(tmp_path), str(port)]
        log = tmp_path / "supervisor.log"
        log.write_text("how the last one ended\n")
        with pytest.raises(DeploymentError, match=rf"(?s)ended at once.*port {port}") as told:
            start_detached(tmp_path, command, "the test")
        assert str(told.value).count("[deployment]") == 1
        with pytest.raises(DeploymentError, match="ended at once: it said nothing"):
            start_detached(tmp_path, ["true"], "the test")
        assert log.read_text().startswith("how the last one ended\n")


def test_a_large_log_is_set_aside_while_its_program_writes_on(tmp_path):
    large, small, stuck = (tmp_path / f"{name}.log" for name in ("large", "small", "stuck"))
    small.write_text("short\n")
    (tmp_path / "stuck.log.1").mkdir()
    (tmp_path / "stuck.log.1" / "stuck.log").mkdir()
    stuck.write_text("long enough\n")
    with large.open("ab", buffering=0) as program:
        for said in ("first words\n", "second words\n"):
            program.write(said.encode())
            set_large_aside(tmp_path, 10)
            assert large.read_bytes() == b""
            assert (tmp_path / "large.log.1").read_text() == said
        program.write(b"then\n")
    assert large.read_text() == "then\n"
    assert small.read_text() == "short\n" and stuck.read_text() == "long enough\n"


def test_of_two_starts_at_once_the_second_is_told_so(tmp_path):
    told = pytest.raises(DeploymentError, match="the test is being started already")
    with alone(tmp_path / "start.lock", ""), told:
        start_detached(tmp_path, ["true"], "the test")


def test_an_interrupted_start_leaves_nothing_running(tmp_path):
    never = SUPERVISOR.replace('(folder / "nested").exists', "lambda: False")
    starting = (
        "import signal, sys;"
        # A shell's background job ignores it, and so would this.
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from pathlib import Path;"
        "from sonofed_common.supervision.control import start_detached;"
        "start_detached(Path(sys.argv[1]), [sys.executable, '-c', *sys.argv[2:]], 'the test')"
    )
    command = [sys.executable, "-c", starting, str(tmp_path), never, str(tmp_path)]
    process = subprocess.Popen([*command, str(free_port())], stderr=subprocess.DEVNULL)
    supervisor = wait_for(lambda: read_status(tmp_path)).supervisor
    wait_for((tmp_path / "nested").exists)
    everyone = family(tmp_path)
    assert len(everyone) == 4
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == -signal.SIGINT
    assert not supervisor.alive and not any(Identity.of(pid) for pid in everyone)


def test_a_program_does_not_start_where_a_stranger_answers(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        endpoint = f'Endpoint("127.0.0.1", {port}, "localhost", folder, "plain_port")'
        script = SUPERVISOR.replace("sleep, lambda: True", f"sleep, lambda: True, {{}}, {endpoint}")
        command = [sys.executable, "-c", script, str(tmp_path), str(free_port())]
        with pytest.raises(DeploymentError, match=rf"port {port} .* another plain_port"):
            start_detached(tmp_path, command, "the test")
    assert not (tmp_path / "plain.log").exists()


@pytest.mark.parametrize("there", [False, True])
def test_who_needs_another_machine_keeps_nobody_from_being_up(tmp_path, monkeypatch, there):
    """Nobody waits for one that does not answer, nor for ever for one that lets nobody in."""
    clock = time.monotonic

    def answers():
        # Asked once all others work; the time for it is then over.
        monkeypatch.setattr(time, "monotonic", lambda: clock() + START_SECONDS)
        return there

    never = SUPERVISOR.replace('(folder / "nested").exists', "lambda: False")
    command = [sys.executable, "-c", never, str(tmp_path), str(free_port())]
    try:
        status = start_detached(tmp_path, command, "the test", {"nest": answers})
        assert status.supervisor.alive and not status.healthy
        assert status.programs["plain"].state == "running"
    finally:
        stop(tmp_path, "the test")


def test_a_path_that_is_too_long_for_a_socket_answers_not(tmp_path):
    assert answers_on(tmp_path / ("x" * 108)) is False


def test_a_later_process_of_the_same_number_is_another(tmp_path):
    process = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    identity = Identity.of(process.pid)
    # In a container the supervisor is the first of all.
    assert identity.alive and Identity.of(1).alive
    assert not identity.model_copy(update={"started": identity.started - 1}).alive
    assert not identity.model_copy(update={"boot": "another"}).alive
    assert members("nothing", identity) == [process.pid]
    for update in ({"boot": "another"}, {"started": identity.started - 1}):
        assert members("nothing", identity.model_copy(update=update)) == []
    process.kill()
    # It has ended, and its number is still taken.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not identity.alive
    process.wait()
