"""Draw labelled synthetic images by GANs of the site's own; what passes the gate may leave."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from sonofed_client.enclave.handlers.selection import LARGEST, labelled
from sonofed_client.enclave.site import Site
from sonofed_common.contract.actions import Synthesise
from sonofed_common.contract.names import CLASSES
from sonofed_common.contract.records import Records
from sonofed_common.runtime import derive_seed
from sonofed_common.synthesis.memorisation import RefusedError
from sonofed_common.synthesis.synthetic import synthesise
from sonofed_common.synthesis.wgan import train_drawing

FEWEST = 10
"""Labelled images of each class without which no GAN is trained: of fewer it can but show them."""


def synthesise_images(site: Site, parameters: Synthesise, request: Records) -> Records:
    """Train a GAN a class on the labelled images, and reply with the images that pass the gate.

    Where a class has too few labelled images, or what is drawn does not pass, ``images`` is 0 and
    nothing else is said.
    """
    settings = parameters.settings
    labels = labelled(site, parameters.study, LARGEST)
    counts = [list(labels.values()).count(label) for label in range(len(CLASSES))]
    nothing = Records(config={"images": 0})
    if min(counts) < FEWEST:
        return nothing
    rows, pool = site.images("pool", settings.image_size)
    _, test = site.images("test", settings.image_size)
    index = [n for n, row in enumerate(rows) if row.id in labels]
    images, targets = pool[index], torch.tensor([labels[rows[n].id] for n in index])
    seed = derive_seed(parameters.seed, site.settings.name, "synthesis")
    with ExitStack() as stack:
        # All stay until the last image is drawn, so that no class is trained twice.
        files = [site.checkpoint(parameters, request, labels, name) for name in CLASSES]
        checkpoints = [stack.enter_context(file) for file in files]
        drawing = train_drawing(images, targets, parameters.wgan, seed, checkpoints, site.events)
        try:
            made, _ = synthesise(
                drawing,
                images,
                [rows[n].group for n in index],
                test,
                (settings.per_class,) * len(CLASSES),
                derive_seed(seed, "draw"),
                site.events,
                least=0.0,
            )
        except RefusedError:
            return nothing
    return Records(made.arrays, config={"images": len(made.arrays["labels"])})
