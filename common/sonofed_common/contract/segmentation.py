"""What a bundle says of its segmenters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sonofed_common.contract.configuration import Model


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
    """

    encoder: str
    classes: int = Field(ge=2, le=64)
    heads: tuple[Literal["unet", "aspp"], Literal["unet", "aspp"]]
    class_ratio: tuple[float, ...]
    foreground_range: tuple[float, float]
