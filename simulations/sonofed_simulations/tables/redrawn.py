"""Images redrawn by the source's diffusion stack: what two tables of ADAptation are measured on."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from sonofed_client.adaptation.reconstruction import quality, reconstruct
from sonofed_client.adaptation.spacing import evenly_spaced
from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.records import Records, to_bytes
from sonofed_common.contract.study import PRESETS, Reconstruction
from sonofed_common.data.sample import Sample
from sonofed_common.models.classifiers import Classifier
from sonofed_common.models.stack import DiffusionStack
from sonofed_common.runtime import Events, derive_seed, device, set_threads, write_atomically
from sonofed_common.security import sha256
from sonofed_server.source.data import load_source
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.report.clouds import similarity
from sonofed_simulations.report.view import SourceView
from sonofed_simulations.statistics import Floats
from sonofed_simulations.tables.features import features_of
from sonofed_simulations.tables.hospitals import read_hospitals
from sonofed_simulations.tables.manifest import Tested
from sonofed_simulations.tables.records import read_records
from sonofed_simulations.tables.redrawn_settings import FULL, QUICK, THREADS, RedrawnSettings
from sonofed_simulations.tables.request import Made, Request, part_of
from sonofed_simulations.tables.start import Start, read_start

SOURCE = "source, held out"
BLUR = "blur, no diffusion"
BLUR_WIDTH = 1.0
"""Standard deviation in pixels: a filter that knows nothing of the source."""
WAYS: dict[str, Reconstruction | None] = {
    "default": Reconstruction(),
    BLUR: None,
    "as published": Reconstruction(**PRESETS["paper"]["reconstruction"]),
}
"""How images are redrawn; None blurs them, which takes no seed."""
MEASURES = ("ssim", "psnr", "feature_distance")


@dataclass(frozen=True)
class Shown:
    """Images of one site that the source's models never saw."""

    site: str
    images: Tensor
    samples: tuple[Sample, ...]
    digest: str


@dataclass(frozen=True)
class Redrawn:
    """One site's images redrawn one way under one seed.

    Attributes
    ----------
    site, way, seed
        Which cell it is.
    patients : tuple of str (N,)
        Patient of each image.
    quality : dict of str to ndarray (N,)
        By `MEASURES`, an image each: SSIM in [-1, 1], PSNR in dB, and one minus the cosine of
        the features of image and reconstruction, in [0, 2].
    before, after : ndarray (N,)
        Similarity to the source of the images and of their reconstructions.
    seconds : float
        What redrawing and measuring took.
    """

    site: str
    way: str
    seed: int
    patients: tuple[str, ...]
    quality: Mapping[str, Floats]
    before: Floats
    after: Floats
    seconds: float


Cells = Mapping[tuple[str, str], Sequence[Redrawn]]
"""Finished cells by way and site, a seed each."""


@dataclass(frozen=True)
class Redrawing:
    """The source's models and the images of every site.

    Attributes
    ----------
    settings : RedrawnSettings
        Of the quick or the full form.
    laboratory : Laboratory
        Its folder gets the source and, in ``redrawn``, the cells.
    shown : tuple of Shown
        The source's held-out images first.
    start : Start
        The source's classifier, with its own normalisation statistics.
    stack : str
        See `stack_digest`.
    """

    settings: RedrawnSettings
    laboratory: Laboratory
    shown: tuple[Shown, ...]
    start: Start
    stack: str

    @classmethod
    def prepare(cls, request: Request) -> Redrawing:
        """Train the source's models unless that is done, and choose the images.

        Raises
        ------
        ConfigurationError
            See `Request.check`.
        DataMissingError
            A data set is not there.
        """
        request.check()
        settings = QUICK if request.quick else FULL
        set_threads(THREADS)
        work = request.out / "work"
        laboratory = Laboratory(settings.read_scenario(), work, request.real_data, request.events)
        scenario = laboratory.scenario
        with laboratory.alone():
            bundle = laboratory.prepare_source()
            start = read_start(bundle, scenario.study.classifiers[0])
            hospitals = read_hospitals(laboratory, settings.image_size)
        source = load_source(scenario.source, laboratory.source_data)
        parts = [(SOURCE, source.test.images, source.test.samples, source.provenance.digest)]
        parts += [(h.name, h.images, h.samples, h.provenance.digest) for h in hospitals]
        shown = tuple(_spread(*part, settings.images) for part in parts)
        return cls(settings, laboratory, shown, start, stack_digest(bundle))

    @property
    def wanted(self) -> list[tuple[int, str, Shown]]:
        """Seed, way and images of every cell, the quick ways first."""
        return [
            (seed, way, shown)
            for way, settings in WAYS.items()
            for seed in (self.settings.seeds if settings is not None else self.settings.seeds[:1])
            for shown in self.shown
        ]

    def run(self, shard: tuple[int, int]) -> None:
        """Redraw one shard's cells that are not there yet."""
        own = part_of(self.wanted, shard)
        for done, (seed, way, shown) in enumerate(own, start=1):
            path, origin = self._place(seed, way, shown)
            if read_records(path, origin) is None:
                write_atomically(path, to_bytes(self._redraw(seed, way, shown, origin)))
            self._events.progress("cells", done, len(own), site=shown.site, way=way, seed=seed)

    def finished(self) -> Cells:
        """Finished cells, of all shards, that still are what the tables ask for."""
        found: dict[tuple[str, str], list[Redrawn]] = {}
        for seed, way, shown in self.wanted:
            records = read_records(*self._place(seed, way, shown))
            if records is not None:
                values = {name: array.astype(np.float64) for name, array in records.arrays.items()}
                before, after = values.pop("before"), values.pop("after")
                patients = tuple(records.config["patients"])
                seconds = float(records.metrics["seconds"])
                cell = Redrawn(shown.site, way, seed, patients, values, before, after, seconds)
                found.setdefault((way, shown.site), []).append(cell)
        return found

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        source = self.laboratory.scenario.source
        return {
            "source": {
                "bundle": self.start.bundle,
                "settings": source.model_dump(mode="json", exclude_none=True),
            },
            "data": {shown.site: shown.digest for shown in self.shown},
            "images": {shown.site: len(shown.images) for shown in self.shown},
            "ways": {way: _settings(way) for way in WAYS},
            "seeds": list(self.settings.seeds),
        }

    def tested(self) -> Tested:
        """Patients of the images that were redrawn, under every seed the same."""
        return {"redrawn": {s.site: [sample.group for sample in s.samples] for s in self.shown}}

    @property
    def _events(self) -> Events:
        return self.laboratory.events

    @cached_property
    def _stack(self) -> DiffusionStack:
        return read_stack(self.laboratory.root / "source")

    @cached_property
    def _source(self) -> SourceView:
        """Features of the images that the source was trained on."""
        pool = load_source(self.laboratory.scenario.source, self.laboratory.source_data).pool
        return SourceView(features_of(self.start.model(), pool.images))

    def _place(self, seed: int, way: str, shown: Shown) -> tuple[Path, dict[str, Any]]:
        origin = {
            **self.start.origin,
            "stack": self.stack,
            "data": shown.digest,
            "images": len(shown.images),
            "way": _settings(way),
            "seed": seed,
        }
        folder = self.laboratory.root / "redrawn" / f"seed-{seed}" / way
        return folder / f"{shown.site}.safetensors", origin

    def _redraw(self, seed: int, way: str, shown: Shown, origin: Mapping[str, Any]) -> Records:
        began = time.perf_counter()
        settings, images = WAYS[way], shown.images
        if settings is None:
            blurred = gaussian_filter(images.numpy(), BLUR_WIDTH, axes=(2, 3))
            redrawn = torch.from_numpy(blurred)
        else:
            seeds = [derive_seed(seed, way, sample.name) for sample in shown.samples]
            redrawn = reconstruct(self._stack, images, settings, seeds)
        arrays = measure(images, redrawn, self.start.model(), self._source)
        config = {"origin": dict(origin), "patients": [s.group for s in shown.samples]}
        return Records(arrays, config, {"seconds": time.perf_counter() - began})


