"""The ensemble of segmenters that a study publishes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from sonofed_common.batch_norm import adapt_batch_norm, statistics_of
from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.configuration import validate
from sonofed_common.contract.errors import (
    BundleError,
    ConfigurationError,
    OrderError,
    ParameterError,
    SiteEmptyError,
)
from sonofed_common.contract.records import Records, from_bytes
from sonofed_common.contract.segmentation import Normalisation, SegmentationFacts
from sonofed_common.contract.study_segmentation import Infusion
from sonofed_common.models.classifiers import Classifier, build_classifier, sees_lesions
from sonofed_common.models.infusion import InfusionHead, confidence
from sonofed_common.models.segmenter import Segmenter, build_segmenter

INFUSION = "infusion.safetensors"
NEEDED = {"segmentation", "normalisation", "image_size"}
"""Facts of a bundle with an ensemble."""

OWN = Normalisation(segmenters="site", classifiers="site")
"""As studies have it by default."""


@dataclass(frozen=True)
class EnsemblePrediction:
    """What an ensemble says of B images.

    Attributes
    ----------
    probabilities : Tensor (B, C, S, S)
        Infused class probabilities.
    mask : Tensor (B, S, S)
        Most probable class, uint8.
    confidence : Tensor (B, S, S)
        Largest less second largest probability, in [0, 1].
    weights : Tensor (K, B, S, S)
        Weight of each branch, sum 1 over K.
    classes : dict of str to Tensor (B,)
        P(malignant) by classifier; empty where the ensemble has none.
    """

    probabilities: Tensor
    mask: Tensor
    confidence: Tensor
    weights: Tensor
    classes: dict[str, Tensor]


class SegmentationEnsemble:
    """Segmenters, an infusion head and, if wanted, classifiers, for inference.

    Parameters
    ----------
    branches : dict of str to Segmenter
        K segmenters of the same classes, in the order of the head's temperatures.
    head : InfusionHead
        For K branches.
    classifiers : dict of str to Classifier
        May be empty.
    normalisation : Normalisation
        Whose statistics `adapt` gives the networks.

    Notes
    -----
    Networks are put in evaluation mode. It predicts only after `adapt`: with other statistics than
    the study's rule gives, nobody tested it.
    """

    def __init__(
        self,
        branches: Mapping[str, Segmenter],
        head: InfusionHead,
        classifiers: Mapping[str, Classifier] | None = None,
        normalisation: Normalisation = OWN,
    ) -> None:
        self.branches = {name: model.eval() for name, model in branches.items()}
        self.head = head.eval()
        self.classifiers = {name: model.eval() for name, model in (classifiers or {}).items()}
        self.normalisation = normalisation
        self._carried = {name: statistics_of(model) for name, model in self.branches.items()}
        self._adapted = False

    def adapt(self, images: Tensor) -> None:
        """Give the networks the normalisation statistics that the study tested them with.

        Parameters
        ----------
        images : Tensor (N, 1, S, S)
            In [0, 1], of one hospital and without labels, as mixed as those to be predicted; the
            study took up to 128. They replace those of an earlier call.

        Raises
        ------
        SiteEmptyError
            Fewer than two images.
        """
        if len(images) < 2:
            raise SiteEmptyError(
                f"normalisation statistics need two images or more of the hospital, not "
                f"{len(images)}; add images"
            )
        mixed = self.normalisation.segmenters == "mixed"
        for name, model in self.branches.items():
            adapt_batch_norm(model, images, prior=self._carried[name] if mixed else None)
        if self.normalisation.classifiers == "site":
            for classifier in self.classifiers.values():
                adapt_batch_norm(classifier, images)
        self._adapted = True

    @torch.inference_mode()
    def predict(self, images: Tensor) -> EnsemblePrediction:
        """Segment, and classify, images (B, 1, S, S) in [0, 1] on the networks' device.

        Raises
        ------
        OrderError
            `adapt` was not called.
        """
        if not self._adapted:
            raise OrderError(
                "the ensemble does not have the hospital's normalisation statistics yet; call "
                "adapt(images) with its images first"
            )
        mirrored = self.head.settings.mirrored
        stacked = torch.stack([m.probabilities(images, mirrored) for m in self.branches.values()])
        p, weights = self.head(stacked)
        malignant = {n: model(images).softmax(1)[:, 1] for n, model in self.classifiers.items()}
        mask = p.argmax(dim=1).to(torch.uint8)
        return EnsemblePrediction(p, mask, confidence(p), weights, malignant)


def infusion_records(branches: Sequence[str], head: InfusionHead) -> Records:
    """Make the records that a bundle keeps as ``infusion.safetensors``."""
    settings = head.settings.model_dump(mode="json")
    return Records(head.arrays(), {"branches": list(branches), "infusion": settings})


def load_ensemble(bundle: Bundle) -> SegmentationEnsemble:
    """Load the ensemble of a final bundle, on CPU.

    Parameters
    ----------
    bundle : Bundle
        Holds ``segmenters/<branch>.safetensors``, ``infusion.safetensors`` (see `infusion_records`)
        and, if any, ``classifiers/<name>.safetensors``; facts ``segmentation``, ``normalisation``
        and ``image_size``. Classifiers of two views are left out: sites cut lesions out of larger
        images, by the source's segmenter. So are those whose normalisation layers stayed at the
        sites: without them nobody tested the rest.

    Raises
    ------
    BundleError
        A file or a fact is missing, or does not fit the others.
    """
    facts = bundle.manifest.facts
    if INFUSION not in bundle.paths or not facts.keys() >= NEEDED:
        raise BundleError("the bundle holds no ensemble; take the final bundle of a study")
    branches = {}
    classifiers = {}
    try:
        segmentation = validate(SegmentationFacts, facts["segmentation"], "the bundle's facts")
        normalisation = validate(Normalisation, facts["normalisation"], "the bundle's facts")
        kept = from_bytes(bundle.read(INFUSION))
        names = list(kept.config["branches"])
        settings = validate(Infusion, kept.config["infusion"], INFUSION)
        head = InfusionHead(len(names), settings, segmentation.classes)
        head.load(kept.arrays)
        for name in names:
            branches[name] = build_segmenter(
                segmentation.encoder,
                segmentation.classes,
                int(facts["image_size"]),
                segmentation.heads,
                pretrained=False,
            )
            _load(branches[name], bundle, f"segmenters/{name}.safetensors")
        whole = normalisation.classifiers != "local"
        for path in bundle.paths if whole else ():
            name = path.removeprefix("classifiers/").removesuffix(".safetensors")
            if path.startswith("classifiers/") and not sees_lesions(name):
                classifiers[name] = build_classifier(name, pretrained=False)
                _load(classifiers[name], bundle, path)
    except ConfigurationError as error:
        raise BundleError(
            f"the bundle's ensemble is not of this version: {error.message}"
        ) from error
    except (
        KeyError,
        ParameterError,
        RuntimeError,
        SafetensorError,
        TypeError,
        ValueError,
    ) as error:
        raise BundleError(
            "weights of the bundle's ensemble do not fit its networks; publish the study again "
            "with this version"
        ) from error
    return SegmentationEnsemble(branches, head, classifiers, normalisation)


def _load(model: torch.nn.Module, bundle: Bundle, path: str) -> None:
    model.load_state_dict(load_safetensors(bundle.read(path)))
