"""Synthesise: gather what the sites' own GANs drew and their policies let out, for all sites.

After arXiv 2506.23334; see docs/methods.md.
"""

from __future__ import annotations

import numpy as np

from sonofed_common.contract.actions import Synthesise, request
from sonofed_common.contract.errors import QuorumError
from sonofed_common.contract.manifest import SHARED_IMAGES
from sonofed_common.contract.names import CLASSES
from sonofed_common.contract.records import Records, to_bytes
from sonofed_common.contract.study_synthesis import Synthesis
from sonofed_common.runtime import derive_seed
from sonofed_common.security import load_signing_key
from sonofed_server.study.run import StudyRun

ACTION = "train.synthesise"


def synthesise(run: StudyRun) -> None:
    """Sign the synthetic images of all sites as a bundle, which the next phase installs.

    A site whose policy lets no images leave, or whose images do not pass its memorisation gate,
    shares none and gets the others'. The order of images says nothing of whose they are.

    Raises
    ------
    QuorumError
        Fewer sites than the quorum answered; a site's own error in its place, as of `Exchange.ask`.
    """
    settings, exchange = run.study.synthesis, run.exchange
    size, sites = settings.image_size, exchange.sites()
    images = [np.empty((0, size, size), dtype=np.uint8)]
    labels = [np.empty(0, dtype=np.int64)]
    wanted = request(Synthesise(**run.common, settings=settings, wgan=run.study.wgan))
    replies = exchange.ask(ACTION, wanted)
    for done, (site, reply) in enumerate(replies, start=1):
        if not _fits(reply, settings):
            exchange.lose(site, ACTION, "its images are none of those that were asked for")
            continue
        shared = int(reply.config["images"])
        if shared:
            images.append(reply.arrays["images"])
            labels.append(reply.arrays["labels"])
        run.site_facts(site)["synthetic"] = shared
        run.events.progress("synthetic images", done, len(sites), site=site, images=shared)
    if len(exchange.sites()) < run.study.cohort.smallest:
        raise QuorumError(
            f"synthesis ended at {len(exchange.sites())} sites, below the quorum of "
            f"{run.study.cohort.smallest}; check the versions of those that were lost"
        )
    whole = np.concatenate(images), np.concatenate(labels)
    order = np.random.default_rng(derive_seed(run.study.seed, "synthetic images"))
    places = order.permutation(len(whole[1]))
    writer = run.bundle_writer(run.workspace.synthetic, "synthetic")
    records = Records({"images": whole[0][places], "labels": whole[1][places]})
    writer.add(SHARED_IMAGES, to_bytes(records))
    bundle = writer.sign(load_signing_key(run.workspace.key))
    run.state.facts["synthetic_bundle"] = bundle.id


def _fits(reply: Records, settings: Synthesis) -> bool:
    """Whether a reply holds labelled images of the size, and of no class more than were asked."""
    count, size = reply.config.get("images"), settings.image_size
    if count == 0:
        return not reply.arrays
    wanted = {"images": ((count, size, size), "uint8"), "labels": ((count,), "int64")}
    if {n: (a.shape, a.dtype.name) for n, a in reply.arrays.items()} != wanted:
        return False
    labels, counts = np.unique(reply.arrays["labels"], return_counts=True)
    return set(labels) <= set(range(len(CLASSES))) and int(counts.max()) <= settings.per_class
