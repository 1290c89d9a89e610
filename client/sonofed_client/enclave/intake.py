"""Intake: a site's own images, catalogued under opaque ids, split by patient, kept as pixels."""

from __future__ import annotations

import json
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
from sonofed_common.data.splits import check_no_leak, split_by_group
from sonofed_common.security import image_id, sha256

BINARY = (0, 1)
DECODING_CHECK_SIZE = 16


def take_in(settings: SiteSettings, store: Store) -> str:
    """Catalogue the site's images unless that is done, and return the digest of the snapshot.

    Parameters
    ----------
    settings : SiteSettings
        Names the data set and the split.
    store : Store
        Receives the catalogue and a report of skipped files.

    Raises
    ------
    DataMissingError, DataUnreadableError
        The reader found no data set, or nothing readable in it.
    SiteEmptyError
        No image of the site's scanners is left.
    OneClassError
        All images are of one class: no test is possible.
    """
    wanted = sha256(settings.data.model_dump_json().encode())
    done = store.get("intake")
    if done is not None and done.config["settings"] == wanted:
        return str(done.config["snapshot"])
    reading = read(settings.data.kind, settings.data.path)
    usable = [s for s in reading.samples if _usable(s, settings)]
    _, samples, broken = load_images(usable, DECODING_CHECK_SIZE)
    if not samples:
        raise SiteEmptyError(
            f"site {settings.name} has no usable image; check [data] in its settings"
        )
    if len({s.label for s in samples}) < 2:
        raise OneClassError(f"site {settings.name} has images of one class only; it needs both")
    split = split_by_group(samples, settings.data.test_fraction, settings.data.split_seed)
    check_no_leak(split)
    key = bytes.fromhex(settings.image_key) if settings.image_key else store.image_key()
    ordered = sorted(
        (image_id(key, sample.name), part, sample)
        for part, samples in (("pool", split.pool), ("test", split.test))
        for sample in samples
    )
    images = [
        CataloguedImage(i, s.name, part, s.label, s.group, position)
        for position, (i, part, s) in enumerate(ordered)
    ]
    # Whenever this is interrupted, no intake is on record for a catalogue that it did not make.
    store.remove("intake")
    store.remove("pixels/")
    store.catalogue(images)
    store.put_bytes("files", json.dumps({i: str(s.image) for i, _, s in ordered}).encode())
    skipped = [{"name": s.name, "reason": s.reason} for s in (*reading.skipped, *broken)]
    snapshot = sha256(json.dumps([[i.id, i.part, i.label, i.group] for i in images]).encode())
    facts = {"settings": wanted, "snapshot": snapshot, "skipped": skipped}
    store.put("intake", Records(config=facts))
    return snapshot


def pixels(store: Store, image_size: int) -> Tensor:
    """Return all images of the catalogue, in its order, as uint8 (N, 1, S, S)."""
    kept = store.get(f"pixels/{image_size}")
    if kept is None:
        files = json.loads(store.get_bytes("files") or b"{}")
        samples = [Sample(i.id, Path(files[i.id]), (), i.label, i.group) for i in store.images()]
        loaded, readable, _ = load_images(samples, image_size)
        if len(readable) < len(samples):
            raise DataUnreadableError(
                "images changed since they were taken in; run the intake again"
            )
        kept = Records({"pixels": (loaded * 255).round().to(torch.uint8).numpy()})
        store.put(f"pixels/{image_size}", kept)
    return torch.from_numpy(np.asarray(kept.arrays["pixels"]))


def _usable(sample: Sample, settings: SiteSettings) -> bool:
    devices = settings.data.devices
    return sample.label in BINARY and (not devices or sample.device.startswith(devices))
