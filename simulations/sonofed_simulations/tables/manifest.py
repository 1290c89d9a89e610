"""The manifest of a table: what it was made of, so that another can make it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sonofed_common.data.splits import Split
from sonofed_common.runtime import write_atomically
from sonofed_server.study.report import this_machine
from sonofed_simulations.tables.cells import Cell
from sonofed_simulations.tables.hospitals import HospitalImages, split_of
from sonofed_simulations.tables.material import Material
from sonofed_simulations.tables.settings import SelectionTable, SplitName

LIBRARIES = (
    "sonofed",
    "torch",
    "numpy",
    "scipy",
    "scikit-learn",
    "scikit-activeml",
    "monai",
    "diffusers",
    "transformers",
)


def write_facts(out: Path, facts: Mapping[str, Any]) -> None:
    """Write ``manifest.json``: the facts of a table, with versions and machine."""
    whole = {
        **facts,
        "versions": {name: version(name) for name in LIBRARIES},
        "machine": this_machine().model_dump(mode="json"),
    }
    text = json.dumps(whole, indent=2, sort_keys=True)
    write_atomically(out / "manifest.json", f"{text}\n".encode())


def split_facts(split: Split) -> dict[str, Any]:
    """Count both parts, and digest the patients of the test part, to compare splits by."""
    digest = patients_digest(sample.group for sample in split.test)
    return {"pool": len(split.pool), "test": len(split.test), "test_patients": digest}


def patients_digest(patients: Iterable[str]) -> str:
    """Digest patients, in whatever order and however often each comes."""
    return hashlib.sha256("\n".join(sorted(set(patients))).encode()).hexdigest()[:16]


def write_manifest(out: Path, material: Material, cells: Sequence[Cell]) -> None:
    """Write the manifest of a selection table."""
    table, source = material.table, material.laboratory.scenario.source
    facts = {
        "table": table.model_dump(mode="json"),
        "source": {
            "bundle": next(iter(material.starts.values())).bundle,
            "weights": [start.origin for start in material.starts.values()],
            "settings": source.model_dump(mode="json", exclude_none=True),
        },
        "data": {h.name: h.provenance.model_dump(mode="json") for h in material.hospitals},
        "splits": _splits(table, material.hospitals),
        "seeds": list(table.seeds),
        "cells": len(cells),
    }
    write_facts(out, facts)


def _splits(table: SelectionTable, hospitals: Sequence[HospitalImages]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (SplitName(s, f) for s in table.seeds for f in range(table.folds)):
        parts = found.setdefault(str(name), {})
        for hospital in hospitals:
            parts[hospital.name] = split_facts(split_of(hospital, table, name))
    return found
