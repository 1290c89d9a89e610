"""Runs a command for as long as its parent lives, and ends all that it started: also after kill -9.

Use: ``python -m sonofed_simulations.engines.guard COMMAND [ARGUMENT ...]``
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import FrameType

import psutil

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 10


def main() -> None:
    """Run the command that the arguments name."""
    parent = os.getppid()
    signal.signal(signal.SIGTERM, _leave)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
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


if __name__ == "__main__":
    main()
