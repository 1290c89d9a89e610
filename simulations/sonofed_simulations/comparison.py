"""Comparisons: variants of one study over paired seeds, cell by cell, resumable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from sonofed_client.adaptation.evaluation import predict
from sonofed_client.enclave.handlers.classification import starting_model
from sonofed_client.enclave.site import Site
from sonofed_client.settings import read_site
from sonofed_common.contract.actions import EvaluateClassifier
from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.configuration import Model, read_toml, validate
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.records import Records, from_bytes, grouped, to_bytes
from sonofed_common.contract.results import Results, read_results
from sonofed_common.contract.study import Study
from sonofed_common.runtime import Events, write_atomically
from sonofed_server.study.workspace import StudyState, Workspace
from sonofed_simulations.engines.inline import run_inline
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.scenarios.scenario import Scenario, read_scenario


class Comparison(Model):
    """Which variants of a scenario's study to compare, over which seeds.

    Notes
    -----
    A variant is a partial study: what it says replaces what the scenario's study says, section by
    section. ``reference`` names the variants whose mean all others are measured against.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    scenario: str
    seeds: tuple[int, ...] = Field(min_length=1)
    reference: tuple[str, ...] = Field(min_length=1)
    threads: int = Field(default=1, ge=1, description="CPU threads; run seeds side by side instead")
    variants: dict[str, dict[str, Any]] = Field(min_length=1)


@dataclass(frozen=True)
class Cell:
    """One variant under one seed, with its finished results and test predictions."""

    variant: str
    seed: int
    results: Results
    predictions: dict[str, tuple[Any, Any, Any]]


def built_in() -> dict[str, Path]:
    """Return the comparisons that come with the package, by name."""
    folder = Path(str(files("sonofed_simulations.comparisons")))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_comparison(name_or_path: str) -> tuple[Comparison, Scenario]:
    """Read a comparison and its scenario, and check every variant.

    Raises
    ------
    ConfigurationError
        Unknown key, unknown scenario or reference, or a variant that is no valid study.
    """
    path = built_in().get(name_or_path, Path(name_or_path))
    comparison = validate(Comparison, read_toml(path), path.name)
    scenario = read_scenario(comparison.scenario)
    source = scenario.source.model_copy(update={"threads": comparison.threads})
    scenario = scenario.model_copy(update={"threads": comparison.threads, "source": source})
    for name in comparison.variants:
        study_of(comparison, scenario, name, comparison.seeds[0])
    if unknown := sorted(set(comparison.reference) - comparison.variants.keys()):
        raise ConfigurationError(f"{path.name}: reference {unknown[0]} is not one of its variants")
    return comparison, scenario


def study_of(comparison: Comparison, scenario: Scenario, variant: str, seed: int) -> Study:
    """Return the study of one cell."""
    values = scenario.study.model_dump(mode="json", exclude_unset=True)
    for key, value in comparison.variants[variant].items():
        both = isinstance(value, Mapping) and isinstance(values.get(key), Mapping)
        values[key] = {**values[key], **value} if both else value
    values |= {"seed": seed, "name": f"{scenario.name}-{variant}"}
    return validate(Study, values, f"variant {variant}")


def run_comparison(
    comparison: Comparison,
    scenario: Scenario,
    out: Path,
    data: Path | None,
    seeds: tuple[int, ...],
    events: Events,
) -> list[Cell]:
    """Run the cells that are not there yet and return all finished cells of the given seeds.

    Parameters
    ----------
    comparison, scenario
        From `read_comparison`.
    out : Path
        Each cell is kept in ``seed-<n>/<variant>``; several processes may work on different seeds.
    data : Path or None
        Folder of the real data sets.
    seeds : tuple of int
        Which seeds to run now.
    events : Events
        Progress.
    """
    laboratory = Laboratory(scenario, out, data, events)
    bundle = laboratory.prepare_source()
    _redraw_once(laboratory, bundle, comparison, events)
    total = len(seeds) * len(comparison.variants)
    cells: list[Cell] = []
    for seed in seeds:
        copy = out / f"seed-{seed}" / "sites"
        if not copy.exists():
            partial = copy.with_name(".sites")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(out / "sites", partial)
            partial.rename(copy)
        sites = laboratory.prepare_sites(seed, copy)
        for variant in comparison.variants:
            study = study_of(comparison, scenario, variant, seed)
            folder = out / f"seed-{seed}" / variant
            cells.append(_cell(laboratory, study, bundle, sites, folder, variant))
            events.progress("cells", len(cells), total, variant=variant, seed=seed)
    return cells


