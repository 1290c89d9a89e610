"""Two views of an image for a selection table: the whole, and the lesion cut out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_safetensors
from torch import Tensor

from sonofed_client.adaptation.spacing import BATCH_NORM_IMAGES, evenly_spaced
from sonofed_common.batch_norm import adapt_batch_norm
from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.records import Records, from_bytes, to_bytes
from sonofed_common.data.augmentation import Augmentation
from sonofed_common.data.images import load_images, load_masks
from sonofed_common.data.lesions import ENLARGED, cut_out, lesion_boxes
from sonofed_common.data.sample import Sample
from sonofed_common.models.segmenter import Segmenter, build_segmenter
from sonofed_common.runtime import Events, derive_seed, write_atomically
from sonofed_common.security import load_or_create_signing_key, sha256
from sonofed_server.source.classifiers import train_classifier
from sonofed_server.source.data import Part, load_source
from sonofed_server.source.settings import SegmenterTraining
from sonofed_server.source.training import train_source, weights_bytes
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.tables.features import (
    BATCH,
    Begin,
    HospitalImages,
    SiteFeatures,
    Start,
    features_of,
    split_of,
)
from sonofed_simulations.tables.settings import SelectionTable, SplitName

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class LesionStart:
    """The source's segmenter, and its classifier of lesions cut out by their masks.

    Attributes
    ----------
    start : Start
        The classifier of whole images.
    outlines : Path
        Signed bundle of the segmenter.
    weights : dict of str to Tensor
        State of the classifier of lesions.
    digest : str
        Of both.
    """

    start: Start
    outlines: Path
    weights: dict[str, Tensor]
    digest: str

    def begin(self) -> Begin:
        """Return the head of both views: the mean of the logits of their own heads."""
        whole, lesion = self.start.model(), self._classifier()
        heads = [whole.head.state_dict(), lesion.head.state_dict()]
        head = {
            "weight": torch.cat([h["weight"] for h in heads], dim=1) / 2,
            "bias": (heads[0]["bias"] + heads[1]["bias"]) / 2,
        }
        none = np.zeros((0, head["weight"].shape[1]), np.float32)
        return Begin(head, whole.dropout.p, none)

    def features(
        self,
        whole: SiteFeatures,
        hospital: HospitalImages,
        table: SelectionTable,
        name: SplitName,
        path: Path,
        origin: Mapping[str, Any],
        events: Events,
    ) -> SiteFeatures:
        """Put the lesion's features of a site beside those of the whole images.

        Notes
        -----
        Segmenter and classifier have their normalisation statistics re-estimated on the pool alone,
        like that of whole images.
        """
        kept = from_bytes(path.read_bytes()) if path.exists() else None
        if kept is None or kept.config["origin"] != dict(origin):
            arrays = self._extract(hospital, table, name, events)
            kept = Records(arrays, {"origin": dict(origin)})
            write_atomically(path, to_bytes(kept))
        lesions = kept.arrays
        return replace(
            whole,
            views=np.concatenate([whole.views, lesions["views"]], axis=-1),
            test=np.concatenate([whole.test, lesions["test"]], axis=-1),
            unadapted=np.concatenate([whole.unadapted, lesions["unadapted"]], axis=-1),
        )

    def _extract(
        self, hospital: HospitalImages, table: SelectionTable, name: SplitName, events: Events
    ) -> dict[str, Floats]:
        split = split_of(hospital, table, name)
        places = {sample.name: n for n, sample in enumerate(hospital.samples)}
        pool, test = ([places[s.name] for s in part] for part in (split.pool, split.test))
        task = f"lesions {hospital.name}"
        events.progress(task, 0, table.views + 1, split=str(name))
        size = hospital.images.shape[-1]
        segmenter = self._segmenter(size)
        adapt_batch_norm(segmenter, evenly_spaced(hospital.images[pool], BATCH_NORM_IMAGES))
        boxes = lesion_boxes(_foreground(segmenter.eval(), hospital.images))
        lesions = _cut(hospital.samples, boxes, size)
        events.progress(task, 1, table.views + 1, split=str(name))
        model = self._classifier()
        unadapted = features_of(model, lesions[test])
        adapt_batch_norm(model, evenly_spaced(lesions[pool], BATCH_NORM_IMAGES))
        augmentation = Augmentation(derive_seed(name.seed, name.fold, hospital.name, "lesions"))
        views = []
        for view in range(table.views):
            views.append(features_of(model, lesions[pool], augmentation if view else None))
            events.progress(task, view + 2, table.views + 1, split=str(name))
        return {
            "views": np.stack(views),
            "test": features_of(model, lesions[test]),
            "unadapted": unadapted,
        }

    def _classifier(self) -> Any:
        model = self.start.model()
        model.load_state_dict(self.weights)
        return model.eval()

    def _segmenter(self, size: int) -> Segmenter:
        bundle = Bundle.open(self.outlines, check_blobs=False)
        facts = bundle.manifest.facts["segmentation"]
        heads = (facts["heads"][0], facts["heads"][1])
        model = build_segmenter(facts["encoder"], facts["classes"], size, heads, pretrained=False)
        model.load_state_dict(load_safetensors(bundle.read("segmenters/source.safetensors")))
        return model


def read_lesion_start(
    laboratory: Laboratory, start: Start, wanted: SegmenterTraining
) -> LesionStart:
    """Train what outlines and what classifies lesions on the source, unless that is done.

    Parameters
    ----------
    laboratory : Laboratory
        Names the source; its folder gets ``outlines/`` and ``lesions-....safetensors``.
    start : Start
        The classifier of whole images, whose network and training the lesions' has.
    wanted : SegmenterTraining
        Of the segmenter.
    """
    scenario = laboratory.scenario
    key = load_or_create_signing_key(laboratory.key)
    source = scenario.source.model_copy(update={"classifiers": (), "segmentation": wanted})
    outlines = train_source(
        source, laboratory.source_data, laboratory.root / "outlines", key, laboratory.events
    )
    path = laboratory.root / f"lesions-{start.bundle[:16]}.safetensors"
    if not path.exists():
        data = load_source(scenario.source, laboratory.source_data, laboratory.events)
        masks = load_masks(data.pool.samples, scenario.source.image_size)
        boxes = lesion_boxes((masks[:, 0] > 0).float())
        lesions = _cut(data.pool.samples, boxes, scenario.source.image_size)
        part = Part(data.pool.samples, lesions, data.pool.labels)
        seed = derive_seed(scenario.source.seed, "lesions", start.name)
        model = train_classifier(
            start.name,
            part,
            scenario.source.training,
            seed,
            path.with_suffix(".checkpoint"),
            laboratory.events,
        )
        write_atomically(path, weights_bytes(model))
        path.with_suffix(".checkpoint").unlink(missing_ok=True)
    weights = path.read_bytes()
    digest = sha256(f"{Bundle.open(outlines, check_blobs=False).id} {sha256(weights)}".encode())
    return LesionStart(start, outlines, load_safetensors(weights), digest)


def lesions_origin(lesion: LesionStart, whole: Mapping[str, Any]) -> dict[str, Any]:
    """What a site's features of both views are made of."""
    return {**whole, "lesions": lesion.digest}


@torch.inference_mode()
def _foreground(segmenter: Segmenter, images: Tensor) -> Tensor:
    """Probability (N, S, S) of anything but background."""
    parts = [1 - segmenter.probabilities(batch)[:, 0] for batch in torch.split(images, BATCH)]
    return torch.cat(parts)


def _cut(samples: Sequence[Sample], boxes: Tensor, size: int) -> Tensor:
    parts = []
    for first in range(0, len(samples), BATCH):
        batch = list(samples[first : first + BATCH])
        images, _, _ = load_images(batch, ENLARGED * size)
        parts.append(cut_out(images, boxes[first : first + BATCH], size))
    return torch.cat(parts)
