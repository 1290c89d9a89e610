"""The relay's choice: the enclave behind a socket, or one in this process for a simulation."""

from __future__ import annotations

import importlib
import os
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sonofed_common.contract.errors import EngineError

if TYPE_CHECKING:
    from sonofed_client.enclave.interface import Enclave

SITES_VARIABLE = "SONOFED_SIMULATED_SITES"
"""Environment variable of a simulation: the sites' settings files, in the order of partitions."""

SOCKET_KEY = "enclave"
"""Key of a node's configuration that names the socket: ``--node-config 'enclave="/run/..."'``."""


def enclave_of(node_config: Mapping[str, Any]) -> Enclave:
    """Return the enclave that serves a node.

    Parameters
    ----------
    node_config : mapping
        The hospital's own words to its SuperNode; in a simulation, the number of the site.

    Raises
    ------
    EngineError
        It names neither a socket nor a simulated site.
    SonoFedError
        The simulated site cannot be opened.
    """
    socket = node_config.get(SOCKET_KEY)
    if socket:
        return _behind(str(socket))
    files = [f for f in os.environ.get(SITES_VARIABLE, "").split(os.pathsep) if f]
    partition = int(str(node_config.get("partition-id", -1)))
    if not 0 <= partition < len(files):
        raise EngineError("this node has no site; start it with its enclave's socket")
    return _of_simulation(files[partition])


@lru_cache(maxsize=64)
def _of_simulation(settings: str) -> Enclave:
    socket = _socket(Path(settings))
    if socket is not None:
        return _behind(socket)
    # Imported by name: the relay itself never loads torch or a model.
    opening = importlib.import_module("sonofed_client.enclave.opening")
    enclave: Enclave = opening.open_enclave(settings)
    return enclave


@lru_cache(maxsize=64)
def _behind(socket: str) -> Enclave:
    from sonofed_client.enclave.transport import SocketEnclave

    return SocketEnclave(Path(socket))


def _socket(settings: Path) -> str | None:
    # Settings that cannot be read are for the opening to refuse.
    try:
        socket = tomllib.loads(settings.read_text(encoding="utf-8")).get("socket")
    except (OSError, ValueError):
        return None
    return socket if isinstance(socket, str) else None
