"""Open the enclave of a site from its settings file."""

from __future__ import annotations

from pathlib import Path

from sonofed_client.enclave.enclave import InProcessEnclave
from sonofed_client.enclave.interface import Enclave
from sonofed_client.settings import read_site


def open_enclave(settings: str) -> Enclave:
    """Open the site whose settings file this is, in this process.

    Raises
    ------
    ConfigurationError
        The file does not validate.
    """
    return InProcessEnclave(read_site(Path(settings)))
