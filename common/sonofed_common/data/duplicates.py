"""Near-duplicate images: found, grouped, and dropped where their labels contradict each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sonofed_common.contract.errors import DataUnreadableError
from sonofed_common.data.decoding import UNREADABLE, read_grey
from sonofed_common.data.sample import Sample, Skipped

Pixels = NDArray[np.float32]

SIDE = 128
HASH_SIDE = 16
SPECKLE_SCALE = 6.0


def duplicate_groups(
    samples: Sequence[Sample], distance: int = 84, correlation: float = 0.5
) -> tuple[list[Sample], list[Skipped]]:
    """Give near-duplicates one group, and drop duplicates of different labels.

    Parameters
    ----------
    samples : sequence of Sample
        A set whose images may repeat.
    distance : int
        Largest Hamming distance, of 256 bits, between the perceptual hashes of a candidate pair.
    correlation : float
        Smallest correlation of a candidate pair after registration, in [0, 1].

    Returns
    -------
    kept : list of Sample
        In order; the group of duplicates is the first one's group.
    skipped : list of Skipped
        Images that cannot be decoded, and duplicates that bear different labels.

    Raises
    ------
    DataUnreadableError
        There are samples, and none can be decoded.

    Notes
    -----
    A hash only proposes; registration decides: the second image is aligned to the first by an
    affine map (enhanced correlation coefficient, Evangelidis and Psarakis, IEEE TPAMI 30(10), 2008)
    and the two are correlated without their slow shading, so that speckle must agree. On BUSI,
    pairs within distance 24 all correlate above 0.9, 150 random pairs all below 0.3; the default
    lies between, so that other frames of one lesion join it too. Mirrored copies are not sought:
    on BUSI no hash of a mirrored image came within a distance of 50 of any image.
    """
    pixels: list[Pixels] = []
    kept: list[Sample] = []
    skipped: list[Skipped] = []
    for sample in samples:
        try:
            # Hash and registration work on small images: one decoding serves both.
            pixels.append(_shrink(read_grey(sample.image), 2 * SIDE))
        except UNREADABLE:
            skipped.append(Skipped(sample.name, "the image cannot be decoded"))
        else:
            kept.append(sample)
    if skipped and not kept:
        raise DataUnreadableError(
            f"none of the {len(skipped)} images can be decoded; copy the data set anew"
        )
    parents = list(range(len(kept)))
    flat = [_without_shading(_shrink(p, SIDE)) for p in pixels]
    for first, second in _candidates(pixels, distance):
        roots = sorted((_root(parents, first), _root(parents, second)))
        if roots[0] == roots[1]:
            continue
        if _registered_correlation(flat[first], flat[second]) >= correlation:
            parents[roots[1]] = roots[0]
    members: defaultdict[int, list[int]] = defaultdict(list)
    for index in range(len(kept)):
        members[_root(parents, index)].append(index)
    dropped = {
        index
        for indices in members.values()
        if len({kept[i].label for i in indices}) > 1
        for index in indices
    }
    skipped += [Skipped(kept[i].name, "duplicates bear different labels") for i in sorted(dropped)]
    grouped = [
        replace(sample, group=kept[_root(parents, index)].group)
        for index, sample in enumerate(kept)
        if index not in dropped
    ]
    return grouped, skipped


def _shrink(pixels: Pixels, side: int) -> Pixels:
    small: Pixels = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_AREA)
    return small


def _without_shading(pixels: Pixels) -> Pixels:
    flat: Pixels = pixels - cv2.GaussianBlur(pixels, (0, 0), SPECKLE_SCALE)
    return flat


def _candidates(images: Sequence[Pixels], distance: int) -> Iterator[tuple[int, int]]:
    """Yield index pairs whose perceptual hashes lie within ``distance``, nearest first."""
    if not images:
        return
    # Only the sets that need it pay for this import: it pulls in SciPy and PyWavelets.
    import imagehash

    bits = np.array(
        [
            imagehash.phash(
                Image.fromarray((p * 255).round().astype(np.uint8)), hash_size=HASH_SIDE
            ).hash.ravel()
            for p in images
        ],
        dtype=np.float32,
    )
    apart = bits @ (1 - bits).T
    apart += apart.T
    first, second = np.nonzero(np.triu(apart <= distance, k=1))
    for position in np.argsort(apart[first, second], kind="stable"):
        yield int(first[position]), int(second[position])


def _registered_correlation(fixed: Pixels, moving: Pixels) -> float:
    """Correlate two images over their overlap after affine registration; -1 where it fails."""
    if np.array_equal(fixed, moving):
        return 1.0
    identity = np.eye(2, 3, dtype=np.float32)
    stop = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 60, 1e-4)
    try:
        _, warp = cv2.findTransformECC(
            fixed, moving, identity, cv2.MOTION_AFFINE, stop, inputMask=None, gaussFiltSize=5
        )
    except cv2.error:
        return -1.0
    shape = fixed.shape[::-1]
    inverse = cv2.WARP_INVERSE_MAP
    warped = cv2.warpAffine(moving, warp, shape, flags=cv2.INTER_LINEAR | inverse)
    inside = cv2.warpAffine(np.ones_like(moving), warp, shape, flags=cv2.INTER_NEAREST | inverse)
    overlap = inside > 0
    # A sliver of overlap can correlate by chance.
    if overlap.mean() < 0.5:
        return -1.0
    a, b = fixed[overlap], warped[overlap]
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else -1.0


def _root(parents: list[int], index: int) -> int:
    while parents[index] != index:
        parents[index] = parents[parents[index]]
        index = parents[index]
    return index
