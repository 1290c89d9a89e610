"""Supervise: segmenters trained on source labels from the target-informed encoders."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from safetensors.torch import load

from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.records import Array, Records, from_bytes, to_bytes
from sonofed_common.runtime import derive_seed, set_threads, write_atomically
from sonofed_common.security import sha256
from sonofed_server.phases.branches import branches, install_branches
from sonofed_server.phases.pretrain import encoders
from sonofed_server.source.segmenter import segmenter_facts, train_segmenter
from sonofed_server.source.settings import SegmenterTraining
from sonofed_server.source.training import weights_bytes
from sonofed_server.study.run import StudyRun


def supervise(run: StudyRun) -> None:
    """Train a branch from each encoder, sign them beside the source's, and install them."""
    source = branches(run)
    weights = {"source": source.weights("source")}
    facts: dict[str, Any] = dict(run.bundle.manifest.facts["segmenters"])
    for name, encoder in encoders(run).items():
        trained = train_branch(run, name, encoder)
        weights[name], facts[name] = save(trained.arrays), trained.config
        run.events.emit("branch", branch=name, **trained.config["metrics"])
    install_branches(run, "branches", weights, {"segmenters": facts})


def train_branch(run: StudyRun, name: str, encoder: dict[str, Array]) -> Records:
    """Train a branch, or take it from the cache: studies that share one do not train it twice.

    Parameters
    ----------
    run : StudyRun
        Its seed is the training's.
    name : str
        Of the branch, for the progress.
    encoder : dict of str to ndarray
        Weights that its encoder starts from.

    Returns
    -------
    Records
        The branch's weights, and the facts of `segmenter_facts`.
    """
    source = run.source()
    style = run.study.supervision.style_augmentation
    settings = source.segmenter
    if style is not None:
        settings = settings.model_copy(update={"style_augmentation": style})
    key = _key(run, settings, encoder)
    path = run.workspace.cache / f"{key}.safetensors"
    if (kept := _kept(path.read_bytes() if path.exists() else b"")) is not None:
        return kept
    set_threads(source.settings.threads)
    checkpoint = run.workspace.cache / f"{key}.training.safetensors"
    # Of a source that has the study's seed the branches differ by their encoder's start alone.
    model = train_segmenter(
        source.data.pool,
        settings,
        derive_seed(run.study.seed, "segmenter"),
        {k: torch.from_numpy(np.array(v)) for k, v in encoder.items()},
        checkpoint=checkpoint,
        events=run.events,
        task=f"supervise {name}",
    )
    weights = {k: v.numpy() for k, v in load(weights_bytes(model)).items()}
    trained = Records(weights, segmenter_facts(model, source.data.test))
    write_atomically(path, to_bytes(trained))
    checkpoint.unlink(missing_ok=True)
    return trained


def _key(run: StudyRun, settings: SegmenterTraining, encoder: dict[str, Array]) -> str:
    source = run.source()
    parts = {
        "settings": settings.model_dump(mode="json"),
        "seed": run.study.seed,
        "split": source.settings.seed,
        "image_size": source.settings.image_size,
        "threads": source.settings.threads,
        "data": source.data.provenance.digest,
        "encoder": Records(encoder).digest(),
        "versions": [version("sonofed"), version("torch")],
        "test_fraction": source.settings.data.test_fraction,
    }
    return sha256(json.dumps(parts, sort_keys=True).encode())


def _kept(data: bytes) -> Records | None:
    try:
        return from_bytes(data)
    except ParameterError:
        return None
