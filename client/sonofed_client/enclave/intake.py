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
from sonofed_common.data.images import load_images
from sonofed_common.data.readers import read
from sonofed_common.data.sample import Sample
from sonofed_common.data.splits import Split, check_no_leak, split_by_group
from sonofed_common.security import image_id, sha256, sha256_file

BINARY = {0, 1}
LAYOUT = 2
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
    The test part holds labelled images only. Images without a label join the pool, unless their
    patient is in the test part.
    """
    wanted = sha256(f"{LAYOUT} {settings.data.model_dump_json()}".encode())
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
    split = _split(settings, samples)
    if left_out := len(samples) - len(split.pool) - len(split.test):
        excluded["without a label, of a patient in the test part"] = left_out
    key = bytes.fromhex(settings.image_key) if settings.image_key else store.image_key()
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
    # Whenever this is interrupted, no intake is on record for a catalogue that it did not make.
    store.remove("intake")
    store.remove("pixels/")
    store.catalogue(images)
    store.put_bytes("files", json.dumps(files).encode())
    skipped = [{"name": s.name, "reason": s.reason} for s in (*reading.skipped, *broken)]
    snapshot = sha256(json.dumps([[i.id, i.part, i.label, i.group] for i in images]).encode())
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
        if not _unchanged(files.values()):
            raise DataUnreadableError(
                "images changed since they were taken in; run the intake again"
            )
        samples = [Sample(i.id, Path(files[i.id][0]), (), i.label, i.group) for i in store.images()]
        loaded, _, _ = load_images(samples, image_size)
        kept = Records({"pixels": (loaded * 255).round().to(torch.uint8).numpy()})
        store.put(f"pixels/{image_size}", kept)
    return torch.from_numpy(np.asarray(kept.arrays["pixels"]))


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


def _split(settings: SiteSettings, samples: Sequence[Sample]) -> Split:
    labelled = [s for s in samples if s.label is not None]
    classes = {s.label for s in labelled}
    if classes == BINARY:
        split = split_by_group(labelled, settings.data.test_fraction, settings.data.split_seed)
        classes = {s.label for s in split.test}
    if classes != BINARY:
        raise OneClassError(
            f"site {settings.name} cannot test on both classes; it needs labelled benign and "
            "malignant images, each of two patients or more"
        )
    tested = {s.group for s in split.test}
    whole = Split(tuple(s for s in samples if s.group not in tested), split.test)
    check_no_leak(whole)
    return whole


def _unchanged(files: Iterable[tuple[str, str]]) -> bool:
    try:
        return all(sha256_file(Path(path)) == content for path, content in files)
    except OSError:
        return False
