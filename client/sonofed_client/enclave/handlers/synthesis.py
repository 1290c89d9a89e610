"""Draw labelled synthetic images by GANs of the site's own; what passes the gate may leave."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack

import torch

from sonofed_client.enclave.handlers.selection import labelled
from sonofed_client.enclave.site import Site
from sonofed_common.contract.actions import Synthesise
from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.names import CLASSES
from sonofed_common.contract.records import Array, Records
from sonofed_common.runtime import derive_seed
from sonofed_common.security import sha256
from sonofed_common.synthesis.memorisation import RefusedError
from sonofed_common.synthesis.synthetic import Labelled, synthesise
from sonofed_common.synthesis.wgan import train_drawing

FEWEST = 10
"""Images of each class, to train on and to test by, without which no GAN is trained: of fewer it
can but show them, and membership cannot be measured."""


def synthesise_images(site: Site, parameters: Synthesise, request: Records) -> Records:
    """Train a GAN a class on the labelled images, and reply with the images that pass the gate.

    A study gets one set of a site's images: whoever asks again gets the same, however many labels
    there are by then. Where a class has too few images, or what is drawn does not pass, ``images``
    is 0 and nothing else is said.

    Raises
    ------
    ParameterError
        The study has its set already, of other settings.
    """
    labels = labelled(site, parameters.study, 0)
    name = site.study_artifact(parameters.study, "synthetic")
    kept = site.store.get(name)
    facts = {
        "asked": parameters.model_dump(mode="json"),
        "labels": sha256(json.dumps(labels, sort_keys=True).encode()),
    }
    if kept is not None and kept.arrays and kept.config["asked"] != facts["asked"]:
        raise ParameterError(
            "this study has its synthetic images of this site; ask for others in a study of its own"
        )
    if kept is None or (not kept.arrays and kept.config != facts):
        kept = Records(_drawn(site, parameters, request, labels), facts)
        site.store.put(name, kept)
    return Records(kept.arrays, config={"images": len(kept.arrays.get("labels", ()))})


def _drawn(
    site: Site, parameters: Synthesise, request: Records, labels: Mapping[str, int]
) -> dict[str, Array]:
    """Return ``images`` and ``labels`` of a set that may leave, or nothing."""
    settings = parameters.settings
    training = _part(site, "pool", settings.image_size, labels)
    known = {row.id: row.label for row in site.store.images("test") if row.label is not None}
    test = _part(site, "test", settings.image_size, known)
    for part in (training, test):
        if min(int((part.labels == label).sum()) for label in range(len(CLASSES))) < FEWEST:
            return {}
    seed = derive_seed(parameters.seed, site.settings.name, "synthesis")
    with ExitStack() as stack:
        # All stay until the last image is drawn, so that no class is trained twice.
        files = [site.checkpoint(parameters, request, dict(labels), name) for name in CLASSES]
        checkpoints = [stack.enter_context(file) for file in files]
        drawing = train_drawing(
            training.images, training.labels, parameters.wgan, seed, checkpoints, site.events
        )
        try:
            made, facts = synthesise(
                drawing,
                training,
                test,
                (settings.per_class,) * len(CLASSES),
                derive_seed(seed, "draw"),
                site.events,
                least=0.0,
            )
        except RefusedError:
            return {}
    # Of a generator that mostly shows its training images, the rest are suspect, too.
    near_real = facts["rejected"] - facts["duplicates"]
    return {} if near_real > len(made.arrays["labels"]) else made.arrays


def _part(site: Site, name: str, image_size: int, labels: Mapping[str, int]) -> Labelled:
    rows, images = site.images(name, image_size)
    index = [n for n, row in enumerate(rows) if row.id in labels]
    targets = torch.tensor([labels[rows[n].id] for n in index], dtype=torch.long)
    return Labelled(images[index], targets, [rows[n].group for n in index])
