"""Keep the SuperLink's nodes as the enrolment records say."""

from __future__ import annotations

import json
from pathlib import Path

from sonofed_common.runtime import write_atomically
from sonofed_server.provisioning.enrolment import records
from sonofed_server.provisioning.project import Coordinator
from sonofed_server.study.flower import CONNECTION, ask, key_file

GONE = "unregistered"


def register(coordinator: Coordinator) -> list[str]:
    """Register enrolled hospitals, and unregister revoked ones and whoever else is registered.

    While a record is damaged, keys that no record names stay as they are: one of them is its.

    Returns
    -------
    list of str
        What was done, and which records are damaged, in words.

    Raises
    ------
    EngineError
        The SuperLink is not there or refuses.
    """
    listed = ask(coordinator, "supernode", "list", CONNECTION)["nodes"]
    there = {str(node["node-id"]) for node in listed if node["status"] != GONE}
    # Numbers of a database that is gone are of no use.
    known = {key: node for key, node in _read(_file(coordinator)).items() if node in there}
    found, damaged = records(coordinator)
    every = found.values()
    wanted = {record.node_key: record.site for record in every if not record.revoked}
    kept = set(wanted)
    if damaged:
        revoked = {key for record in every for key in record.revoked_keys}
        kept |= known.keys() - revoked
    done = list(damaged.values())
    # Strangers too: for example a node whose number was lost when this was killed.
    for node in sorted(there - {known[key] for key in kept & known.keys()}):
        ask(coordinator, "supernode", "unregister", node, CONNECTION)
        done.append(f"node {node} is unregistered")
    known = {key: node for key, node in known.items() if key in kept}
    for key, site in wanted.items():
        if key not in known:
            file = key_file(coordinator, site, key)
            words = ("supernode", "register", str(file), CONNECTION, "--name", site)
            known[key] = str(ask(coordinator, *words)["node-id"])
            _write(_file(coordinator), known)
            done.append(f"site {site} is registered as node {known[key]}")
    _write(_file(coordinator), known)
    return done


def _file(coordinator: Coordinator) -> Path:
    # Beside the database, whose numbers they are.
    return coordinator.flower / "nodes.json"


def _read(path: Path) -> dict[str, str]:
    try:
        return {str(k): str(v) for k, v in json.loads(path.read_bytes()).items()}
    except (OSError, ValueError):
        return {}


def _write(path: Path, known: dict[str, str]) -> None:
    write_atomically(path, json.dumps(known, indent=1).encode())
