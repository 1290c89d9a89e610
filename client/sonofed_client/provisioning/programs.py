"""What runs at a hospital: the enclave, and the SuperNode that relays to it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic import ValidationError

from sonofed_client.metrics_file import STALE_SECONDS, metrics_file
from sonofed_client.provisioning.place import Hospital
from sonofed_client.relay import SOCKET_KEY
from sonofed_client.settings import read_site
from sonofed_common.contract.enrolment import Kit
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.log import told
from sonofed_common.supervision.probes import fresh
from sonofed_common.supervision.program import Program, answers_on

SUPERNODE = "supernode"
HEARTBEAT_SECONDS = 30.0
"""Flower's interval, within which the next heartbeat comes."""


def programs(hospital: Hospital, relay_only: bool = False) -> list[Program]:
    """Return the hospital's programs, in the order of their start.

    Parameters
    ----------
    hospital : Hospital
        A kit is installed.
    relay_only : bool
        Without the enclave, whose settings this account need not be able to read.

    Raises
    ------
    ConfigurationError
        No kit is installed, or the settings name no socket.
    """
    socket = socket_of(hospital, relay_only)
    enclave = () if relay_only else (_enclave(hospital),)
    return [*enclave, _supernode(hospital, socket)]


def socket_of(hospital: Hospital, relay_only: bool = False) -> Path:
    """Return the enclave's socket.

    Raises
    ------
    ConfigurationError
        No kit is installed, or the settings name no socket.
    """
    socket = hospital.relay_settings.socket
    if socket is None and not relay_only:
        socket = read_site(hospital.site).socket
    if socket is None:
        file = hospital.relay if relay_only else hospital.site
        raise ConfigurationError(f"{file} names no socket; add: socket = '/run/...'")
    return socket


def _enclave(hospital: Hospital) -> Program:
    socket = read_site(hospital.site).socket
    command = (str(beside("sonofed-site")), "enclave", "--site", str(hospital.site))

    def ready() -> bool:
        # Who is stopped still has a socket that takes connections, and writes no metrics.
        return (
            socket is not None and answers_on(socket) and fresh(metrics_file(socket), STALE_SECONDS)
        )

    return Program("enclave", command, ready)


def _supernode(hospital: Hospital, socket: Path) -> Program:
    kit, heartbeat = installed_kit(hospital), hospital.heartbeat
    command = (
        *(sys.executable, "-m", "sonofed_client.supernode"),
        *("--superlink", kit.address),
        *("--root-certificates", str(hospital.authority)),
        *("--auth-supernode-private-key", str(hospital.node_key)),
        *("--node-config", f"{SOCKET_KEY}={json.dumps(str(socket))}"),
        *("--heartbeat", str(heartbeat)),
    )
    environment = {**_environment(hospital), **told(SUPERNODE, site=kit.site)}
    return Program(
        SUPERNODE, command, lambda: fresh(heartbeat, HEARTBEAT_SECONDS), environment, sign=heartbeat
    )


def installed_kit(hospital: Hospital) -> Kit:
    """Return what the installed kit says.

    Raises
    ------
    ConfigurationError
        There is none, or it is damaged.
    """
    try:
        return Kit.model_validate_json((hospital.kit / "kit.json").read_bytes())
    except (OSError, ValidationError):
        raise ConfigurationError(
            f"{hospital.root} holds no installed kit; run 'sonofed-site install KIT' there first"
        ) from None


def site_of(hospital: Hospital) -> str | None:
    """Return the site whose kit is installed, or None."""
    try:
        return installed_kit(hospital).site
    except ConfigurationError:
        return None


def beside(program: str) -> Path:
    """Return a program that was installed with this Python."""
    return Path(sys.executable).with_name(program)


def _environment(hospital: Hospital) -> dict[str, str]:
    home = hospital.run / "flower"
    # One by one: a parent that is made along with a folder is open to all.
    for folder in (hospital.run, home):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
