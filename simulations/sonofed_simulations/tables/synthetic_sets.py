"""Synthetic images of one site, trained for, drawn and judged once, and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sonofed_common.contract.names import CLASSES
from sonofed_common.contract.records import Records, to_bytes
from sonofed_common.contract.study_synthesis import WganTraining
from sonofed_common.models.diffusion import build_tiny
from sonofed_common.runtime import Events, derive_seed, device, write_atomically
from sonofed_common.security import sha256
from sonofed_common.synthesis import memorisation, synthetic
from sonofed_common.synthesis.synthetic import Drawing, synthesise
from sonofed_common.synthesis.wgan import train_drawing
from sonofed_server.source.data import Part, SourceSet
from sonofed_server.source.diffusion import train_diffusion
from sonofed_server.source.settings import DiffusionTraining, SyntheticImages
from sonofed_server.source.synthetic import EdgeDrawing
from sonofed_simulations.locks import alone
from sonofed_simulations.tables.breast_sites import parts_facts
from sonofed_simulations.tables.code import code_of
from sonofed_simulations.tables.records import read_records


@dataclass(frozen=True)
class SyntheticSet:
    """Images that passed the memorisation gate.

    Attributes
    ----------
    images : Tensor
        (N, 1, S, S), in [0, 1].
    labels : Tensor
        (N,) int64.
    facts : dict
        See `synthesise`.
    """

    images: Tensor
    labels: Tensor
    facts: dict[str, Any]

    def first(self, count: int, malignant: float) -> tuple[Tensor, Tensor]:
        """The first ``count`` images, a share of them malignant; fewer where fewer passed."""
        wanted = round(count * malignant)
        chosen = torch.cat(
            [
                (self.labels == label).nonzero().flatten()[:number]
                for label, number in ((0, count - wanted), (1, wanted))
            ]
        )
        return self.images[chosen], self.labels[chosen]


def synthetic_set(
    source: SourceSet,
    count: int,
    generator: WganTraining | DiffusionTraining,
    seed: int,
    folder: Path,
    events: Events,
) -> SyntheticSet:
    """Return up to ``count`` images in the class shares of the pool, made unless they are there.

    Parameters
    ----------
    source : SourceSet
        The generator is trained on its whole pool, whatever part of it a classifier sees.
    count : int
        Images wanted.
    generator : WganTraining or DiffusionTraining
        Which one, and how it is trained.
    seed : int
        Of the generator and of the drawing.
    folder : Path
        Holds the set with what it was made of, and the generator's checkpoints.
    events : Events
        Gets the progress.

    Raises
    ------
    RefusedError
        Of a class no image passes the gate, or the set tells the training images.
    """
    origin = synthetic_origin(source, count, generator, seed)
    # Sets of several counts, or judged by several gates, share one generator.
    of_generator = {name: value for name, value in origin.items() if name != "gate"}
    text = json.dumps({**of_generator, "count": None}, sort_keys=True)
    checkpoints = folder / f"generator-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    path = folder / f"{count}-images.safetensors"
    # Another shard may be making the same images, or training the same generator.
    with alone(folder / "images.lock", events):
        records = read_records(path, origin)
        if records is None:
            drawing = _trained(source.pool, generator, seed, checkpoints, events)
            malignant = round(count * float(source.pool.labels.float().mean()))
            made, facts = synthesise(
                drawing,
                source.pool.labelled,
                source.test.labelled,
                (count - malignant, malignant),
                derive_seed(seed, "draw"),
                events,
                # The page tells how many passed.
                least=0.0,
            )
            records = Records(made.arrays, {"origin": origin, "facts": facts})
            write_atomically(path, to_bytes(records))
    images = torch.from_numpy(records.arrays["images"])[:, None].float() / 255
    labels = torch.from_numpy(records.arrays["labels"])
    return SyntheticSet(images, labels, dict(records.config["facts"]))


def synthetic_origin(
    source: SourceSet, count: int, generator: WganTraining | DiffusionTraining, seed: int
) -> Mapping[str, Any]:
    """What a set is made of, as JSON values."""
    return {
        "data": source.provenance.digest,
        "split": parts_facts(source),
        "size": source.pool.images.shape[-1],
        "generator": generator.model_dump(mode="json", exclude_none=True),
        "count": count,
        "seed": seed,
        "gate": _gate(),
    }


@cache
def _gate() -> str:
    """Digest of the memorisation gate, and of what asks it."""
    return sha256("".join(map(code_of, (memorisation, synthetic))).encode())[:16]


def _trained(
    pool: Part,
    generator: WganTraining | DiffusionTraining,
    seed: int,
    checkpoints: Path,
    events: Events,
) -> Drawing:
    if isinstance(generator, WganTraining):
        files = [checkpoints / f"wgan-{name}.safetensors" for name in CLASSES]
        return train_drawing(pool.images, pool.labels, generator, seed, files, events)
    stack = build_tiny(pool.images.shape[-1], derive_seed(seed, "stack")).to(device())
    train_diffusion(
        stack,
        pool.images,
        epochs=generator.epochs,
        learning_rate=generator.learning_rate,
        batch_size=generator.batch_size,
        seed=seed,
        checkpoint=checkpoints / "diffusion.safetensors",
        events=events,
    )
    return EdgeDrawing(stack, pool, SyntheticImages(per_class=1))
