"""usgra-seg: ultrasound of nerve and vessel from Germany (Mindray TE7), for segmentation."""

from __future__ import annotations

from pathlib import Path

from sonofed_common.data.readers.screening import group_duplicates, screen, set_folder
from sonofed_common.data.sample import Reading, Sample

DEVICE = "Mindray TE7"


def read_usgra_seg(root: Path) -> Reading:
    """Read usgra-seg.

    Parameters
    ----------
    root : Path
        ``usgra-seg`` (images, masks and, if wanted, test/images, test/masks) or its parent.

    Returns
    -------
    Reading
        No labels; masks are palette images with nerve 1 and vessel 2; names of the test part begin
        with ``test/``. The set names no patients: a group is an image with its near-duplicates,
        some of which lie in both official parts.

    Raises
    ------
    DataMissingError, SiteEmptyError, DataUnreadableError
        See `sonofed_common.data.readers.read`.
    """
    folder = set_folder(
        root,
        "usgra-seg",
        "the folders images and masks",
        lambda f: (f / "images").is_dir() and (f / "masks").is_dir(),
    )
    samples: list[Sample] = []
    for part, prefix in ((folder, ""), (folder / "test", "test/")):
        for image in sorted((part / "images").glob("*.png")):
            if not image.name.startswith("."):
                name = prefix + image.stem
                mask = part / "masks" / image.name
                samples.append(Sample(name, image, (mask,), None, name, DEVICE))
    return group_duplicates(screen(samples))
