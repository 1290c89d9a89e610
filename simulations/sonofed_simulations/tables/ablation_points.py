"""Points of the ablation's stages and the reconstructions under them, each made once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sonofed_client.adaptation.reconstruction import reconstruct
from sonofed_common.contract.configuration import Model
from sonofed_common.contract.records import Records, to_bytes
from sonofed_common.contract.study import Embedding, Reconstruction
from sonofed_common.runtime import derive_seed, write_atomically
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.tables import redrawn_settings
from sonofed_simulations.tables.ablation import Points, Pooled, Stage, points_of
from sonofed_simulations.tables.hospitals import HospitalImages, split_of
from sonofed_simulations.tables.records import read_records
from sonofed_simulations.tables.redrawn import read_stack
from sonofed_simulations.tables.redrawn_settings import RedrawnSettings
from sonofed_simulations.tables.settings import SelectionTable, SplitName
from sonofed_simulations.tables.start import Start

BATCH = 64


class AblationSettings(Model):
    """Source, splits and training of the contrastive encoder.

    Notes
    -----
    ``splits`` has folds, views and fine-tuning of `adaptation-selection`; of each seed the first
    fold counts.
    """

    source: RedrawnSettings
    splits: SelectionTable
    embedding: Embedding = Embedding()
    reconstruction: Reconstruction = Reconstruction()


QUICK = AblationSettings(
    source=redrawn_settings.QUICK,
    splits=SelectionTable(scenario=redrawn_settings.QUICK.scenario, seeds=(0, 1, 2)),
)
FULL = AblationSettings(
    source=redrawn_settings.FULL,
    splits=SelectionTable(scenario=redrawn_settings.FULL.scenario, seeds=(0, 1, 2, 3, 4), views=8),
    embedding=Embedding(rounds=20, local_epochs=10),
)


@dataclass(frozen=True)
class PointStore:
    """The points that arms of one stage share.

    Attributes
    ----------
    settings : AblationSettings
        Of the quick or the full form.
    laboratory : Laboratory
        Its folder gets the reconstructions and the points.
    start : Start
        The source's classifier.
    hospitals : sequence of HospitalImages
        All labelled images.
    stack : str
        See `stack_digest`.
    """

    settings: AblationSettings
    laboratory: Laboratory
    start: Start
    hospitals: Sequence[HospitalImages]
    stack: str

    def points(self, stage: Stage, seed: int) -> Points:
        """Points of a stage under one seed, from their file or made now."""
        part = f"points/seed-{seed}/{stage}"
        path = self.laboratory.root / f"{part}.safetensors"
        origin = self.origin(stage, seed)
        # Another shard may be making the same ones, as in `_redrawn`.
        with self.laboratory.alone(part):
            kept = read_records(path, origin)
            if kept is None:
                pools = {hospital.name: self._pool(hospital, seed) for hospital in self.hospitals}
                events = self.laboratory.events
                found = points_of(stage, self.start, pools, self.settings.embedding, seed, events)
                kept = Records({"z": found.z, "r": found.r}, {"origin": origin})
                write_atomically(path, to_bytes(kept))
        return Points(np.array(kept.arrays["z"]), np.array(kept.arrays["r"]))

    def origin(self, stage: Stage, seed: int) -> dict[str, Any]:
        """What points are made of: they are made anew when any of it changes."""
        return {
            **self.start.origin,
            "stack": self.stack,
            "data": [hospital.provenance.digest for hospital in self.hospitals],
            "stage": stage,
            "embedding": self.settings.embedding.model_dump(mode="json"),
            "reconstruction": self._reconstruction,
            "folds": self.settings.splits.folds,
            "seed": seed,
        }

    @property
    def _reconstruction(self) -> dict[str, Any]:
        return self.settings.reconstruction.model_dump(mode="json", exclude={"batch_size"})

    def _pool(self, hospital: HospitalImages, seed: int) -> Pooled:
        redrawn = self._redrawn(hospital)
        places = {sample.name: n for n, sample in enumerate(hospital.samples)}
        split = split_of(hospital, self.settings.splits, SplitName(seed, 0))
        pool = [places[sample.name] for sample in split.pool]
        return Pooled(hospital.images[pool], redrawn[pool])

    def _redrawn(self, hospital: HospitalImages) -> Tensor:
        """All of a hospital's images redrawn, the same in every seed; kept as bytes."""
        part = f"reconstructions/{hospital.name}"
        path = self.laboratory.root / f"{part}.safetensors"
        origin = {
            "stack": self.stack,
            "data": hospital.provenance.digest,
            "reconstruction": self._reconstruction,
        }
        with self.laboratory.alone(part):
            kept = read_records(path, origin)
            if kept is None:
                stack = read_stack(self.laboratory.root / "source")
                seeds = [derive_seed("reconstruction", sample.name) for sample in hospital.samples]
                settings, count = self.settings.reconstruction, len(seeds)
                done = []
                for low in range(0, count, BATCH):
                    batch = slice(low, low + BATCH)
                    found = reconstruct(stack, hospital.images[batch], settings, seeds[batch])
                    done.append((found * 255).round().to(torch.uint8))
                    now = min(low + BATCH, count)
                    self.laboratory.events.progress(f"reconstructions {hospital.name}", now, count)
                kept = Records({"images": torch.cat(done).numpy()}, {"origin": origin})
                write_atomically(path, to_bytes(kept))
        return torch.from_numpy(np.array(kept.arrays["images"])).float() / 255
