"""What runs at a coordinator: the SuperLink, the front before it, and the conductor of studies."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sonofed_common.log import told
from sonofed_common.supervision.probes import Endpoint, fresh
from sonofed_common.supervision.program import Program
from sonofed_server.provisioning.front import find_nginx, front_file
from sonofed_server.provisioning.project import Coordinator

ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}
"""Where one calls who listens on every address."""

CONDUCTOR_SECONDS = 360.0
"""Longer than the conductor's longest piece of work, a question to the SuperLink."""


def programs(coordinator: Coordinator, project: Path) -> list[Program]:
    """Return the coordinator's programs, in the order of their start; `write_front` comes before.

    Parameters
    ----------
    coordinator : Coordinator
        Initialised.
    project : Path
        The project's file.

    Raises
    ------
    DeploymentError
        nginx is not installed.
    """
    port, environment = coordinator.project.superlink_port, flower_environment(coordinator)
    superlink = (
        *(sys.executable, "-m", "sonofed_server.study.superlink"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--database", str(coordinator.flower / "superlink.sqlite")),
        *("--ssl-certfile", str(coordinator.superlink_certificate)),
        *("--ssl-keyfile", str(coordinator.superlink_key)),
        *("--ssl-ca-certfile", str(coordinator.authority)),
        "--enable-supernode-auth",
        "--disable-runtime-dependency-installation",
        # What it would start itself, it does not start again.
        *("--isolation", "process"),
    )
    executor = (
        str(beside("flower-superexec")),
        *("--runtime-api-address", f"127.0.0.1:{port}"),
        *("--root-certificates", str(coordinator.authority)),
    )
    front = (find_nginx(), "-p", str(coordinator.run), "-c", str(front_file(coordinator)))
    conductor = (str(beside("sonofed-coordinator")), "conduct", "--project", str(project.resolve()))
    inside, outside = endpoints(coordinator)
    registered, sign = coordinator.registered, coordinator.conductor_sign
    return [
        Program(
            "superlink",
            superlink,
            inside.works,
            {**environment, **told("superlink")},
            endpoint=inside,
        ),
        Program(
            "executor",
            executor,
            lambda: True,
            # It throws away what a ServerApp says on stderr.
            {
                **environment,
                **told("serverapp", coordinator.run / "serverapp.log"),
                # Sums are kept there: /tmp may be in memory.
                "TMPDIR": str(coordinator.run),
                # The C library would keep the room of every part of a message for later ones.
                "MALLOC_MMAP_THRESHOLD_": str(2**20),
            },
        ),
        Program("front", (*front, "-e", "stderr"), outside.works, endpoint=outside),
        Program(
            "conductor",
            conductor,
            # A hospital's node that comes before it is registered is taken for a stranger's.
            lambda: registered.exists() and fresh(sign, CONDUCTOR_SECONDS),
            sign=sign,
        ),
    ]


def endpoints(coordinator: Coordinator) -> tuple[Endpoint, Endpoint]:
    """Return where the SuperLink and where the front answers, as this machine asks them."""
    project = coordinator.project
    superlink = Endpoint(
        host="127.0.0.1",
        port=project.superlink_port,
        name="localhost",
        authority=coordinator.authority,
        setting="superlink_port",
        path="/health",
    )
    front = Endpoint(
        host=ANY.get(project.listen, project.listen.strip("[]")),
        port=project.port,
        name=project.host,
        authority=coordinator.authority,
        setting="port in address",
    )
    return superlink, front


def flower_environment(coordinator: Coordinator) -> dict[str, str]:
    """Return the environment of Flower's programs: nothing is told to anyone, nothing installed."""
    coordinator.flower.mkdir(parents=True, exist_ok=True, mode=0o700)
    return {
        "FLWR_HOME": str(coordinator.flower),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def beside(program: str) -> Path:
    """Return a program that was installed with this Python."""
    return Path(sys.executable).with_name(program)
