"""What a relay may ask of an enclave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sonofed_common.contract.records import Records


class Enclave(Protocol):
    """An enclave, wherever it runs."""

    def perform(self, action: str, request: Records) -> Records:
        """Do one named action."""
        ...


class Worker(Enclave, Protocol):
    """An enclave in this process, which says beforehand what it would refuse."""

    def admit(self, action: str, request: Records) -> Callable[[], None]:
        """Refuse what `perform` would refuse before any work.

        What it returns refuses, later on, what was denied since.
        """
        ...
