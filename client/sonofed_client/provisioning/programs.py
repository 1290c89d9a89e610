"""What runs at a hospital: the enclave, and the SuperNode that relays to it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from pydantic import ValidationError

from sonofed_client.provisioning.place import Hospital
from sonofed_client.relay import SOCKET_KEY
from sonofed_client.settings import read_site
from sonofed_common.contract.enrolment import Kit
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.supervision.program import Program, answers, answers_on


def programs(hospital: Hospital) -> list[Program]:
    """Return the hospital's programs, in the order of their start.

    Raises
    ------
    ConfigurationError
        No kit is installed, or ``site.toml`` names no socket.
    """
    relay = hospital.relay_settings
    socket = read_site(hospital.site).socket
    if socket is None:
        raise ConfigurationError(f"{hospital.site} names no socket; add: socket = '/run/...'")
    enclave = (str(beside("sonofed-site")), "enclave", "--site", str(hospital.site))
    supernode = (
        str(beside("flower-supernode")),
        *("--superlink", installed_kit(hospital).address),
        *("--root-certificates", str(hospital.authority)),
        *("--auth-supernode-private-key", str(hospital.node_key)),
        *("--node-config", f"{SOCKET_KEY}={json.dumps(str(socket))}"),
        *("--host", "127.0.0.1", "--port", str(relay.runtime_port)),
        # What it would start itself, it does not start again.
        *("--isolation", "process"),
    )
    executor = (
        str(beside("flower-superexec")),
        *("--runtime-api-address", f"127.0.0.1:{relay.runtime_port}", "--insecure"),
    )
    environment = _environment(hospital)
    return [
        Program("enclave", enclave, lambda: answers_on(socket)),
        Program("supernode", supernode, lambda: answers(relay.runtime_port), environment),
        Program("executor", executor, lambda: True, environment),
    ]


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


def beside(program: str) -> Path:
    """Return a program that was installed with this Python."""
    return Path(sys.executable).with_name(program)


def _environment(hospital: Hospital) -> dict[str, str]:
    home = hospital.run / "flower"
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
