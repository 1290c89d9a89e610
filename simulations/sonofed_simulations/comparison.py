"""Comparisons: variants of one study over paired seeds, cell by cell, resumable."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from sonofed_client.adaptation.evaluation import predict
from sonofed_client.enclave.handlers.classification import starting_model
from sonofed_client.enclave.site import Site
from sonofed_client.enclave.views import seen_by
from sonofed_client.settings import read_site
from sonofed_common.contract.actions import EvaluateClassifier
from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.configuration import Model, read_toml, validate
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.records import Array, Records, from_bytes, grouped, to_bytes
from sonofed_common.contract.results import Results, read_results
from sonofed_common.contract.study import PRESETS, ClassifierNorm, Study
from sonofed_common.runtime import SILENT, Events, write_atomically
from sonofed_server.study.workspace import StudyState, identity_of
from sonofed_simulations.engines.inline import run_inline
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.scenarios.scenario import SHARED, Scenario, read_scenario

PREDICTIONS = "predictions.safetensors"


class Comparison(Model):
    """Which variants of a scenario's study to compare, over which seeds.

    Notes
    -----
    A variant is a partial study: what it says replaces what the scenario's study says, section by
    section. ``reference`` names the variants whose mean all others are measured against, and
    ``counterparts`` for a variant the one that differs from it in one choice. All variants are of
    one classifier; of several budgets the last counts.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    scenario: str
    seeds: tuple[int, ...] = Field(min_length=1)
    reference: tuple[str, ...] = Field(min_length=1)
    threads: int = Field(default=1, ge=1, description="CPU threads; run seeds side by side instead")
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    counterparts: dict[str, str] = Field(default={})


CONTROLS: dict[str, Literal["global", "site"]] = {"source-only": "global", "bn-adapted": "site"}
"""What needs no label: weights as shipped, and with normalisation re-estimated on site."""


@dataclass(frozen=True)
class Cell:
    """One variant, or one control, under one seed.

    Attributes
    ----------
    variant : str
        Its name.
    seed : int
        Seed of study and splits.
    predictions : dict of str to tuple
        Labels (N,), P(malignant) (N,) and patients (N,) of each site's test images.
    results : Results or None
        The study's results; None for a control.
    """

    variant: str
    seed: int
    predictions: dict[str, tuple[Any, Any, Any]]
    results: Results | None = None


def built_in() -> dict[str, Path]:
    """Return the comparisons that come with the package, by name."""
    folder = Path(str(files("sonofed_simulations.comparisons")))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_comparison(path: Path) -> tuple[Comparison, Scenario]:
    """Read a comparison and its scenario, and check every variant.

    Raises
    ------
    ConfigurationError
        Unknown key, unknown scenario or reference, or a variant that is no valid study.
    """
    comparison = validate(Comparison, read_toml(path), path.name)
    scenario = read_scenario(comparison.scenario)
    source = scenario.source.model_copy(update={"threads": comparison.threads})
    scenario = scenario.model_copy(update={"threads": comparison.threads, "source": source})
    studies = [
        study_of(comparison, scenario, name, comparison.seeds[0]) for name in comparison.variants
    ]
    if len({(study.classifiers, study.image_size) for study in studies}) > 1 or any(
        len(study.classifiers) != 1 for study in studies
    ):
        raise ConfigurationError(
            f"{path.name}: its variants must all be of one classifier and image size, for their "
            "controls are; write one comparison for each"
        )
    named = {*comparison.reference, *comparison.counterparts, *comparison.counterparts.values()}
    if unknown := sorted(named - comparison.variants.keys()):
        raise ConfigurationError(f"{path.name}: {unknown[0]} is not one of its variants")
    return comparison, scenario


def study_of(comparison: Comparison, scenario: Scenario, variant: str, seed: int) -> Study:
    """Return the study of one cell."""
    values = scenario.study.model_dump(mode="json", exclude_unset=True)
    preset = comparison.variants[variant].get("preset", scenario.study.preset)
    if preset != scenario.study.preset:
        # The scenario's study holds what its own preset set as if it had said so itself.
        for key, settings in PRESETS[scenario.study.preset].items():
            if isinstance(settings, Mapping):
                own = values[key].items()
                values[key] = {k: v for k, v in own if k not in settings or v != settings[k]}
            elif key not in SHARED and values[key] == settings:
                del values[key]
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
    if unknown := sorted(set(seeds) - set(comparison.seeds)):
        raise ConfigurationError(f"seed {unknown[0]} is not one of the comparison's seeds")
    laboratory = Laboratory(scenario, out, data, events)
    with laboratory.alone():
        bundle = laboratory.prepare_source()
        _redraw_once(laboratory, bundle, comparison, events)
    total = len(seeds) * len(comparison.variants)
    cells: list[Cell] = []
    for seed in seeds:
        copy = out / f"seed-{seed}" / "sites"
        # Another process may be redrawing at the common sites, whose stores are copied here.
        with laboratory.alone():
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
        # After the cells: they have shipped the bundle to the sites.
        _controls(comparison, scenario, bundle, sites, out / f"seed-{seed}", seed)
    return cells


