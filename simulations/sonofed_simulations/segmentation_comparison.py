"""Comparisons of segmentation methods over paired seeds, variant by variant, resumable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from sonofed_client.enclave.site import Site
from sonofed_client.settings import read_site
from sonofed_common.contract.bundle import MANIFEST, Bundle
from sonofed_common.contract.configuration import Model, read_toml, validate
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.study import Study
from sonofed_common.runtime import SILENT, Events, write_atomically
from sonofed_server.source.settings import SourceSettings
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

TAKEN = (CONTROL, "source", "sources", "sites", "branches", "phantoms")
"""Folders of a seed that no variant may take."""

SOURCE = "source"
"""Key of a variant that names its source."""


class SegmentationComparison(Model):
    """Which variants of a scenario's study to compare, over which seeds, and what to show.

    Notes
    -----
    A variant is a partial study: what it says replaces what the scenario's study says, section by
    section. ``sources`` are partial sources by name, which replace parts of the scenario's in the
    same way; a variant starts from the one that its ``source`` names, by default from the
    scenario's own. ``rows`` names what is shown as ``variant/what`` (see `row_names`), or as one of
    `CONTROLS` after ``control/``, or after ``control-<name>/`` of a named source. ``plug_in`` names
    for a row the one that it started from. Every seed has source trainings of its own, whose seed
    it is.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    scenario: str
    seeds: tuple[int, ...] = Field(min_length=1)
    threads: int = Field(default=1, ge=1, description="CPU threads; run seeds side by side instead")
    baseline: str
    supervised: Supervised
    sources: dict[Annotated[str, Field(pattern=r"^[a-z0-9_]{1,32}$")], dict[str, Any]] = Field(
        default={}
    )
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    rows: dict[str, str] = Field(min_length=1)
    plug_in: dict[str, str] = Field(default={})

    @model_validator(mode="after")
    def _named(self) -> Self:
        for name in [self.baseline, *self.plug_in, *self.plug_in.values()]:
            if name not in self.rows:
                raise ValueError(f"'{name}' is not one of the rows")
        controls = self.controls
        if taken := sorted({*TAKEN, *controls} & self.variants.keys()):
            raise ValueError(f"a variant cannot be called '{taken[0]}'; give it another name")
        for name, changes in self.variants.items():
            if (source := changes.get(SOURCE, "")) not in {"", *self.sources}:
                raise ValueError(f"variant '{name}' starts from '{source}', which is not a source")
        for name, shown in self.rows.items():
            variant, _, what = shown.partition("/")
            if variant not in {*controls, *self.variants}:
                raise ValueError(f"row '{name}' shows '{variant}', which is not a variant")
            if variant in controls and what not in CONTROLS:
                raise ValueError(
                    f"row '{name}' shows '{shown}'; the controls are {', '.join(CONTROLS)}"
                )
        return self

    @property
    def controls(self) -> dict[str, str]:
        """Folders of the controls, and the source of each; the scenario's own is ''."""
        return {CONTROL: "", **{f"{CONTROL}-{name}": name for name in self.sources}}

    def starts(self) -> dict[str, str]:
        """Return the source that each variant and control starts from; the scenario's own is ''.

        Those that no row shows are left out.
        """
        shown = {where.partition("/")[0] for where in self.rows.values()}
        named = {name: variant.get(SOURCE, "") for name, variant in self.variants.items()}
        return {name: s for name, s in (named | self.controls).items() if name in shown}


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
    for name in comparison.sources:
        _with_source(comparison, scenario, name)
    for name, shown in comparison.rows.items():
        variant, _, what = shown.partition("/")
        if variant in studies and what not in (known := row_names(studies[variant])):
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
    changes = {key: v for key, v in comparison.variants[variant].items() if key != SOURCE}
    values = _changed(scenario.study, changes) | {"seed": seed, "name": scenario.name}
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
    total = len(seeds) * len(comparison.starts())
    done = 0
    for seed in seeds:
        own = _of_seed(scenario, seed)
        folder = out / f"seed-{seed}"
        sites = Laboratory(own, folder, data, events).prepare_sites(seed)
        scenarios = _scenarios(comparison, own)
        laboratories = {s: Laboratory(scenarios[s], folder, data, events) for s in scenarios}
        bundles = {s: laboratories[s].prepare_source(_bundle(folder, s)) for s in scenarios}
        for variant, source in comparison.starts().items():
            shown = _shown(comparison, variant)
            bundle, cell = bundles[source], folder / variant
            origin = _origin(comparison, scenarios[source], bundle, sites, variant, seed)
            if variant in comparison.controls:
                begin(cell, origin)
                study = mask_study(comparison, own, next(iter(comparison.variants)), seed)
                laboratory = laboratories[source]
                score_controls(comparison.supervised, study, laboratory, bundle, sites, cell, shown)
            else:
                study = mask_study(comparison, own, variant, seed)
                _cell(laboratories[source], study, bundle, sites, cell, shown, origin)
            done += 1
            events.progress("cells", done, total, variant=variant, seed=seed)


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
        scenarios = _scenarios(comparison, own)
        sites = [folder / "sites" / name / f"site-{seed}.toml" for name in own.hospitals]
        if not all(path.exists() for path in sites):
            continue
        origins = {
            variant: _origin(
                comparison, scenarios[source], _bundle(folder, source), sites, variant, seed
            )
            for variant, source in comparison.starts().items()
            if (_bundle(folder, source) / MANIFEST).exists()
        }
        for variant, origin in origins.items():
            if mark_of(folder / variant) not in ("", origin):
                events.emit("left out", seed=seed, variant=variant, reason="made of something else")
        for row, where in comparison.rows.items():
            variant, _, what = where.partition("/")
            path = scores_file(folder / variant, what)
            if path.exists() and mark_of(folder / variant) == origins.get(variant):
                found.setdefault(row, {})[seed] = read_scores(path)
    return {row: found[row] for row in comparison.rows if row in found}


