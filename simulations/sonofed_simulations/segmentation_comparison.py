"""Comparisons of segmentation methods over paired seeds, variant by variant, resumable."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

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
from sonofed_common.contract.records import Array, Records, from_bytes, to_bytes
from sonofed_common.contract.study import Infusion, Study
from sonofed_common.runtime import Events, derive_seed, set_threads, write_atomically
from sonofed_common.security import load_or_create_signing_key
from sonofed_common.segmentation_metrics import ImageScores
from sonofed_server.source.segmentation_data import SegmentationPart
from sonofed_server.source.segmenter import train_segmenter
from sonofed_server.source.training import weights_bytes
from sonofed_server.study.workspace import StudyState, Workspace, identity_of
from sonofed_simulations.engines.inline import run_inline
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.scenarios.scenario import Scenario, read_scenario

MEASURES = ("dice", "nsd", "hd95")
CONTROL = "control"
PLAIN = Infusion(rule="mean", calibration="none")


class Supervised(Model):
    """The upper bound: the source's segmenter trained on with the masks of all sites' pools."""

    epochs: int = Field(ge=1)
    learning_rate: float = Field(gt=0, le=1)


class SegmentationComparison(Model):
    """Which variants of a scenario's study to compare, over which seeds, and what to show.

    Notes
    -----
    A variant is a partial study: what it says replaces what the scenario's study says, section by
    section. ``rows`` names what is shown as ``variant/what``; see `rows_of`. ``plug_in`` names for
    a row the one that it started from.
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
        for name, source in self.rows.items():
            variant = source.partition("/")[0]
            if variant != CONTROL and variant not in self.variants:
                raise ValueError(f"row '{name}' shows '{variant}', which is not a variant")
        return self


@dataclass(frozen=True)
class MaskRow:
    """Segmenters to test together at every site.

    Attributes
    ----------
    bundle : str
        Id of an installed bundle.
    branches : tuple of str
        Of that bundle.
    arrays : dict of str to ndarray
        Of the infusion head.
    infusion : Infusion
        How the branches become one.
    batch_norm : {"site", "global"}
        Whose normalisation statistics.
    """

    bundle: str
    branches: tuple[str, ...]
    arrays: dict[str, Array]
    infusion: Infusion = PLAIN
    batch_norm: Literal["site", "global"] = "site"


@dataclass(frozen=True)
class MaskScores:
    """Scores of one row under one seed: for each site the patients (N,) and measures (N,)."""

    patients: dict[str, list[str]]
    measures: dict[str, dict[str, Array]]


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
    for name in comparison.variants:
        mask_study(comparison, scenario, name, comparison.seeds[0])
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
    laboratory = Laboratory(scenario, out, data, events)
    bundle = laboratory.prepare_source()
    total = len(seeds) * (len(comparison.variants) + 1)
    done = 0
    for seed in seeds:
        folder = out / f"seed-{seed}"
        sites = laboratory.prepare_sites(seed, folder / "sites")
        for variant in comparison.variants:
            study = mask_study(comparison, scenario, variant, seed)
            _cell(laboratory, study, bundle, sites, folder / variant)
            done += 1
            events.progress("cells", done, total, variant=variant, seed=seed)
        _controls(comparison, laboratory, bundle, sites, folder, seed)
        done += 1
        events.progress("cells", done, total, variant=CONTROL, seed=seed)


def finished_scores(
    comparison: SegmentationComparison, out: Path
) -> dict[str, dict[int, MaskScores]]:
    """Return the scores of every row in every seed that is finished."""
    found: dict[str, dict[int, MaskScores]] = {}
    for row, where in comparison.rows.items():
        variant, _, what = where.partition("/")
        for seed in comparison.seeds:
            path = out / f"seed-{seed}" / variant / f"{_file(what)}.safetensors"
            if path.exists():
                found.setdefault(row, {})[seed] = _read(path)
    return found


