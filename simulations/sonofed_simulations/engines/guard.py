"""Runs a command for as long as its parent lives: also after kill -9, nothing of it is left behind.

All that it started is ended, and the folder for its temporary files, which Ray leaves full, goes.

Use: ``python -m sonofed_simulations.engines.guard COMMAND [ARGUMENT ...]``
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from types import FrameType

import psutil

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 10
PREFIX = "sonofed-"


def main() -> None:
    """Run the command that the arguments name."""
    parent = os.getppid()
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A short path: Ray puts sockets under it, whose whole path may have 107 bytes.
    with tempfile.TemporaryDirectory(
        prefix=PREFIX, dir="/tmp", ignore_cleanup_errors=True
    ) as folder:
        environment = {**os.environ, "TMPDIR": folder, "RAY_TMPDIR": folder}
        process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, env=environment)
        try:
            while process.poll() is None and os.getppid() == parent:
                time.sleep(POLL_SECONDS)
        finally:
            _end(process)
    sys.exit(process.returncode)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _end(process: subprocess.Popen[bytes]) -> None:
    family = psutil.Process().children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_SECONDS / 2)
    for relative in alive:
        relative.kill()
    psutil.wait_procs(alive, timeout=PATIENCE_SECONDS / 2)


if __name__ == "__main__":
    main()
