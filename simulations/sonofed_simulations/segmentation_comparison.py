"""Comparisons of segmentation methods over paired seeds, variant by variant, resumable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors.torch import load as load_weights
from torch import Tensor

from sonofed_client.enclave.handlers.bundles import install
from sonofed_client.enclave.handlers.ensemble import predict_site
from sonofed_client.enclave.site import Site
from sonofed_client.settings import read_site
from sonofed_common.contract.actions import EvaluateSegmenter, Install, request
from sonofed_common.contract.bundle import MANIFEST, SIGNATURE, Bundle, BundleWriter
from sonofed_common.contract.configuration import Model, read_toml, validate
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.records import Array, Records, from_bytes, to_bytes
from sonofed_common.contract.study import Study
from sonofed_common.runtime import SILENT, Events, derive_seed, set_threads, write_atomically
from sonofed_common.security import load_or_create_signing_key
from sonofed_common.segmentation_metrics import ImageScores
from sonofed_server.source.segmentation_data import SegmentationPart
from sonofed_server.source.segmenter import train_segmenter
from sonofed_server.source.training import weights_bytes
from sonofed_server.study.workspace import StudyState, Workspace, identity_of
from sonofed_simulations.engines.inline import run_inline
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.scenarios.scenario import Scenario, read_scenario
from sonofed_simulations.segmentation_rows import CONTROL, CONTROLS, MaskRow, row_names, row_of

MEASURES = tuple(field.name for field in fields(ImageScores))
TAKEN = (CONTROL, "source", "sites", "branches", "phantoms")
"""Folders of a seed that no variant may take."""
MARK = "origin.json"
"""Says what a folder's scores are made of."""


class Supervised(Model):
    """The upper bound: the source's segmenter trained on with the masks of all sites' pools."""

    epochs: int = Field(ge=1)
    learning_rate: float = Field(gt=0, le=1)


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


@dataclass(frozen=True)
class MaskScores:
    """Scores of one row under one seed.

    Attributes
    ----------
    patients : dict of str to list of str (N,)
        Of each site's test images.
    scores : dict of str to ImageScores
        Of the same images.
    trained : dict of str to int
        Labelled images of each site that the row was trained on, where there are any.
    """

    patients: dict[str, list[str]]
    scores: dict[str, ImageScores]
    trained: dict[str, int] = field(default_factory=dict)


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
    """Return the study of one cell."""
    values = scenario.study.model_dump(mode="json", exclude_unset=True)
    for key, value in comparison.variants[variant].items():
        both = isinstance(value, Mapping) and isinstance(values.get(key), Mapping)
        values[key] = {**values[key], **value} if both else value
    values |= {"seed": seed, "name": f"{scenario.name}-{variant}"}
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
        _controls(comparison, laboratory, bundle, sites, folder, seed, origins[CONTROL])
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
            if _mark(folder / variant) not in ("", origin):
                events.emit("left out", seed=seed, variant=variant, reason="made of something else")
        for row, where in comparison.rows.items():
            variant, _, what = where.partition("/")
            path = folder / variant / f"{_file(what)}.safetensors"
            if path.exists() and _mark(folder / variant) == origins[variant]:
                found.setdefault(row, {})[seed] = _read(path)
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


def _mark(folder: Path) -> str:
    """What a folder's scores are made of; empty where it is not finished."""
    path = folder / MARK
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _cell(
    laboratory: Laboratory,
    study: Study,
    bundle: Path,
    sites: list[Path],
    folder: Path,
    shown: set[str],
    origin: str,
) -> None:
    files = {name: folder / f"{_file(name)}.safetensors" for name in shown}
    if _mark(folder) == origin and all(path.exists() for path in files.values()):
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
        _score(study, row_of(study, state, identity, name), sites, path)
    _clean(workspace)
    write_atomically(folder / MARK, origin.encode())


def _clean(workspace: Workspace) -> None:
    for path in (workspace.branches, workspace.adapted, workspace.final_bundle):
        shutil.rmtree(path, ignore_errors=True)
    workspace.checkpoint.unlink()


def _controls(
    comparison: SegmentationComparison,
    laboratory: Laboratory,
    bundle: Path,
    sites: list[Path],
    folder: Path,
    seed: int,
    origin: str,
) -> None:
    study = mask_study(comparison, laboratory.scenario, next(iter(comparison.variants)), seed)
    target = folder / CONTROL
    identity = Bundle.open(bundle, check_blobs=False).id
    _begin(target, origin)
    source = MaskRow(identity, ("source",), {}, batch_norm="global")
    adapted = MaskRow(identity, ("source",), {})
    for name, row in (("source-only", source), ("bn-adapted", adapted)):
        if not (target / f"{name}.safetensors").exists():
            _score(study, row, sites, target / f"{name}.safetensors")
    if not (target / "supervised.safetensors").exists():
        trained, counts = _train_supervised(comparison, laboratory, bundle, sites, target, seed)
        row = MaskRow(trained, ("source",), {})
        _score(study, row, sites, target / "supervised.safetensors", counts)


