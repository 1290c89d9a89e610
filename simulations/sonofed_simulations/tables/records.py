"""Files of cells, features and images, as they are found again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.records import Records, from_bytes


def read_records(path: Path, origin: Mapping[str, Any]) -> Records | None:
    """Read what a run kept; None where there is nothing of this origin, or it is damaged."""
    if not path.exists():
        return None
    try:
        records = from_bytes(path.read_bytes())
    except ParameterError:
        return None
    return records if records.config.get("origin") == dict(origin) else None