def rows_of(study: Study, state: StudyState, source_bundle: str) -> dict[str, MaskRow]:
    """Everything that a finished study can be asked to show.

    Returns
    -------
    dict of str to MaskRow
        Branches before pseudo-labelling by their names (``source``, ``target``), and of several
        ``mean`` and ``infusion``; the same after pseudo-labelling with ``adapted`` before the name.
    """
    rows: dict[str, MaskRow] = {}
    before = {"bundle": source_bundle, "names": ["source"]}
    for prefix, origin in (("", "branches"), ("adapted ", "adapted")):
        known = state.facts.get(origin, before if origin == "branches" else None)
        if known is None:
            continue
        bundle, names = known["bundle"], tuple(known["names"])
        rows |= {f"{prefix}{name}": MaskRow(bundle, (name,), {}) for name in names}
        if len(names) > 1:
            rows[f"{prefix}mean"] = MaskRow(bundle, names, {})
        arrays = state.group(f"ensemble/{origin}")
        if len(names) > 1 and arrays:
            rows[f"{prefix}infusion"] = MaskRow(bundle, names, arrays, study.infusion)
    return rows


def _cell(
    laboratory: Laboratory, study: Study, bundle: Path, sites: list[Path], folder: Path
) -> None:
    if (folder / "done").exists() and (folder / "done").read_text() == _origin(study, bundle):
        return
    workspace = laboratory.workspace(study, bundle, folder)
    # A variant that was changed may lack rows that it had.
    for old in {folder / "done", *folder.glob("*.safetensors")} - {workspace.checkpoint}:
        old.unlink(missing_ok=True)
    run_inline(workspace, sites, laboratory.events)
    identity = Bundle.open(bundle, check_blobs=False).id
    state = StudyState.load(workspace.checkpoint, identity_of(study, identity))
    for name, row in rows_of(study, state, identity).items():
        _score(study, row, sites, folder / f"{_file(name)}.safetensors")
    _clean(workspace)
    write_atomically(folder / "done", _origin(study, bundle).encode())


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
) -> None:
    study = mask_study(comparison, laboratory.scenario, next(iter(comparison.variants)), seed)
    target = folder / CONTROL
    identity = Bundle.open(bundle, check_blobs=False).id
    _begin(target, f"{comparison.supervised.model_dump_json()} {study.image_size} {identity}")
    source = MaskRow(identity, ("source",), {}, batch_norm="global")
    adapted = MaskRow(identity, ("source",), {})
    for name, row in (("source-only", source), ("bn-adapted", adapted)):
        if not (target / f"{name}.safetensors").exists():
            _score(study, row, sites, target / f"{name}.safetensors")
    if not (target / "supervised.safetensors").exists():
        trained = _train_supervised(comparison, laboratory, bundle, sites, target, seed)
        _score(study, MaskRow(trained, ("source",), {}), sites, target / "supervised.safetensors")


def _begin(folder: Path, origin: str) -> None:
    """Empty a folder whose files are of another origin."""
    marker = folder / "origin"
    if not marker.exists() or marker.read_text() != origin:
        shutil.rmtree(folder, ignore_errors=True)
        write_atomically(marker, origin.encode())


def _train_supervised(
    comparison: SegmentationComparison,
    laboratory: Laboratory,
    bundle: Path,
    sites: list[Path],
    folder: Path,
    seed: int,
) -> str:
    """Train on all pools' masks, as only a laboratory that owns all data may, and install it."""
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
    return signed.id


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


def _score(study: Study, row: MaskRow, sites: list[Path], path: Path) -> None:
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
    write_atomically(path, to_bytes(Records(arrays, {"patients": patients})))


def _read(path: Path) -> MaskScores:
    records = from_bytes(path.read_bytes())
    patients = records.config["patients"]
    measures = {
        site: {measure: np.asarray(records.arrays[f"{site}/{measure}"]) for measure in MEASURES}
        for site in patients
    }
    return MaskScores(patients, measures)


def _origin(study: Study, bundle: Path) -> str:
    return f"{study.digest()} {Bundle.open(bundle, check_blobs=False).id}"


def _file(what: str) -> str:
    return what.replace(" ", "-")