def _begin(folder: Path, origin: str) -> None:
    """Empty a folder whose files are of another origin."""
    if _mark(folder) != origin:
        shutil.rmtree(folder, ignore_errors=True)
        write_atomically(folder / MARK, origin.encode())


def _train_supervised(
    comparison: SegmentationComparison,
    laboratory: Laboratory,
    bundle: Path,
    sites: list[Path],
    folder: Path,
    seed: int,
) -> tuple[str, dict[str, int]]:
    """Train on all pools' masks, as only a laboratory that owns all data may, and install it.

    Returns
    -------
    (str, dict of str to int)
        Id of the bundle, and the number of each site's images that it was trained on.
    """
    settings = laboratory.scenario.source.segmentation
    assert settings is not None
    source = Bundle.open(bundle)
    size = laboratory.scenario.study.image_size
    opened = [Site(read_site(path)) for path in sites]
    images, masks = zip(*(_labelled(site, size) for site in opened), strict=True)
    pool = SegmentationPart((), torch.cat(images), torch.cat(masks))
    weights = load_weights(source.read("segmenters/source.safetensors"))
    set_threads(comparison.threads)
    model = train_segmenter(
        pool,
        settings.model_copy(update=comparison.supervised.model_dump()),
        derive_seed(seed, "supervised"),
        checkpoint=folder / "training.safetensors",
        events=laboratory.events,
        task="supervised",
        start=weights,
    )
    manifest = source.manifest
    writer = BundleWriter(
        folder / "bundle", name="supervised", kind="final", provenance=manifest.provenance
    )
    writer.facts = {name: manifest.facts[name] for name in ("image_size", "segmentation")}
    writer.add("segmenters/source.safetensors", weights_bytes(model))
    signed = writer.sign(load_or_create_signing_key(laboratory.key))
    for site in opened:
        _install(site, signed)
    (folder / "training.safetensors").unlink(missing_ok=True)
    names = [site.settings.name for site in opened]
    return signed.id, dict(zip(names, map(len, masks), strict=True))


def _install(site: Site, bundle: Bundle) -> None:
    files = {"manifest": bundle.folder / MANIFEST, "signature": bundle.folder / SIGNATURE}
    arrays = {name: np.frombuffer(path.read_bytes(), np.uint8) for name, path in files.items()}
    blobs = {
        digest: np.frombuffer(bundle.blob(digest), np.uint8) for digest in bundle.manifest.blobs
    }
    parameters = Install(study=bundle.manifest.name, seed=0)
    install(site, parameters, request(parameters, **arrays, blobs=blobs))


def _labelled(site: Site, size: int) -> tuple[Tensor, Tensor]:
    _, images = site.images("pool", size)
    index, masks = site.masks("pool", size)
    return images[index], masks


def _score(
    study: Study,
    row: MaskRow,
    sites: list[Path],
    path: Path,
    trained: Mapping[str, int] | None = None,
) -> None:
    parameters = EvaluateSegmenter(
        study=study.name,
        seed=study.seed,
        bundle=row.bundle,
        image_size=study.image_size,
        branches=row.branches,
        infusion=row.infusion,
        batch_norm=row.batch_norm,
    )
    arrays: dict[str, Array] = {}
    patients: dict[str, list[str]] = {}
    for settings in sites:
        site = Site(read_site(settings))
        name = site.settings.name
        parts = list(predict_site(site, parameters, Records(row.arrays)))
        scores = ImageScores.join([part.scores() for part in parts])
        patients[name] = [image.group for part in parts for image in part.rows]
        arrays |= {f"{name}/{measure}": getattr(scores, measure) for measure in MEASURES}
    facts = {"patients": patients, "trained": dict(trained or {})}
    write_atomically(path, to_bytes(Records(arrays, facts)))


def _read(path: Path) -> MaskScores:
    records = from_bytes(path.read_bytes())
    patients = records.config["patients"]
    scores = {
        site: ImageScores(*(np.asarray(records.arrays[f"{site}/{name}"]) for name in MEASURES))
        for site in patients
    }
    return MaskScores(patients, scores, records.config["trained"])


def _file(what: str) -> str:
    return what.replace(" ", "-")
