"""Images and masks in memory: square tensors of one size, aspect ratio kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from sonofed_common.contract.errors import DataUnreadableError
from sonofed_common.data.decoding import UNREADABLE, read_grey, read_mask
from sonofed_common.data.sample import Sample, Skipped


@dataclass(frozen=True)
class Canvas:
    """A square of S x S pixels, and how an image of a given shape lies on it.

    Attributes
    ----------
    size : int
        S, pixels.
    height, width : int
        Shape of the image once its longer side is S.
    shrinks : bool
        Whether the image is reduced.
    """

    size: int
    height: int
    width: int
    shrinks: bool

    @classmethod
    def of(cls, height: int, width: int, size: int) -> Canvas:
        """Fit an image of ``height`` x ``width`` pixels on ``size`` x ``size``."""
        longest = max(height, width)
        return cls(
            size,
            max(1, round(height * size / longest)),
            max(1, round(width * size / longest)),
            longest > size,
        )

    def place(self, pixels: NDArray[np.generic], mode: Literal["grey", "mask"]) -> Tensor:
        """Resize and pad with zeros, half on each side.

        Parameters
        ----------
        pixels : ndarray
            Shape (H, W).
        mode : {"grey", "mask"}
            Grey values are averaged, masks take the nearest pixel.

        Returns
        -------
        Tensor
            Shape (1, S, S), float32.

        Notes
        -----
        Equals MONAI's Resize and SpatialPad, faster for lack of their metadata.
        """
        # Averaging areas keeps speckle from aliasing; it would only repeat pixels when enlarging.
        grey = "area" if self.shrinks else "bilinear"
        resized = functional.interpolate(
            torch.from_numpy(pixels.astype(np.float32))[None, None],
            (self.height, self.width),
            mode="nearest-exact" if mode == "mask" else grey,
        )[0]
        above, left = (self.size - self.height) // 2, (self.size - self.width) // 2
        below, right = self.size - self.height - above, self.size - self.width - left
        return functional.pad(resized, (left, right, above, below))


def load_images(
    samples: Sequence[Sample], image_size: int
) -> tuple[Tensor, list[Sample], list[Skipped]]:
    """Decode images to one tensor; a corrupt one is skipped and reported.

    Parameters
    ----------
    samples : sequence of Sample
        Images to load.
    image_size : int
        S, pixels.

    Returns
    -------
    images : Tensor
        Shape (N, 1, S, S), float32 in [0, 1]: longer side resized to S, padded with 0.
    kept : list of Sample
        The N samples that were loaded, in order.
    skipped : list of Skipped
        The others.

    Raises
    ------
    DataUnreadableError
        There are samples, and none can be decoded.
    """
    images = torch.zeros(len(samples), 1, image_size, image_size)
    kept: list[Sample] = []
    skipped: list[Skipped] = []
    for sample in samples:
        try:
            grey = read_grey(sample.image)
        except UNREADABLE:
            skipped.append(Skipped(sample.name, "the image cannot be decoded"))
            continue
        height, width = grey.shape
        canvas = Canvas.of(height, width, image_size)
        images[len(kept)] = canvas.place(grey, "grey").clamp_(0, 1)
        kept.append(sample)
    if skipped and not kept:
        raise DataUnreadableError(
            f"none of the {len(skipped)} images can be decoded; copy the data set anew"
        )
    return images[: len(kept)].clone() if skipped else images, kept, skipped


def load_masks(samples: Sequence[Sample], image_size: int) -> Tensor:
    """Decode masks to one tensor that lies over the images of `load_images`.

    Parameters
    ----------
    samples : sequence of Sample
        Samples whose masks decode (see `decodable_masks`).
    image_size : int
        S, pixels.

    Returns
    -------
    Tensor
        Shape (N, 1, S, S), uint8: 0 background, 1 lesion, or the class numbers of palette masks;
        several masks of an image are united, none gives zeros.

    Raises
    ------
    DataUnreadableError
        A mask cannot be decoded: zeros in its place would be a wrong annotation.
    """
    masks = torch.zeros(len(samples), 1, image_size, image_size, dtype=torch.uint8)
    for position, sample in enumerate(samples):
        try:
            for path in sample.masks:
                # The image's own shape decides, so that a mask of another size still lies over it.
                with Image.open(sample.image) as image:
                    width, height = image.size
                canvas = Canvas.of(height, width, image_size)
                placed = canvas.place(read_mask(path), "mask").to(torch.uint8)
                masks[position] = torch.maximum(masks[position], placed)
        except UNREADABLE as error:
            raise DataUnreadableError(
                f"mask {position + 1} of {len(samples)} cannot be decoded; "
                "replace it or leave its image out"
            ) from error
    return masks


def decodable_masks(samples: Sequence[Sample]) -> tuple[list[Sample], list[Skipped]]:
    """Keep the samples that have masks, all of which decode.

    Parameters
    ----------
    samples : sequence of Sample
        Samples meant for segmentation.

    Returns
    -------
    kept : list of Sample
        In order.
    skipped : list of Skipped
        Samples without a mask, or with a corrupt one.
    """
    kept: list[Sample] = []
    skipped: list[Skipped] = []
    for sample in samples:
        try:
            for path in sample.masks:
                read_mask(path)
        except UNREADABLE:
            skipped.append(Skipped(sample.name, "a mask cannot be decoded"))
            continue
        if sample.masks:
            kept.append(sample)
        else:
            skipped.append(Skipped(sample.name, "the image has no mask"))
    return kept, skipped
