"""What a relay may ask of an enclave."""

from __future__ import annotations

from typing import Protocol

from sonofed_common.contract.records import Records


class Enclave(Protocol):
    """An enclave, wherever it runs."""

    def perform(self, action: str, request: Records) -> Records:
        """Do one named action."""
        ...
