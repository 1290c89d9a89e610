"""Reconstruct the pool, one batch after another, each kept as soon as it is done."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor

from sonofed_client.adaptation.reconstruction import quality, reconstruct
from sonofed_client.enclave.release import MEASURED
from sonofed_client.enclave.site import Site
from sonofed_client.enclave.store import JOB_CACHE_BYTES
from sonofed_client.enclave.views import redrawn_as_seen_by, seen_by
from sonofed_common.contract.actions import Pooled, Reconstruct
from sonofed_common.contract.records import Records
from sonofed_common.contract.study import Reconstruction
from sonofed_common.runtime import derive_seed
from sonofed_common.security import sha256


def reconstruct_pool(site: Site, parameters: Reconstruct, request: Records) -> Records:
    """Go on for a slice of time; reply with progress, and with mean quality once done.

    Batches are cut from the catalogue's fixed order and kept whole, and an image's noise depends on
    the image and the diffusion model alone: neither slices nor restarts change a result.
    """
    rows, images = site.images("pool", parameters.image_size)
    name = artifact(site, parameters, parameters.settings)
    done = {n.removeprefix(f"{name}/") for n in site.store.names(f"{name}/")}
    until = time.monotonic() + parameters.slice_seconds
    for start in range(0, len(rows), parameters.settings.batch_size):
        batch = range(start, min(start + parameters.settings.batch_size, len(rows)))
        todo = [n for n in batch if rows[n].id not in done]
        if not todo:
            continue
        seeds = [derive_seed(name, rows[n].id) for n in todo]
        stack = site.diffusion(parameters.bundle)
        output = reconstruct(stack, images[todo].to(site.device), parameters.settings, seeds)
        kept = (output.cpu() * 255).round().to(torch.uint8).numpy()
        site.store.put_many(
            {f"{name}/{rows[n].id}": Records({"image": kept[i]}) for i, n in enumerate(todo)}
        )
        done.update(rows[n].id for n in todo)
        site.events.progress("reconstruct", sum(row.id in done for row in rows), len(rows))
        # Asked only now: the shortest slice still brings the work forward by a batch.
        if time.monotonic() > until:
            break
    finished = sum(row.id in done for row in rows)
    config = {"done": finished, "total": len(rows)}
    if finished < len(rows):
        return Records(config={**config, "state": "running"})
    redrawn = reconstructions(site, parameters, parameters.settings)
    # Read just now, the pool's own go last; as bytes they are a quarter of these floats.
    site.store.trim("reconstruction/", max(JOB_CACHE_BYTES, redrawn.nbytes))
    return Records(
        config={**config, "state": "done", MEASURED: len(rows)},
        metrics=_quality(site, parameters, images, redrawn),
    )


def reconstructions(site: Site, parameters: Pooled, settings: Reconstruction) -> Tensor:
    """Return the pool's reconstructions (N, 1, S, S) in [0, 1], in the catalogue's order.

    Raises
    ------
    OrderError
        Some are not done yet.
    """
    name = artifact(site, parameters, settings)
    images = [
        site.need(f"{name}/{row.id}", "reconstructions").arrays["image"]
        for row in site.store.images("pool")
    ]
    return torch.from_numpy(np.stack(images)).to(torch.float32) / 255


def _quality(
    site: Site, parameters: Reconstruct, images: Tensor, redrawn: Tensor
) -> dict[str, int | float]:
    name = quality_classifier(site, parameters.bundle)
    size, bundle = parameters.image_size, parameters.bundle
    _, seen = seen_by(name, site, "pool", bundle, size)
    shown = (seen, redrawn_as_seen_by(name, site, redrawn, bundle))
    features = (site.source_features(bundle, name, i) for i in shown)
    return dict(quality(images, redrawn, *features))


def quality_classifier(site: Site, bundle: str) -> str:
    """Name of the classifier on whose features reconstructions are compared with originals."""
    return str(next(iter(site.facts(bundle)["classifiers"])))


def artifact(site: Site, parameters: Pooled, settings: Reconstruction) -> str:
    """Name under which the reconstructions by this diffusion model and sampler are kept."""
    files = site.manifest(parameters.bundle).files
    model = sorted((p, blob.sha256) for p, blob in files.items() if p.startswith("diffusion/"))
    sampler = settings.model_dump_json(exclude={"batch_size"})
    key = sha256(f"{model} {parameters.image_size} {sampler}".encode())
    return f"reconstruction/{key[:16]}"
