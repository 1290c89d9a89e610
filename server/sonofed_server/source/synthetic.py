"""Synthetic source images by the diffusion stack: real edges, invented echotexture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from sonofed_common.contract.study import Reconstruction
from sonofed_common.data.images import load_images
from sonofed_common.models.sampling import reconstruct
from sonofed_common.models.stack import DiffusionStack
from sonofed_common.synthesis.synthetic import BATCH, Wanted
from sonofed_server.source.data import Part
from sonofed_server.source.settings import SyntheticImages


class EdgeDrawing:
    """Draws by a diffusion stack: real edges, invented echotexture.

    Parameters
    ----------
    stack : DiffusionStack
        Trained on the source.
    pool : Part
        Edges and labels come from its images; nothing is drawn from held-out ones.
    settings : SyntheticImages
        The sampler.

    Notes
    -----
    Sampling starts from pure noise: only the edge map of a training image, mirrored at random,
    carries its class, and the echotexture is the model's own.
    """

    def __init__(self, stack: DiffusionStack, pool: Part, settings: SyntheticImages) -> None:
        self._stack, self._labels = stack, pool.labels
        self._size = pool.images.shape[-1]
        self._images = pool.images
        if stack.image_size != self._size:
            self._images, _, _ = load_images(list(pool.samples), stack.image_size)
        self._sampling = Reconstruction(
            init="noise",
            sampler=settings.sampler,
            steps=settings.steps,
            guidance=settings.guidance,
            batch_size=BATCH,
        )

    def draw(self, batch: Sequence[Wanted]) -> Tensor:
        """Draw images (B, 1, S, S) in [0, 1]."""
        chosen = []
        for one in batch:
            draws = Generator().manual_seed(one.seed_of("edges"))
            members = (self._labels == one.label).nonzero().flatten()
            image = self._images[members[torch.randint(len(members), (), generator=draws)]]
            mirrored = bool(torch.randint(2, (), generator=draws))
            chosen.append(image.flip(-1) if mirrored else image)
        noise = [one.seed_of("noise") for one in batch]
        drawn = reconstruct(self._stack, torch.stack(chosen), self._sampling, noise)
        if drawn.shape[-1] != self._size:
            drawn = interpolate(drawn, self._size, mode="area")
        return drawn
