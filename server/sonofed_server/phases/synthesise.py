"""Synthesise: gather what the sites' own GANs drew and their policies let out, for all sites.

After arXiv 2506.23334; see docs/methods.md.
"""

from __future__ import annotations

import numpy as np

from sonofed_common.contract.actions import Synthesise, request
from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.manifest import SHARED_IMAGES
from sonofed_common.contract.names import CLASSES
from sonofed_common.contract.records import Array, Records, to_bytes
from sonofed_common.security import load_signing_key
from sonofed_server.study.run import StudyRun


def synthesise(run: StudyRun) -> None:
    """Sign the synthetic images of all sites as a bundle, which the next phase installs.

    A site whose images do not pass its memorisation gate shares none and gets the others'; so does
    one that refuses or fails, as far as the quorum goes on without it.

    Raises
    ------
    QuorumError
        Fewer sites than the quorum answered; a site's own error in its place, as of `Exchange.ask`.
    ParameterError
        A site's images are none of those that were asked for.
    """
    size, sites = run.study.synthesis.image_size, run.exchange.sites()
    images = [np.empty((0, size, size), dtype=np.uint8)]
    labels = [np.empty(0, dtype=np.int64)]
    wanted = Synthesise(**run.common, settings=run.study.synthesis, wgan=run.study.wgan)
    for done, (site, reply) in enumerate(
        run.exchange.ask("train.synthesise", request(wanted)), start=1
    ):
        shared = int(reply.config["images"])
        if shared:
            of_site = _checked(run, site, reply)
            images.append(of_site["images"])
            labels.append(of_site["labels"])
        run.site_facts(site)["synthetic"] = shared
        run.events.progress("synthetic images", done, len(sites), site=site, images=shared)
    writer = run.bundle_writer(run.workspace.synthetic, "synthetic")
    shared_images = Records({"images": np.concatenate(images), "labels": np.concatenate(labels)})
    writer.add(SHARED_IMAGES, to_bytes(shared_images))
    bundle = writer.sign(load_signing_key(run.workspace.key))
    run.state.facts["synthetic_bundle"] = bundle.id


def _checked(run: StudyRun, site: str, reply: Records) -> dict[str, Array]:
    count, size = int(reply.config["images"]), run.study.synthesis.image_size
    wanted = {"images": ((count, size, size), "uint8"), "labels": ((count,), "int64")}
    fits = {n: (a.shape, a.dtype.name) for n, a in reply.arrays.items()} == wanted
    if not fits or not np.isin(reply.arrays["labels"], range(len(CLASSES))).all():
        raise ParameterError(
            f"what site {site} shares is no {count} labelled images of {size} px; check the "
            "versions of both sides"
        )
    return dict(reply.arrays)
