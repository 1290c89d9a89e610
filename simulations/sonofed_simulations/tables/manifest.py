"""The manifest of a table: what it was made of, so that another can make it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sonofed_common.runtime import write_atomically
from sonofed_server.study.report import this_machine
from sonofed_simulations.scenarios.scenario import Scenario
from sonofed_simulations.tables.cells import Cell
from sonofed_simulations.tables.features import HospitalImages, Start, split_of
from sonofed_simulations.tables.settings import SelectionTable, SplitName

LIBRARIES = ("sonofed", "torch", "numpy", "scipy", "scikit-learn", "scikit-activeml")


def write_manifest(
    out: Path,
    table: SelectionTable,
    scenario: Scenario,
    start: Start,
    hospitals: Sequence[HospitalImages],
    cells: Sequence[Cell],
) -> None:
    """Write ``manifest.json``: data, splits, seeds, versions and machine.

    Notes
    -----
    ``splits`` digests the patients of each test part, so that another's splits can be compared.
    """
    facts = {
        "table": table.model_dump(mode="json"),
        "source": {
            "bundle": start.bundle,
            "settings": scenario.source.model_dump(mode="json", exclude_none=True),
        },
        "data": {h.name: h.provenance.model_dump(mode="json") for h in hospitals},
        "splits": _splits(table, hospitals),
        "seeds": list(table.seeds),
        "versions": {name: version(name) for name in LIBRARIES},
        "machine": this_machine().model_dump(mode="json"),
        "cells": len(cells),
    }
    text = json.dumps(facts, indent=2, sort_keys=True)
    write_atomically(out / "manifest.json", f"{text}\n".encode())


def _splits(table: SelectionTable, hospitals: Sequence[HospitalImages]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (SplitName(s, f) for s in table.seeds for f in range(table.folds)):
        parts = found.setdefault(str(name), {})
        for hospital in hospitals:
            split = split_of(hospital, table, name)
            patients = sorted({sample.group for sample in split.test})
            digest = hashlib.sha256("\n".join(patients).encode()).hexdigest()
            counts = {"pool": len(split.pool), "test": len(split.test)}
            parts[hospital.name] = {**counts, "test_patients": digest[:16]}
    return found
