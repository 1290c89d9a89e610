"""The Flower engine: Flower's own simulation runtime with a code-free app bundle.

An ephemeral SuperLink is started on a free loopback port, the app bundle that names our installed
apps is submitted to it, and everything is ended afterwards whatever happens.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import tomli_w

from sonofed_client.app import SITES_VARIABLE
from sonofed_common.contract.errors import EngineError, error_from_code
from sonofed_common.contract.results import Results, read_results
from sonofed_common.runtime import Events
from sonofed_server.study.failure import read_failure
from sonofed_server.study.flower import app_bundle
from sonofed_server.study.workspace import Workspace

START_SECONDS = 60
POLL_SECONDS = 0.2
SETTLE_SECONDS = 20
CONNECTION = "lab"


def run_flower(
    workspace: Workspace, sites: list[Path], events: Events, threads: int | None
) -> Results:
    """Run a study on Flower's simulation (Ray).

    Parameters
    ----------
    workspace : Workspace
        Laid out study.
    sites : list of Path
        Settings files in the order of the cohort.
    events : Events
        Progress; the study's own events are followed as they are written.
    threads : int or None
        CPUs per simulated site; None gives each all of them, one site after another.

    Raises
    ------
    EngineError
        The runtime did not start, or died without a result.
    SonoFedError
        The study failed.
    """
    workspace.results.unlink(missing_ok=True)
    workspace.failure.unlink(missing_ok=True)
    home = workspace.root / "flower"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    environment = _environment(home, sites)
    seen = workspace.events.stat().st_size if workspace.events.exists() else 0
    with _superlink(home, environment) as (process, port):
        _submit(workspace, home, environment, port, len(sites), threads)
        _follow(workspace, process, home, events, seen)
    return read_results(workspace.results)


def _environment(home: Path, sites: list[Path]) -> dict[str, str]:
    return {
        **os.environ,
        SITES_VARIABLE: os.pathsep.join(str(path.resolve()) for path in sites),
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


@contextmanager
def _superlink(
    home: Path, environment: dict[str, str]
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    port = _free_port()
    command = [
        *(sys.executable, "-m", "sonofed_simulations.engines.guard"),
        *("flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"),
        *("--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"),
    ]
    with (home / "superlink.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        _wait_until_up(process, port, home)
        yield process, port
    finally:
        _end(process)


def _wait_until_up(process: subprocess.Popen[bytes], port: int, home: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(POLL_SECONDS)
    raise EngineError(f"Flower's SuperLink did not start; see {home / 'superlink.log'}")


def _submit(
    workspace: Workspace,
    home: Path,
    environment: dict[str, str],
    port: int,
    nodes: int,
    threads: int | None,
) -> None:
    app = home / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(
        tomli_w.dumps(app_bundle(workspace, "flower")), encoding="utf-8"
    )
    connection = {"superlink": {CONNECTION: {"address": f"127.0.0.1:{port}", "insecure": True}}}
    (home / "config.toml").write_text(tomli_w.dumps(connection), encoding="utf-8")
    cores = os.cpu_count() or 1
    federation = (
        f"num-supernodes={nodes} client-resources-num-cpus={min(threads or cores, cores)} "
        f"init-args-num-cpus={cores} init-args-log-to-driver=false"
    )
    command = [
        "flwr",
        "run",
        str(app),
        CONNECTION,
        "--federation-config",
        federation,
        "--format",
        "json",
    ]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        reason = " ".join((answer.stdout + answer.stderr).split())[-300:]
        raise EngineError(f"Flower refused the study: {reason}")


def _follow(
    workspace: Workspace,
    process: subprocess.Popen[bytes],
    home: Path,
    events: Events,
    seen: int,
) -> None:
    quiet_since, patience = time.monotonic(), START_SECONDS
    while True:
        seen = _read_events(workspace, events, seen)
        if (failure := read_failure(workspace)) is not None:
            raise error_from_code(failure.error, failure.message)
        if workspace.results.exists():
            _read_events(workspace, events, seen)
            return
        if process.poll() is not None:
            raise EngineError(f"Flower's SuperLink died; see {home / 'superlink.log'}")
        if _simulating(process):
            quiet_since, patience = time.monotonic(), SETTLE_SECONDS
        elif time.monotonic() - quiet_since > patience:
            raise EngineError(f"Flower's run ended without a result; see {home / 'superlink.log'}")
        time.sleep(POLL_SECONDS)


def _simulating(process: subprocess.Popen[bytes]) -> bool:
    """Whether the SuperLink has a simulation process: not before the start, nor after the end."""
    try:
        names = [
            " ".join(p.cmdline()) for p in psutil.Process(process.pid).children(recursive=True)
        ]
    except psutil.Error:
        return True
    return any("flwr-simulation" in name for name in names)


def _read_events(workspace: Workspace, events: Events, seen: int) -> int:
    if not workspace.events.exists():
        return seen
    with workspace.events.open("rb") as file:
        file.seek(seen)
        for line in file:
            if not line.endswith(b"\n"):
                break
            seen += len(line)
            for listener in events.listeners:
                listener(json.loads(line))
    return seen


def _end(guard: subprocess.Popen[bytes]) -> None:
    """End the guard, which ends the SuperLink and everything that it started."""
    guard.terminate()
    guard.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
