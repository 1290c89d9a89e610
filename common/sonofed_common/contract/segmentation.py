"""What a bundle says of its segmenters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.study import ClassifierNorm, Phase, Study
from sonofed_common.contract.study_segmentation import SiteNorm

NEEDS_SEGMENTER: frozenset[Phase] = frozenset(
    ("pretrain", "supervise", "pseudo_label", "ensemble", "evaluate")
)
"""Phases that work on the source's segmenter."""


def needing_source_data(study: Study) -> list[Phase]:
    """Return the phases that work on the source's labelled images, at the coordinator."""
    adapts = "pseudo_label" in study.phases and study.infusion.calibration == "source"
    gates = "supervise" in study.phases and study.infusion.rule == "gate"
    needs: dict[Phase, bool] = {"supervise": True, "ensemble": adapts or gates}
    return [phase for phase in study.phases if needs.get(phase)]


class SegmentationFacts(Model):
    """Facts ``segmentation`` of a bundle with ``segmenters/<branch>.safetensors``.

    Attributes
    ----------
    encoder : str
        One of `ENCODERS`; the same for all branches.
    classes : int
        C, background included.
    heads : pair of str
        Main and auxiliary head.
    class_ratio : tuple of float (C,)
        Mean share of each class in the source's images.
    foreground_range : pair of float
        5% and 95% quantile over the source's images of the share that is not background.
    flips : bool
        Whether a mirrored image is one of the same classes; false where classes have a side. Holds
        for all who train or adapt.
    """

    encoder: str
    classes: int = Field(ge=2, le=64)
    heads: tuple[Literal["unet", "aspp"], Literal["unet", "aspp"]]
    class_ratio: tuple[float, ...]
    foreground_range: tuple[float, float]
    flips: bool


class Normalisation(Model):
    """Fact ``normalisation`` of a final bundle: whose statistics its weights were tested with.

    Those that the weights carry are the source's or a mean over the hospitals, no hospital's own.

    Attributes
    ----------
    segmenters : {"site", "mixed"}
        The site's own, or their mean with those that the weights carry.
    classifiers : {"site", "global", "local"}
        The site's own, those that the weights carry, or those of layers that stayed at the sites:
        then the weights carry the source's layers, with which nothing was tested.
    """

    segmenters: SiteNorm
    classifiers: ClassifierNorm


def misfit(study: Study, encoder: str, image_size: int, flips: bool) -> str | None:
    """Say why a source's segmenter cannot serve a study, or return None where it can.

    Parameters
    ----------
    study : Study
        What is asked.
    encoder : str
        Of the source's segmenter.
    image_size : int
        Side of the images that it was trained on.
    flips : bool
        Whether it was trained on mirrored images too.
    """
    if not NEEDS_SEGMENTER & set(study.phases):
        return None
    if study.image_size != image_size:
        # The widest dilations of the ASPP head come of the side that it was trained on.
        return (
            f"the study's image_size is {study.image_size}, but the source's segmenter was trained "
            f"on {image_size}; leave image_size out, or train the source on {study.image_size}"
        )
    if "pretrain" in study.phases and study.pretraining.form == "mae" and encoder != "vit":
        return (
            f"pretraining of form 'mae' needs the encoder 'vit', but the source's segmenter has "
            f"'{encoder}'; choose 'simmim', or train the source with 'vit'"
        )
    if study.infusion.mirrored and not flips:
        return (
            "infusion.mirrored is on, but the source's segmenter was trained without flips, for "
            "classes that have a side; leave it off, or train the source with flips"
        )
    return None