def finished_cells(comparison: Comparison, scenario: Scenario, out: Path) -> list[Cell]:
    """Return every cell that is finished on disk."""
    return [
        _read_cell(out / f"seed-{seed}" / variant, variant, seed)
        for seed in comparison.seeds
        for variant in comparison.variants
        if _is_finished(
            out / f"seed-{seed}" / variant, study_of(comparison, scenario, variant, seed)
        )
    ]


def _redraw_once(
    laboratory: Laboratory, bundle: Path, comparison: Comparison, events: Events
) -> None:
    """Reconstruct at common sites that every seed starts from a copy of.

    A reconstruction depends on the image and the diffusion model alone, so seeds can share it.
    """
    studies = [
        study_of(comparison, laboratory.scenario, v, comparison.seeds[0])
        for v in comparison.variants
    ]
    redrawing = [study for study in studies if "reconstruct" in study.phases]
    sites = laboratory.prepare_sites(comparison.seeds[0])
    if not redrawing:
        return
    values = redrawing[0].model_dump(mode="json", exclude_none=True)
    values |= {"phases": ["enrol", "ship", "reconstruct"], "name": "redraw"}
    study = validate(Study, values, "redraw")
    folder = laboratory.root / "redraw"
    if not (folder / "results.json").exists():
        run_inline(laboratory.workspace(study, bundle, folder), sites, events)


def _cell(
    laboratory: Laboratory,
    study: Study,
    bundle: Path,
    sites: list[Path],
    folder: Path,
    variant: str,
) -> Cell:
    if not _is_finished(folder, study):
        workspace = laboratory.workspace(study, bundle, folder)
        run_inline(workspace, sites, laboratory.events)
        identity = Bundle.open(bundle, check_blobs=False).id
        _keep_predictions(workspace, study, identity, sites)
        shutil.rmtree(workspace.final_bundle, ignore_errors=True)
        workspace.checkpoint.unlink()
    return _read_cell(folder, variant, study.seed)


def _is_finished(folder: Path, study: Study) -> bool:
    if not (folder / "predictions.safetensors").exists():
        return False
    return read_results(folder / "results.json").study_digest == study.digest()


def _read_cell(folder: Path, variant: str, seed: int) -> Cell:
    records = from_bytes((folder / "predictions.safetensors").read_bytes())
    predictions = {
        site: (
            records.arrays[f"{site}/labels"],
            records.arrays[f"{site}/probabilities"],
            np.array(groups),
        )
        for site, groups in records.config["groups"].items()
    }
    return Cell(variant, seed, read_results(folder / "results.json"), predictions)


def _keep_predictions(workspace: Workspace, study: Study, bundle: str, sites: list[Path]) -> None:
    """Keep each test image's prediction, as only a laboratory that owns all data may."""
    state = StudyState.load(workspace.checkpoint, study.digest())
    name, last = study.classifiers[0], len(study.selection.budgets) - 1
    weights = Records(grouped("weights", state.group(f"classifier/{name}/{last}")))
    parameters = EvaluateClassifier(
        study=study.name,
        seed=study.seed,
        bundle=bundle,
        image_size=study.image_size,
        classifier=name,
        batch_norm=study.finetuning.batch_norm,
    )
    arrays: dict[str, Any] = {}
    groups = {}
    for path in sites:
        site = Site(read_site(path))
        rows, images = site.images("test", study.image_size)
        _, pool = site.images("pool", study.image_size)
        model = starting_model(site, parameters, weights, pool, parameters.batch_norm)
        arrays[f"{site.settings.name}/probabilities"] = predict(model, images)
        arrays[f"{site.settings.name}/labels"] = np.array([row.label for row in rows])
        groups[site.settings.name] = [row.group for row in rows]
    records = Records(arrays, {"groups": json.loads(json.dumps(groups))})
    write_atomically(workspace.root / "predictions.safetensors", to_bytes(records))