def finished_cells(
    comparison: Comparison, scenario: Scenario, out: Path, data: Path | None
) -> tuple[list[Cell], list[str]]:
    """Return what is finished, of all seeds, and still is what the comparison asks for.

    Returns
    -------
    cells : list of Cell
        Finished cells and controls of the studies, the bundle and the images as they are now.
    left_out : list of str
        Finished ones of other studies, another bundle or other images, by ``seed-<n>/<variant>``.
    """
    laboratory = Laboratory(scenario, out, data, SILENT)
    bundle = out / "source"
    cells: list[Cell] = []
    left_out: list[str] = []
    for seed in comparison.seeds:
        folder = out / f"seed-{seed}"
        sites = _unchanged_sites(laboratory, seed, folder / "sites")
        for name in (*CONTROLS, *comparison.variants):
            if not (folder / name / PREDICTIONS).exists():
                continue
            variant = name if name in comparison.variants else next(iter(comparison.variants))
            study = study_of(comparison, scenario, variant, seed)
            if sites and _is_finished(folder / name, _origin(study, bundle, sites)):
                cells.append(_read_cell(folder / name, name, seed))
            else:
                left_out.append(f"seed-{seed}/{name}")
    return cells, left_out


def _unchanged_sites(laboratory: Laboratory, seed: int, folder: Path) -> list[Path]:
    """Settings files of a seed's sites, or none where one has other data than the scenario says."""
    sites = [laboratory.site(name, seed, folder) for name in laboratory.scenario.hospitals]
    same = all(path.exists() and read_site(path).data == now.data for now, path in sites)
    return [path for _, path in sites] if same else []


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
    run_inline(laboratory.workspace(study, bundle, folder), sites, events)


def _controls(
    comparison: Comparison,
    scenario: Scenario,
    bundle: Path,
    sites: list[Path],
    folder: Path,
    seed: int,
) -> None:
    study = study_of(comparison, scenario, next(iter(comparison.variants)), seed)
    origin = _origin(study, bundle, sites)
    for name, batch_norm in CONTROLS.items():
        if not _is_finished(folder / name, origin):
            predictions = _predict(study, bundle, sites, {}, batch_norm)
            _keep(folder / name, predictions, origin)


def _cell(
    laboratory: Laboratory,
    study: Study,
    bundle: Path,
    sites: list[Path],
    folder: Path,
    variant: str,
) -> Cell:
    origin = _origin(study, bundle, sites)
    if not _is_finished(folder, origin):
        workspace = laboratory.workspace(study, bundle, folder)
        run_inline(workspace, sites, laboratory.events)
        identity = Bundle.open(bundle, check_blobs=False).id
        state = StudyState.load(workspace.checkpoint, identity_of(study, identity))
        last = len(study.selection.budgets) - 1
        weights = state.group(f"classifier/{study.classifiers[0]}/{last}")
        predictions = _predict(study, bundle, sites, weights, study.finetuning.batch_norm)
        _keep(folder, predictions, origin)
        shutil.rmtree(workspace.final_bundle, ignore_errors=True)
        workspace.checkpoint.unlink()
    return _read_cell(folder, variant, study.seed)


def _origin(study: Study, bundle: Path, sites: list[Path]) -> dict[str, Any]:
    """What a cell was made of: it is made anew when any of it changes."""
    return {
        "study": study.digest(),
        "bundle": Bundle.open(bundle, check_blobs=False).id,
        "sites": [Site(read_site(path)).snapshot for path in sites],
    }


def _is_finished(folder: Path, origin: dict[str, Any]) -> bool:
    path = folder / PREDICTIONS
    return path.exists() and bool(from_bytes(path.read_bytes()).config["origin"] == origin)


def _keep(folder: Path, predictions: Records, origin: dict[str, Any]) -> None:
    kept = Records(predictions.arrays, {**predictions.config, "origin": origin})
    write_atomically(folder / PREDICTIONS, to_bytes(kept))


def _read_cell(folder: Path, variant: str, seed: int) -> Cell:
    records = from_bytes((folder / PREDICTIONS).read_bytes())
    predictions = {
        site: (
            records.arrays[f"{site}/labels"],
            records.arrays[f"{site}/probabilities"],
            np.array(groups),
        )
        for site, groups in records.config["groups"].items()
    }
    results = None if variant in CONTROLS else read_results(folder / "results.json")
    return Cell(variant, seed, predictions, results)


def _predict(
    study: Study,
    bundle: Path,
    sites: list[Path],
    weights: dict[str, Array],
    batch_norm: ClassifierNorm,
) -> Records:
    """Predict each test image, as only a laboratory that owns all data may."""
    last = len(study.selection.budgets) - 1
    parameters = EvaluateClassifier(
        study=study.name,
        seed=study.seed,
        bundle=Bundle.open(bundle, check_blobs=False).id,
        image_size=study.image_size,
        classifier=study.classifiers[0],
        batch_norm=batch_norm,
        budget=last if batch_norm == "local" else None,
    )
    arrays: dict[str, Array] = {}
    groups = {}
    for path in sites:
        site = Site(read_site(path))
        (rows, images), (_, pool) = (
            seen_by(parameters.classifier, site, part, parameters.bundle, study.image_size)
            for part in ("test", "pool")
        )
        request = Records(grouped("weights", weights))
        model = starting_model(site, parameters, request, pool, batch_norm)
        arrays[f"{site.settings.name}/probabilities"] = predict(model, images)
        arrays[f"{site.settings.name}/labels"] = np.array([row.label for row in rows])
        groups[site.settings.name] = [row.group for row in rows]
    return Records(arrays, {"groups": groups})
