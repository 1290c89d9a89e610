"""Intake: a site's own images, catalogued under opaque ids, split by patient, kept as pixels."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sonofed_client.enclave.store import CataloguedImage, Store
from sonofed_client.settings import SiteSettings
from sonofed_common.contract.errors import DataUnreadableError, OneClassError, SiteEmptyError
from sonofed_common.contract.records import Records
from sonofed_common.data.images import decodable_masks, load_images, load_masks
from sonofed_common.data.readers import read
from sonofed_common.data.sample import Sample
from sonofed_common.data.splits import Split, check_no_leak, split_by_group
from sonofed_common.security import image_id, sha256, sha256_file

BINARY = {0, 1}
LAYOUT = 3
"""Number of this way to make ids and parts; a catalogue made otherwise is made anew."""

DECODING_CHECK_SIZE = 16


def take_in(settings: SiteSettings, store: Store, again: bool = False) -> str:
    """Catalogue the site's images unless that is done, and return the digest of the snapshot.

    Parameters
    ----------
    settings : SiteSettings
        Names the data set and the split.
    store : Store
        Receives the catalogue and a report of skipped files.
    again : bool
        Read all files also where the settings are those of the last intake: files may have changed.

    Raises
    ------
    DataMissingError, DataUnreadableError
        The reader found no data set, or nothing readable in it.
    SiteEmptyError
        No image of the site's scanners is left.
    OneClassError
        The test part lacks a class: no test is possible.

    Notes
    -----
    The test part holds labelled images only or, where no image has a label, images with masks only.
    The others join the pool, unless their patient is in the test part. An image whose masks cannot
    all be decoded counts as one without masks. Without labels and without masks of two patients all
    images join the pool: the site adapts and is not tested.
    """
    key = bytes.fromhex(settings.image_key) if settings.image_key else store.image_key()
    # Another key gives other ids; what stands here is made of it, but does not tell it.
    wanted = sha256(f"{LAYOUT} {image_id(key, '', '')} {settings.data.model_dump_json()}".encode())
    done = store.get("intake")
    if not again and done is not None and done.config["settings"] == wanted:
        return str(done.config["snapshot"])
    reading = read(settings.data.kind, settings.data.path)
    usable, excluded = _usable(reading.samples, settings.data.devices)
    _, samples, broken = load_images(usable, DECODING_CHECK_SIZE)
    if not samples:
        raise SiteEmptyError(
            f"site {settings.name} has no usable image; check [data] in its settings"
        )
    masked, bad_masks = decodable_masks([s for s in samples if s.masks])
    split = _split(settings, samples, masked)
    if left_out := len(samples) - len(split.pool) - len(split.test):
        excluded["without a label or mask, of a patient in the test part"] = left_out
    contents = {s.name: sha256_file(s.image) for s in samples}
    ordered = sorted(
        (image_id(key, s.name, contents[s.name]), part, s)
        for part, held in (("pool", split.pool), ("test", split.test))
        for s in held
    )
    images = [
        CataloguedImage(i, s.name, part, s.label, s.group, position)
        for position, (i, part, s) in enumerate(ordered)
    ]
    files = {i: (str(s.image), contents[s.name]) for i, _, s in ordered}
    drawn = {s.name for s in masked}
    masks = {
        i: [(str(path), sha256_file(path)) for path in s.masks]
        for i, _, s in ordered
        if s.name in drawn
    }
    # Whenever this is interrupted, no intake is on record for a catalogue that it did not make.
    store.remove("intake")
    store.remove("pixels/")
    store.remove("masks/")
    store.catalogue(images)
    store.put_bytes("files", json.dumps(files).encode())
    store.put_bytes("mask_files", json.dumps(masks).encode())
    unread = (*reading.skipped, *broken, *bad_masks)
    skipped = [{"name": s.name, "reason": s.reason} for s in unread]
    rows = [
        [i.id, i.part, i.label, i.group, [content for _, content in masks.get(i.id, ())]]
        for i in images
    ]
    snapshot = sha256(json.dumps(rows).encode())
    if again and done is not None and done.config["snapshot"] != snapshot:
        # Scores and selections of a study under way are of the images that were here before.
        store.remove("study/")
    facts = {
        "settings": wanted,
        "snapshot": snapshot,
        "skipped": skipped,
        "excluded": dict(excluded),
    }
    store.put("intake", Records(config=facts))
    return snapshot


def pixels(store: Store, image_size: int) -> Tensor:
    """Return all images of the catalogue, in its order, as uint8 (N, 1, S, S).

    Raises
    ------
    DataUnreadableError
        A file is not what was taken in.
    """
    kept = store.get(f"pixels/{image_size}")
    if kept is None:
        files = json.loads(store.get_bytes("files") or b"{}")
        _check_unchanged(files.values())
        samples = [Sample(i.id, Path(files[i.id][0]), (), i.label, i.group) for i in store.images()]
        loaded, _, _ = load_images(samples, image_size)
        kept = Records({"pixels": (loaded * 255).round().to(torch.uint8).numpy()})
        store.put(f"pixels/{image_size}", kept)
    return torch.from_numpy(np.asarray(kept.arrays["pixels"]))


def masks(store: Store, image_size: int) -> tuple[list[int], Tensor]:
    """Return the masks that images of the catalogue have.

    Parameters
    ----------
    store : Store
        Of a site that was taken in.
    image_size : int
        S, pixels.

    Returns
    -------
    positions : list of int
        Of the M images with masks, ascending, in the catalogue.
    masks : Tensor (M, 1, S, S)
        Classes, uint8, 0 is background; each lies over its image (see `load_masks`).

    Raises
    ------
    DataUnreadableError
        A file is not what was taken in.
    """
    kept = store.get(f"masks/{image_size}")
    if kept is None:
        files = json.loads(store.get_bytes("files") or b"{}")
        mask_files = json.loads(store.get_bytes("mask_files") or b"{}")
        held = [i for i in store.images() if i.id in mask_files]
        samples = []
        for i in held:
            _check_unchanged([files[i.id], *mask_files[i.id]])
            paths = tuple(Path(path) for path, _ in mask_files[i.id])
            samples.append(Sample(i.id, Path(files[i.id][0]), paths, i.label, i.group))
        positions = np.array([i.position for i in held], dtype=np.int64)
        loaded = load_masks(samples, image_size)
        kept = Records({"positions": positions, "masks": loaded.numpy()})
        store.put(f"masks/{image_size}", kept)
    return kept.arrays["positions"].tolist(), torch.from_numpy(np.asarray(kept.arrays["masks"]))


def _usable(
    samples: Iterable[Sample], devices: tuple[str, ...]
) -> tuple[list[Sample], Counter[str]]:
    """Return the samples that serve, and how many do not, by reason."""
    usable: list[Sample] = []
    excluded: Counter[str] = Counter()
    for sample in samples:
        if devices and not sample.device.startswith(devices):
            excluded["of another scanner"] += 1
        elif sample.label is not None and sample.label not in BINARY:
            excluded["normal, without a lesion"] += 1
        else:
            usable.append(sample)
    return usable, excluded


def _split(settings: SiteSettings, samples: Sequence[Sample], masked: Sequence[Sample]) -> Split:
    labelled = [s for s in samples if s.label is not None]
    split = _split_by_label(settings, labelled) if labelled else _split_by_mask(settings, masked)
    tested = {s.group for s in split.test}
    whole = Split(tuple(s for s in samples if s.group not in tested), split.test)
    check_no_leak(whole)
    return whole


def _split_by_label(settings: SiteSettings, labelled: Sequence[Sample]) -> Split:
    split = Split((), ())
    if {s.label for s in labelled} == BINARY:
        split = split_by_group(labelled, settings.data.test_fraction, settings.data.split_seed)
    if {s.label for s in split.test} != BINARY:
        raise OneClassError(
            f"site {settings.name} cannot test on both classes; it needs labelled benign and "
            "malignant images, each of two patients or more"
        )
    return split


def _split_by_mask(settings: SiteSettings, masked: Sequence[Sample]) -> Split:
    if len({s.group for s in masked}) < 2:
        return Split((), ())
    return split_by_group(masked, settings.data.test_fraction, settings.data.split_seed)


def _check_unchanged(files: Iterable[tuple[str, str]]) -> None:
    try:
        same = all(sha256_file(Path(path)) == content for path, content in files)
    except OSError:
        same = False
    if not same:
        raise DataUnreadableError("images changed since they were taken in; run the intake again")
