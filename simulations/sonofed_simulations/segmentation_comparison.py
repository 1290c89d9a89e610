"""Comparisons of segmentation methods over paired seeds, variant by variant, resumable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from sonofed_client.enclave.site import Site
from sonofed_client.settings import read_site
from sonofed_common.contract.bundle import MANIFEST, Bundle
from sonofed_common.contract.configuration import Model, read_toml, validate
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.study import Study
from sonofed_common.runtime import SILENT, Events, write_atomically
from sonofed_server.study.workspace import StudyState, Workspace, identity_of
from sonofed_simulations.engines.inline import run_inline
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.scenarios.scenario import Scenario, read_scenario
from sonofed_simulations.segmentation_controls import Supervised, score_controls
from sonofed_simulations.segmentation_rows import CONTROL, CONTROLS, row_names, row_of
from sonofed_simulations.segmentation_scores import (
    MARK,
    MaskScores,
    begin,
    mark_of,
    read_scores,
    score_row,
    scores_file,
)

TAKEN = (CONTROL, "source", "sites", "branches", "phantoms")
"""Folders of a seed that no variant may take."""


class SegmentationComparison(Model):
    """Which variants of a scenario's study to compare, over which seeds, and what to show.

    Notes
    -----
    A variant is a partial study: what it says replaces what the scenario's study says, section by
    section. ``rows`` names what is shown as ``variant/what`` (see `row_names`), or as ``control/``
    and one of `CONTROLS`. ``plug_in`` names for a row the one that it started from. Every seed has
    a source training of its own, whose seed it is.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    scenario: str
    seeds: tuple[int, ...] = Field(min_length=1)
    threads: int = Field(default=1, ge=1, description="CPU threads; run seeds side by side instead")
    baseline: str
    supervised: Supervised
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    rows: dict[str, str] = Field(min_length=1)
    plug_in: dict[str, str] = Field(default={})

    @model_validator(mode="after")
    def _named(self) -> Self:
        for name in [self.baseline, *self.plug_in, *self.plug_in.values()]:
            if name not in self.rows:
                raise ValueError(f"'{name}' is not one of the rows")
        if taken := sorted(set(TAKEN) & self.variants.keys()):
            raise ValueError(f"a variant cannot be called '{taken[0]}'; give it another name")
        for name, source in self.rows.items():
            variant, _, what = source.partition("/")
            if variant != CONTROL and variant not in self.variants:
                raise ValueError(f"row '{name}' shows '{variant}', which is not a variant")
            if variant == CONTROL and what not in CONTROLS:
                raise ValueError(
                    f"row '{name}' shows '{source}'; the controls are {', '.join(CONTROLS)}"
                )
        return self


def read_mask_comparison(path: Path) -> tuple[SegmentationComparison, Scenario]:
    """Read a segmentation comparison and its scenario, and check every variant.

    Raises
    ------
    ConfigurationError
        Unknown key, unknown scenario or row, or a variant that is no valid study.
    """
    comparison = validate(SegmentationComparison, read_toml(path), path.name)
    scenario = read_scenario(comparison.scenario)
    source = scenario.source.model_copy(update={"threads": comparison.threads})
    scenario = scenario.model_copy(update={"threads": comparison.threads, "source": source})
    studies = {
        name: mask_study(comparison, scenario, name, comparison.seeds[0])
        for name in comparison.variants
    }
    for name, shown in comparison.rows.items():
        variant, _, what = shown.partition("/")
        if variant != CONTROL and what not in (known := row_names(studies[variant])):
            raise ConfigurationError(
                f"{path.name}: row '{name}' shows '{shown}'; variant '{variant}' has "
                f"{', '.join(known)}"
            )
    return comparison, scenario


def mask_study(
    comparison: SegmentationComparison, scenario: Scenario, variant: str, seed: int
) -> Study:
    """Return the study of one cell.

    Notes
    -----
    All variants bear one name, so that sites and coordinator do once what several have in common.
    """
    values = scenario.study.model_dump(mode="json", exclude_unset=True)
    for key, value in comparison.variants[variant].items():
        both = isinstance(value, Mapping) and isinstance(values.get(key), Mapping)
        values[key] = {**values[key], **value} if both else value
    values |= {"seed": seed, "name": scenario.name}
    return validate(Study, values, f"variant {variant}")


