"""Enclaves as processes of their own: one for each simulated site, as a hospital runs it."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import tomli_w

from sonofed_client.settings import read_site
from sonofed_common.contract.errors import EngineError
from sonofed_common.runtime import write_atomically

START_SECONDS = 300.0
END_SECONDS = 30.0
POLL_SECONDS = 0.1


@contextmanager
def enclave_processes(sites: Sequence[Path]) -> Iterator[list[Path]]:
    """Start the enclave of every site, and end them all afterwards whatever happens.

    Parameters
    ----------
    sites : sequence of Path
        Settings files.

    Yields
    ------
    list of Path
        Settings files of the same sites in the same order that name the enclaves' sockets. Each
        process writes to ``enclave.log`` beside them.

    Raises
    ------
    EngineError
        An enclave did not start.
    """
    # A short path: that of a socket may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="sonofed-", dir="/tmp") as folder, ExitStack() as stack:
        served = [
            _with_socket(site, Path(folder) / f"{number}.sock") for number, site in enumerate(sites)
        ]
        started = [stack.enter_context(_process(site)) for site in served]
        for site, process in zip(served, started, strict=True):
            _wait_until_it_answers(site, process)
        yield served


def _with_socket(site: Path, path: Path) -> Path:
    settings = read_site(site).model_copy(update={"socket": path})
    served = site.with_name(f"{site.stem}-process.toml")
    values = settings.model_dump(mode="json", exclude_none=True)
    write_atomically(served, tomli_w.dumps(values).encode())
    return served


@contextmanager
def _process(site: Path) -> Iterator[subprocess.Popen[bytes]]:
    # The guard ends an enclave also where this process is killed and cannot.
    command = [
        *(sys.executable, "-m", "sonofed_simulations.engines.guard"),
        *(str(Path(sys.executable).with_name("sonofed-site")), "enclave", "--site", str(site)),
    ]
    with _log(site).open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_it_answers(site: Path, process: subprocess.Popen[bytes]) -> None:
    settings = read_site(site)
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(settings.socket)) == 0:
                return
        time.sleep(POLL_SECONDS)
    raise EngineError(f"the enclave of site {settings.name} did not start; see {_log(site)}")


def _log(site: Path) -> Path:
    return site.with_name("enclave.log")