def _shown(comparison: SegmentationComparison, variant: str) -> set[str]:
    shown = [where.partition("/") for where in comparison.rows.values()]
    return {what for name, _, what in shown if name == variant}


def _of_seed(scenario: Scenario, seed: int) -> Scenario:
    """The scenario with a source training of its own, so that no seed shares what chance did."""
    source = scenario.source.model_copy(update={"seed": seed})
    return scenario.model_copy(update={"source": source})


def _scenarios(comparison: SegmentationComparison, scenario: Scenario) -> dict[str, Scenario]:
    """The scenario with each source that something shown starts from, by the source's name."""
    needed = sorted(set(comparison.starts().values()))
    return {source: _with_source(comparison, scenario, source) for source in needed}


def _with_source(comparison: SegmentationComparison, scenario: Scenario, name: str) -> Scenario:
    values = _changed(scenario.source, comparison.sources.get(name, {}))
    source = validate(SourceSettings, values, f"source {name}")
    return scenario.model_copy(update={"source": source})


def _changed(settings: Model, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What settings say, with changes put in their place section by section."""
    values = settings.model_dump(mode="json", exclude_unset=True)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(values.get(key), Mapping)
        values[key] = {**values[key], **value} if both else value
    return values


def _bundle(folder: Path, source: str) -> Path:
    return folder / "sources" / source if source else folder / "source"


def _origin(
    comparison: SegmentationComparison,
    scenario: Scenario,
    bundle: Path,
    sites: list[Path],
    variant: str,
    seed: int,
) -> str:
    """What a variant's scores are made of: they are made anew when any of it changes."""
    study = next(iter(comparison.variants)) if variant in comparison.controls else variant
    wanted = mask_study(comparison, scenario, study, seed)
    own: dict[str, Any] = {"study": wanted.digest()}
    if variant in comparison.controls:
        supervised = comparison.supervised.model_dump(mode="json")
        own = {"supervised": supervised, "image_size": wanted.image_size}
    made_of = {
        "scenario": scenario.model_dump(mode="json", exclude={"title", "notes", "study"}),
        "bundle": Bundle.open(bundle, check_blobs=False).id,
        "sites": [Site(read_site(path)).snapshot for path in sites],
    }
    return json.dumps(made_of | own, sort_keys=True)


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
