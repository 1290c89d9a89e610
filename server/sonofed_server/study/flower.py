"""Flower's own command line, for what a coordinator asks of its SuperLink."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import tomli_w

from sonofed_common.contract.errors import EngineError
from sonofed_common.runtime import write_atomically
from sonofed_server.provisioning.programs import beside, flower_environment
from sonofed_server.provisioning.project import Coordinator
from sonofed_server.study.workspace import Workspace

CONNECTION = "coordinator"
SECONDS = 300.0


def ask(coordinator: Coordinator, *words: str) -> dict[str, Any]:
    """Run a command of ``flwr`` on the coordinator's SuperLink and return its JSON answer.

    Raises
    ------
    EngineError
        The SuperLink is not there or refuses.
    """
    connection = {
        "address": f"127.0.0.1:{coordinator.project.superlink_port}",
        "root-certificates": str(coordinator.authority),
    }
    environment = {**os.environ, **flower_environment(coordinator)}
    values = {"superlink": {CONNECTION: connection}}
    write_atomically(coordinator.flower / "config.toml", tomli_w.dumps(values).encode())
    try:
        done = subprocess.run(
            [str(beside("flwr")), *words, "--format", "json"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    except (subprocess.TimeoutExpired, ValueError):
        answer = {"success": False, "error-message": "no answer"}
    if not answer.get("success"):
        said = " ".join(str(answer.get("error-message", answer)).split())[:300]
        raise EngineError(f"the SuperLink did not do '{words[0]}': {said}")
    return answer


def submit(coordinator: Coordinator, workspace: Workspace) -> str:
    """Begin a study's run and return Flower's number of it.

    Raises
    ------
    EngineError
        See `ask`.
    """
    app = workspace.root / "app"
    write_atomically(
        app / "pyproject.toml", tomli_w.dumps(app_bundle(workspace, "deployment")).encode()
    )
    return str(ask(coordinator, "run", str(app), CONNECTION)["run-id"])


def app_bundle(workspace: Workspace, engine: str) -> dict[str, object]:
    """Return the pyproject of the app bundle: it names installed components and ships no code."""
    components = {"serverapp": "sonofed_server.app:app", "clientapp": "sonofed_client.app:app"}
    config = {"workspace": str(workspace.root), "engine": engine}
    return {
        "project": {
            "name": "sonofed-study",
            "version": "1.0.0",
            "license": "Apache-2.0",
            "dependencies": [],
        },
        "tool": {
            "flwr": {
                "app": {"publisher": "sonofed", "components": components, "config": config},
            }
        },
    }


def key_file(coordinator: Coordinator, site: str, node_key: str) -> Path:
    """Write a node's public key where Flower's command reads it."""
    path = coordinator.flower / "keys" / f"{site}.pub"
    write_atomically(path, f"{node_key}\n".encode())
    return path
