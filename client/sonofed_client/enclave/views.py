"""A site's images as a classifier sees them: whole, or with the lesion beside."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from sonofed_client.adaptation.spacing import BATCH_NORM_IMAGES, evenly_spaced
from sonofed_client.enclave.intake import pixels
from sonofed_client.enclave.site import Site
from sonofed_client.enclave.store import CataloguedImage
from sonofed_common.batch_norm import adapt_batch_norm
from sonofed_common.contract.records import Records
from sonofed_common.data.lesions import BATCH, ENLARGED, lesion_boxes, with_lesions
from sonofed_common.models.classifiers import sees_lesions
from sonofed_common.models.segmenter import Segmenter
from sonofed_common.security import sha256


def seen_by(
    classifier: str, site: Site, part: str, bundle: str, image_size: int
) -> tuple[list[CataloguedImage], Tensor]:
    """Return one part as a classifier sees it: rows, and images (N, V, S, S) in [0, 1].

    Parameters
    ----------
    classifier : str
        One of two views sees the lesion beside the whole image.
    site : Site
        Its images.
    part : str
        ``pool`` or ``test``.
    bundle : str
        Whose segmenter outlines lesions.
    image_size : int
        S, pixels.
    """
    rows, images = site.images(part, image_size)
    if not sees_lesions(classifier):
        return rows, images
    _, larger = site.images(part, ENLARGED * image_size)
    return rows, with_lesions(images, larger, _boxes(site, rows, bundle, image_size))


def redrawn_as_seen_by(classifier: str, site: Site, redrawn: Tensor, bundle: str) -> Tensor:
    """Show reconstructions (N, 1, S, S) of the pool so; lesions are where the originals' are."""
    if not sees_lesions(classifier):
        return redrawn
    boxes = _boxes(site, site.store.images("pool"), bundle, redrawn.shape[-1])
    return with_lesions(redrawn, redrawn, boxes)


def _boxes(site: Site, rows: list[CataloguedImage], bundle: str, image_size: int) -> Tensor:
    """Squares (N, 3) around the lesions of images, kept once they were found."""
    name = f"lesions/{sha256(f'{bundle} {site.snapshot} {image_size}'.encode())}"
    kept = site.store.get(name)
    if kept is None:
        kept = Records({"boxes": _found(site, bundle, image_size).numpy()})
        site.store.put(name, kept)
        site.store.trim("lesions/")
    boxes = torch.from_numpy(np.array(kept.arrays["boxes"]))
    return boxes[torch.tensor([row.position for row in rows], dtype=torch.long)]


def _found(site: Site, bundle: str, image_size: int) -> Tensor:
    """Boxes of the whole catalogue, by the source's segmenter."""
    _, pool = site.images("pool", image_size)
    batches = torch.split(pixels(site.store, image_size), BATCH)
    tracked = site.events.track(batches, "outline lesions", len(batches))
    shown = (batch.to(site.device).float() / 255 for batch in tracked)
    return outlined(site.segmenter(bundle, "source", image_size), pool, shown)


@torch.inference_mode()
def outlined(segmenter: Segmenter, pool: Tensor, batches: Iterable[Tensor]) -> Tensor:
    """Find a square around the lesion of each image.

    Parameters
    ----------
    segmenter : Segmenter
        The source's; its normalisation statistics are re-estimated on the pool.
    pool : Tensor (P, 1, S, S)
        In [0, 1].
    batches : iterable of Tensor (B, 1, S, S)
        The images, in [0, 1], on the segmenter's device.

    Returns
    -------
    Tensor of float32 (N, 3)
        See `lesion_boxes`.
    """
    adapt_batch_norm(segmenter, evenly_spaced(pool, BATCH_NORM_IMAGES))
    segmenter.eval()
    return torch.cat([lesion_boxes(1 - segmenter.probabilities(batch)[:, 0]) for batch in batches])
