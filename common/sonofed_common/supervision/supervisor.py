"""The supervisor: starts programs, starts again those that end, and tells how they are."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.errors import DeploymentError
from sonofed_common.runtime import end_signals, write_atomically
from sonofed_common.supervision.family import Identity, end, marks, members
from sonofed_common.supervision.logs import set_large_aside
from sonofed_common.supervision.metrics import Source, exposition, program_metrics
from sonofed_common.supervision.program import END_SECONDS, Child, Program, ProgramStatus, mark

STEP_SECONDS = 0.1
MINUTE = 60.0
LOCK = "supervisor.lock"

log = logging.getLogger(__name__)


class Status(Model):
    """What a supervisor says of itself and its programs; ``supervisor.json``."""

    title: str
    supervisor: Identity
    health_port: int
    programs: dict[str, ProgramStatus]

    @property
    def healthy(self) -> bool:
        """Whether every program works."""
        return all(p.state == "running" for p in self.programs.values())


def supervise(
    folder: Path,
    title: str,
    health_port: int,
    programs: Sequence[Program],
    more: Source = tuple,
    before: Callable[[], object] = lambda: None,
) -> None:
    """Run programs until this process is asked to end; then end them in the reverse order.

    Parameters
    ----------
    folder : Path
        Gets ``supervisor.json``, and a log of each program; made if absent.
    title : str
        What they are together.
    health_port : int
        ``GET /healthz`` on the loopback: 200 when every program works, else 503. ``GET /metrics``:
        what Prometheus reads.
    programs : sequence of Program
        In the order of their start.
    more : callable
        Metrics beside those of the programs.
    before : callable
        Writes what the programs read, once it is sure that no other supervisor's do.

    Raises
    ------
    DeploymentError
        Another supervisor runs them, or a port is taken.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _only_supervisor(folder, title):
        _end_what_was_left(folder, 0.0)
        before()
        for program in programs:
            if program.endpoint is not None:
                program.endpoint.require_free()
        asked_to_end = end_signals()
        children = [Child(program, folder) for program in programs]
        own = Identity.of(os.getpid())
        assert own is not None

        def status() -> Status:
            each = {child.program.name: child.status for child in children}
            return Status(title=title, supervisor=own, health_port=health_port, programs=each)

        def metrics() -> bytes:
            return exposition(lambda: program_metrics(status().programs), more)

        with _health(health_port, status, metrics):
            log.info("the supervisor begins")
            try:
                looked, written = -MINUTE, True
                while not asked_to_end:
                    # Each minute, for somebody may have damaged it.
                    due = time.monotonic() - looked > MINUTE
                    if due:
                        looked = time.monotonic()
                        set_large_aside(folder)
                    changes = [child.step() for child in children]
                    if due or any(changes) or not written:
                        written = _write(folder, status(), warn=written)
                    time.sleep(STEP_SECONDS)
            finally:
                for child in reversed(children):
                    child.end()
                log.info("the supervisor ends, and with it its programs")
                state_file(folder).unlink(missing_ok=True)


def read_status(folder: Path) -> Status | None:
    """Return what the supervisor of a folder last said, or None if there is none that runs."""
    kept = _read(folder)
    return kept if kept is not None and kept.supervisor.alive else None


def find_status(folder: Path, title: str) -> Status | None:
    """Do as `read_status`, and take no supervisor for gone whose state is damaged.

    Parameters
    ----------
    folder : Path
        The supervisor's.
    title : str
        What its programs are together.

    Raises
    ------
    DeploymentError
        A supervisor runs, and what it last said cannot be read.
    """
    if _read(folder) is None and _is_supervised(folder):
        raise DeploymentError(
            f"{title} is up, and {state_file(folder)}, which says how, cannot be read; it is "
            "written anew within a minute: ask again then"
        )
    return read_status(folder)


def left_running(folder: Path) -> list[str]:
    """Return the names of programs that run on although their supervisor was killed."""
    if read_status(folder) is not None or (_read(folder) is None and _is_supervised(folder)):
        return []
    return [
        name for name, leader in _leaders(folder).items() if members(mark(folder, name), leader)
    ]


def end_left_running(folder: Path, title: str) -> bool:
    """End the programs of a supervisor that was killed.

    Parameters
    ----------
    folder : Path
        The supervisor's.
    title : str
        What its programs are together.

    Returns
    -------
    bool
        Whether any ran.

    Raises
    ------
    DeploymentError
        Another supervisor begins just now.
    """
    if not left_running(folder):
        return False
    with _only_supervisor(folder, title):
        _end_what_was_left(folder, END_SECONDS)
        state_file(folder).unlink(missing_ok=True)
    return True


def state_file(folder: Path) -> Path:
    """Where a supervisor keeps its state."""
    return folder / "supervisor.json"


def _read(folder: Path) -> Status | None:
    try:
        return Status.model_validate_json(state_file(folder).read_bytes())
    except (OSError, ValidationError):
        return None


def _write(folder: Path, status: Status, warn: bool) -> bool:
    data = status.model_dump_json(indent=1).encode()
    try:
        write_atomically(state_file(folder), data, mode=0o600)
    except OSError as error:
        # Programs go on without: the disk may be full.
        if warn:
            facts = {"reason": error.strerror}
            log.warning("the supervisor's state cannot be written, and is tried again", extra=facts)
        return False
    return True


def _end_what_was_left(folder: Path, patience: float) -> None:
    for name, leader in reversed(_leaders(folder).items()):
        end(mark(folder, name), leader, patience)


def _leaders(folder: Path) -> dict[str, Identity | None]:
    """Who led each program, as the state says, or where it does not, their marks."""
    kept = _read(folder)
    told = {name: p.identity for name, p in kept.programs.items()} if kept is not None else {}
    for each, first in marks().items():
        name = Path(each).name
        if each == mark(folder, name) and told.get(name) is None:
            told[name] = first
    return told


@contextmanager
def alone(lock: Path, otherwise: str) -> Iterator[None]:
    """Hold a lock, which a process that dies gives back.

    Raises
    ------
    DeploymentError
        Another process holds it, said in the words of `otherwise`.
    """
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DeploymentError(otherwise) from None
        yield


def _only_supervisor(folder: Path, title: str) -> AbstractContextManager[None]:
    return alone(folder / LOCK, f"{title} is up already; see its status")


def _is_supervised(folder: Path) -> bool:
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


@contextmanager
def _health(
    port: int, status: Callable[[], Status], metrics: Callable[[], bytes]
) -> Iterator[None]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/healthz":
                now = status()
                body = json.dumps({"healthy": now.healthy, **now.model_dump(mode="json")})
                self._answer(200 if now.healthy else 503, "application/json", body.encode())
            elif self.path == "/metrics":
                self._tell_metrics()
            else:
                self.send_error(404)

        def do_HEAD(self) -> None:
            self.do_GET()

        def _tell_metrics(self) -> None:
            try:
                told = metrics()
            except Exception:
                log.exception("the metrics cannot be told")
                self.send_error(500)
            else:
                self._answer(200, CONTENT_TYPE_LATEST, told)

        def _answer(self, code: int, kind: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing of each question."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            """Log it: what is printed by default is no JSON."""
            log.warning("an answer could not be given", exc_info=True)

    try:
        server = Server(("127.0.0.1", port), Handler)
    except OSError as error:
        raise DeploymentError(
            f"port {port} of this machine's loopback cannot be used ({error.strerror}); name "
            "another health_port"
        ) from None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