def make_redrawn(request: Request, write: Callable[[Redrawing, Request], Made]) -> Made:
    """Run one shard's cells that are not there yet, and write a table of all finished ones.

    An interruption from the keyboard writes the table of what has finished, too.

    Raises
    ------
    ConfigurationError, DataMissingError
        See `Redrawing.prepare`.
    """
    redrawing = Redrawing.prepare(request)
    try:
        redrawing.run(request.shard)
    except KeyboardInterrupt:
        write(redrawing, request)
        raise
    return write(redrawing, request)


def measure(
    images: Tensor, redrawn: Tensor, model: Classifier, source: SourceView
) -> dict[str, Floats]:
    """Measure reconstructions, an image at a time.

    Parameters
    ----------
    images, redrawn : Tensor of float32 (N, 1, S, S)
        In [0, 1].
    model : Classifier
        In evaluation mode; gives the features.
    source : SourceView
        Its features of the source's training images.

    Returns
    -------
    dict of str to ndarray (N,)
        `MEASURES`, and ``before`` and ``after`` as `Redrawn` has them.
    """
    features, after = (features_of(model, x) for x in (images, redrawn))
    pairs = (torch.from_numpy(features), torch.from_numpy(after))
    # The intervals need each image's own value, where `quality` tells means.
    found = [
        quality(*(part[n : n + 1] for part in (images, redrawn, *pairs)))
        for n in range(len(images))
    ]
    return {
        **{name: np.array([one[name] for one in found]) for name in MEASURES},
        "before": similarity(features, source),
        "after": similarity(after, source),
    }


def read_stack(folder: Path) -> DiffusionStack:
    """Read the frozen diffusion stack from the source's bundle."""
    bundle = Bundle.open(folder)
    with tempfile.TemporaryDirectory() as place:
        for path in bundle.paths:
            if path.startswith("diffusion/"):
                target = Path(place) / path.removeprefix("diffusion/")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(bundle.read(path))
        return DiffusionStack.load(Path(place)).to(device()).eval().requires_grad_(False)


def stack_digest(folder: Path) -> str:
    """SHA-256 of the files of the diffusion stack in the source's bundle."""
    files = Bundle.open(folder).manifest.files
    held = {path: file.sha256 for path, file in files.items() if path.startswith("diffusion/")}
    return sha256(json.dumps(held, sort_keys=True).encode())


def _settings(way: str) -> dict[str, Any]:
    settings = WAYS[way]
    if settings is None:
        return {"blur": BLUR_WIDTH}
    return settings.model_dump(mode="json", exclude={"batch_size"})


def _spread(site: str, images: Tensor, samples: Sequence[Sample], digest: str, most: int) -> Shown:
    chosen = evenly_spaced(torch.arange(len(images)), most)
    return Shown(site, images[chosen], tuple(samples[n] for n in chosen), digest)
