"""The manifest of a table: what it was made of, so that another can make it again."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sonofed_common.runtime import write_atomically
from sonofed_server.study.report import this_machine
from sonofed_simulations.statistics import Split
from sonofed_simulations.tables.cells import Cell
from sonofed_simulations.tables.hospitals import split_of
from sonofed_simulations.tables.material import Material

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


MADE_OF = (
    "Data, settings, seeds and versions are in [manifest.json](manifest.json), the test patients "
    "of every split in [splits.csv](splits.csv)."
)
"""What every page says of both files."""

Tested = Mapping[str, Mapping[str, Sequence[str]]]
"""Patient, or group of duplicates, of each test image: by split, and by site."""


def write_facts(out: Path, facts: Mapping[str, Any], tested: Tested) -> None:
    """Write ``manifest.json`` and ``splits.csv``.

    Parameters
    ----------
    out : Path
        Folder of the table.
    facts : mapping of str to JSON value
        Of the table; versions and machine are added.
    tested : mapping of str to mapping of str to sequence of str
        See `Tested`. The manifest digests these patients, the file lists them: all other images of
        a site are its pool.
    """
    rows = [
        (split, site, patient)
        for split, sites in tested.items()
        for site, patients in sites.items()
        for patient in sorted(set(patients))
    ]
    listed = io.StringIO()
    csv.writer(listed, lineterminator="\n").writerows([("split", "site", "test patient"), *rows])
    write_atomically(out / "splits.csv", listed.getvalue().encode())
    whole = {
        **facts,
        "splits": {
            split: {
                site: {"test": len(patients), "test_patients": patients_digest(patients)}
                for site, patients in sites.items()
            }
            for split, sites in tested.items()
        },
        "versions": {name: version(name) for name in LIBRARIES},
        "machine": this_machine().model_dump(mode="json"),
    }
    text = json.dumps(whole, indent=2, sort_keys=True)
    write_atomically(out / "manifest.json", f"{text}\n".encode())


def test_patients(split: Split) -> list[str]:
    """Patient, or group of duplicates, of each test image."""
    return [sample.group for sample in split.test]


def split_facts(split: Split) -> dict[str, Any]:
    """Count both parts, and digest the patients of the test part, to compare splits by."""
    digest = patients_digest(test_patients(split))
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
        "seeds": list(table.seeds),
        "cells": len(cells),
    }
    tested = {
        str(name): {h.name: test_patients(split_of(h, table, name)) for h in material.hospitals}
        for name in sorted(table.splits)
    }
    write_facts(out, facts, tested)