def run_mask_comparison(
    comparison: SegmentationComparison,
    scenario: Scenario,
    out: Path,
    data: Path | None,
    seeds: tuple[int, ...],
    events: Events,
) -> None:
    """Run the cells that are not there yet.

    Parameters
    ----------
    comparison, scenario
        What to run.
    out : Path
        Each cell is kept in ``seed-<n>/<variant>``; several processes may work on different seeds.
    data : Path or None
        Folder of the real data sets.
    seeds : tuple of int
        Which seeds to run now.
    events : Events
        Progress.
    """
    total = len(seeds) * (len(comparison.variants) + 1)
    done = 0
    for seed in seeds:
        own = _of_seed(scenario, seed)
        folder = out / f"seed-{seed}"
        laboratory = Laboratory(own, folder, data, events)
        bundle = laboratory.prepare_source()
        sites = laboratory.prepare_sites(seed)
        origins = _origins(comparison, own, bundle, sites, seed)
        for variant in comparison.variants:
            study = mask_study(comparison, own, variant, seed)
            shown = _shown(comparison, variant)
            _cell(laboratory, study, bundle, sites, folder / variant, shown, origins[variant])
            done += 1
            events.progress("cells", done, total, variant=variant, seed=seed)
        begin(folder / CONTROL, origins[CONTROL])
        study = mask_study(comparison, own, next(iter(comparison.variants)), seed)
        score_controls(comparison.supervised, study, laboratory, bundle, sites, folder / CONTROL)
        done += 1
        events.progress("cells", done, total, variant=CONTROL, seed=seed)


def finished_scores(
    comparison: SegmentationComparison, scenario: Scenario, out: Path, events: Events = SILENT
) -> dict[str, dict[int, MaskScores]]:
    """Return the scores of every row in every seed that is finished.

    What was made of other studies, sources or images than those at hand is left out, and an event
    says so.
    """
    found: dict[str, dict[int, MaskScores]] = {}
    for seed in comparison.seeds:
        own, folder = _of_seed(scenario, seed), out / f"seed-{seed}"
        bundle = folder / "source"
        sites = [folder / "sites" / name / f"site-{seed}.toml" for name in own.hospitals]
        if not all(path.exists() for path in (bundle / MANIFEST, *sites)):
            continue
        origins = _origins(comparison, own, bundle, sites, seed)
        for variant, origin in origins.items():
            if mark_of(folder / variant) not in ("", origin):
                events.emit("left out", seed=seed, variant=variant, reason="made of something else")
        for row, where in comparison.rows.items():
            variant, _, what = where.partition("/")
            path = scores_file(folder / variant, what)
            if path.exists() and mark_of(folder / variant) == origins[variant]:
                found.setdefault(row, {})[seed] = read_scores(path)
    return {row: found[row] for row in comparison.rows if row in found}


def _shown(comparison: SegmentationComparison, variant: str) -> set[str]:
    shown = [where.partition("/") for where in comparison.rows.values()]
    return {what for name, _, what in shown if name == variant}


def _of_seed(scenario: Scenario, seed: int) -> Scenario:
    """The scenario with a source training of its own, so that no seed shares what chance did."""
    source = scenario.source.model_copy(update={"seed": seed})
    return scenario.model_copy(update={"source": source})


def _origins(
    comparison: SegmentationComparison,
    scenario: Scenario,
    bundle: Path,
    sites: list[Path],
    seed: int,
) -> dict[str, str]:
    """What scores are made of, by variant: they are made anew when any of it changes."""
    made_of = {
        "scenario": scenario.model_dump(mode="json", exclude={"title", "notes", "study"}),
        "bundle": Bundle.open(bundle, check_blobs=False).id,
        "sites": [Site(read_site(path)).snapshot for path in sites],
    }
    studies = {name: mask_study(comparison, scenario, name, seed) for name in comparison.variants}
    own: dict[str, dict[str, Any]] = {
        name: {"study": study.digest()} for name, study in studies.items()
    }
    own[CONTROL] = {
        "supervised": comparison.supervised.model_dump(mode="json"),
        "image_size": next(iter(studies.values())).image_size,
    }
    return {name: json.dumps(made_of | what, sort_keys=True) for name, what in own.items()}


def _cell(
    laboratory: Laboratory,
    study: Study,
    bundle: Path,
    sites: list[Path],
    folder: Path,
    shown: set[str],
    origin: str,
) -> None:
    files = {name: scores_file(folder, name) for name in shown}
    if mark_of(folder) == origin and all(path.exists() for path in files.values()):
        return
    (folder / MARK).unlink(missing_ok=True)
    workspace = laboratory.workspace(study, bundle, folder)
    # A variant that was changed may lack rows that it had.
    for old in set(folder.glob("*.safetensors")) - {workspace.checkpoint}:
        old.unlink()
    run_inline(workspace, sites, laboratory.events)
    identity = Bundle.open(bundle, check_blobs=False).id
    state = StudyState.load(workspace.checkpoint, identity_of(study, identity))
    for name, path in sorted(files.items()):
        score_row(study, row_of(study, state, identity, name), sites, path)
    _clean(workspace)
    write_atomically(folder / MARK, origin.encode())


def _clean(workspace: Workspace) -> None:
    for path in (workspace.branches, workspace.adapted, workspace.final_bundle):
        shutil.rmtree(path, ignore_errors=True)
    workspace.checkpoint.unlink()
