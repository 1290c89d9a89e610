"""Controls of a segmentation comparison: the source as it is, re-normalised, and with all masks."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load as load_weights
from torch import Tensor

from sonofed_client.enclave.handlers.bundles import install
from sonofed_client.enclave.site import Site
from sonofed_client.settings import read_site
from sonofed_common.contract.actions import Install, request
from sonofed_common.contract.bundle import MANIFEST, SIGNATURE, Bundle, BundleWriter
from sonofed_common.contract.configuration import Model
from sonofed_common.contract.study import Study
from sonofed_common.runtime import derive_seed, set_threads
from sonofed_common.security import load_or_create_signing_key
from sonofed_server.source.segmentation_data import SegmentationPart
from sonofed_server.source.segmenter import train_segmenter
from sonofed_server.source.training import weights_bytes
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.segmentation_rows import MaskRow
from sonofed_simulations.segmentation_scores import score_row, scores_file


class Supervised(Model):
    """The upper bound: the source's segmenter trained on with the masks of all sites' pools."""

    epochs: int = Field(ge=1)
    learning_rate: float = Field(gt=0, le=1)


def score_controls(
    supervised: Supervised,
    study: Study,
    laboratory: Laboratory,
    bundle: Path,
    sites: list[Path],
    folder: Path,
    shown: Collection[str],
) -> None:
    """Score the `CONTROLS` that are shown and not there yet.

    Parameters
    ----------
    supervised : Supervised
        How the upper bound is trained.
    study : Study
        Says seed and image size.
    laboratory : Laboratory
        Owns all data.
    bundle : Path
        The source's.
    sites : list of Path
        Settings files.
    folder : Path
        Of the scores.
    shown : collection of str
        Which of them to score.
    """
    identity = Bundle.open(bundle, check_blobs=False).id
    source = MaskRow(identity, ("source",), {}, batch_norm="global")
    for name, row in (("source-only", source), ("bn-adapted", MaskRow(identity, ("source",), {}))):
        if name in shown and not (path := scores_file(folder, name)).exists():
            score_row(study, row, sites, path)
    if "supervised" in shown and not (path := scores_file(folder, "supervised")).exists():
        trained, counts = _train_supervised(supervised, study, laboratory, bundle, sites, folder)
        score_row(study, MaskRow(trained, ("source",), {}), sites, path, counts)


def _train_supervised(
    supervised: Supervised,
    study: Study,
    laboratory: Laboratory,
    bundle: Path,
    sites: list[Path],
    folder: Path,
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
    opened = [Site(read_site(path)) for path in sites]
    images, masks = zip(*(_labelled(site, study.image_size) for site in opened), strict=True)
    pool = SegmentationPart((), torch.cat(images), torch.cat(masks))
    weights = load_weights(source.read("segmenters/source.safetensors"))
    set_threads(laboratory.scenario.threads)
    model = train_segmenter(
        pool,
        settings.model_copy(update=supervised.model_dump()),
        derive_seed(study.seed, "supervised"),
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
