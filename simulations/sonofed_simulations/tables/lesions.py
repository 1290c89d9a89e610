"""The second view of a hospital's images: the lesion, where the source's segmenter finds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from sonofed_client.enclave.views import outlined
from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.configuration import validate
from sonofed_common.contract.segmentation import SegmentationFacts
from sonofed_common.data.images import load_images
from sonofed_common.data.lesions import BATCH, ENLARGED, with_lesions
from sonofed_common.models.segmenter import Segmenter, build_segmenter
from sonofed_common.runtime import Events, device
from sonofed_simulations.tables.hospitals import HospitalImages


@dataclass(frozen=True)
class LesionFinder:
    """The source's segmenter.

    Attributes
    ----------
    facts : SegmentationFacts
        What it is built from.
    weights : dict of str to Tensor
        Its state.
    digest : str
        SHA-256 of the file of its weights.
    """

    facts: SegmentationFacts
    weights: dict[str, Tensor]
    digest: str

    def beside(self, hospital: HospitalImages, pool: Sequence[int], events: Events) -> Tensor:
        """Put the lesion beside each image (N, 2, S, S), as a hospital does; see `outlined`."""
        images = hospital.images
        batches = torch.split(images, BATCH)
        tracked = events.track(batches, f"outline lesions {hospital.name}", len(batches))
        segmenter = self._segmenter(images.shape[-1]).to(device())
        shown = (batch.to(device()) for batch in tracked)
        boxes = outlined(segmenter, images[list(pool)], shown)
        larger, _, _ = load_images(list(hospital.samples), ENLARGED * images.shape[-1])
        return with_lesions(images, larger, boxes)

    def _segmenter(self, size: int) -> Segmenter:
        facts = self.facts
        model = build_segmenter(facts.encoder, facts.classes, size, facts.heads, pretrained=False)
        model.load_state_dict(self.weights)
        return model


def read_lesion_finder(bundle: Bundle) -> LesionFinder:
    """Read the segmenter from the source's bundle."""
    path = "segmenters/source.safetensors"
    facts = validate(SegmentationFacts, bundle.manifest.facts["segmentation"], "the bundle's facts")
    return LesionFinder(
        facts, load_safetensors(bundle.read(path)), bundle.manifest.files[path].sha256
    )
