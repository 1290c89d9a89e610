"""Start a supervisor in the background, ask how it is, and end it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from json import dumps
from pathlib import Path
from types import MappingProxyType

from sonofed_common.contract.errors import DeploymentError
from sonofed_common.log import last_words
from sonofed_common.supervision.supervisor import (
    Status,
    alone,
    end_left_running,
    find_status,
    left_running,
    read_status,
)

START_SECONDS, END_SECONDS = 180.0, 120.0
POLL_SECONDS = 0.1
CODE = re.compile(r" \[[a-z-]+\]$")


def start_detached(
    folder: Path,
    command: Sequence[str],
    title: str,
    elsewhere: Mapping[str, Callable[[], bool]] = MappingProxyType({}),
) -> Status:
    """Start a supervisor that outlives this process, and wait until all its programs work.

    Parameters
    ----------
    folder : Path
        The supervisor's.
    command : sequence of str
        Starts it in the foreground.
    title : str
        What its programs are together.
    elsewhere : mapping of str to callable, optional
        Of programs that need another machine, or long: whether that one answers, so that they are
        waited for. Whether they then work or not, the others stay up, and these go on trying.

    Raises
    ------
    DeploymentError
        It is up already or being started, it ended, or its programs do not come to work; then none
        is left running, nor after an interrupt.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Of two at once, the second would take the first one's words for those of its own supervisor.
    with alone(folder / "start.lock", f"{title} is being started already; see its status"):
        if find_status(folder, title) is not None:
            raise DeploymentError(f"{title} is up already; see its status")
        log = folder / "supervisor.log"
        with log.open("ab") as file:
            before = file.tell()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
            )
        try:
            return _wait_until_it_works(folder, process, title, elsewhere, log, before)
        except KeyboardInterrupt:
            _end(process)
            raise


def _wait_until_it_works(
    folder: Path,
    process: subprocess.Popen[bytes],
    title: str,
    elsewhere: Mapping[str, Callable[[], bool]],
    log: Path,
    before: int,
) -> Status:
    until = time.monotonic() + START_SECONDS
    in_time = True
    while in_time:
        in_time = time.monotonic() < until
        if process.poll() is not None:
            words = last_words(log.read_bytes()[before:].decode(errors="replace"))[-500:]
            # The error that is raised here has a code of its own.
            words = CODE.sub("", words) or "it said nothing"
            raise DeploymentError(f"{title} ended at once: {words}")
        status = read_status(folder)
        if status is not None and status.supervisor.pid == process.pid:
            idle = [name for name, p in status.programs.items() if p.state != "running"]
            if all(name in elsewhere and not (in_time and elsewhere[name]()) for name in idle):
                return status
        time.sleep(POLL_SECONDS)
    status = read_status(folder)
    _end(process)
    lines = "; ".join(describe(status)) if status is not None else "it said nothing"
    raise DeploymentError(f"{title} did not come up: {lines}; see the logs in {folder}")


def _end(process: subprocess.Popen[bytes]) -> None:
    # It ends its programs itself.
    process.terminate()
    process.wait()


def stop(folder: Path, title: str) -> bool:
    """End the supervisor of a folder with all its programs, or those that one left that was killed.

    Parameters
    ----------
    folder : Path
        The supervisor's.
    title : str
        What its programs are together.

    Returns
    -------
    bool
        Whether any of them ran.

    Raises
    ------
    DeploymentError
        It does not end, or its state is damaged.
    """
    status = find_status(folder, title)
    if status is None:
        return end_left_running(folder, title)
    os.kill(status.supervisor.pid, signal.SIGTERM)
    until = time.monotonic() + END_SECONDS
    while status.supervisor.alive:
        if time.monotonic() > until:
            raise DeploymentError(
                f"{title} does not end; its supervisor is process {status.supervisor.pid}"
            )
        time.sleep(POLL_SECONDS)
    return True


def say_status(folder: Path, title: str, json: bool) -> int:
    """Print how the programs of a folder are.

    Parameters
    ----------
    folder : Path
        The supervisor's.
    title : str
        What its programs are together.
    json : bool
        For machines: the status, ``null`` where nothing runs, or who runs on as ``left_running``.

    Returns
    -------
    int
        Exit code: 0 if all of them work.

    Raises
    ------
    DeploymentError
        They run, and their supervisor's state is damaged.
    """
    status, left = find_status(folder, title), left_running(folder)
    if json:
        said = status.model_dump_json() if status is not None else "null"
        print(dumps({"left_running": left}) if left else said)
    elif status is not None:
        for line in describe(status):
            print(line)
    elif left:
        print(
            f"the supervisor of {title} was killed, and {', '.join(left)} run on: "
            "'up' starts all anew, 'down' ends them"
        )
    else:
        print(f"{title} is not up")
    return 0 if status is not None and status.healthy else 1


def describe(status: Status) -> Iterator[str]:
    """Say in lines how each program is."""
    for name, program in status.programs.items():
        since = datetime.fromtimestamp(program.since).astimezone().isoformat(timespec="seconds")
        line = f"{name:<10} {program.state:<8} since {since}, {program.restarts} restarts"
        yield f"{line}, last {program.reason}" if program.reason else line
