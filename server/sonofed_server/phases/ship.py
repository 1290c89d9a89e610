"""Ship: send each site the blobs of the signed bundle that it lacks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sonofed_common.contract.actions import Install, Missing, request
from sonofed_common.contract.bundle import MANIFEST, SIGNATURE, Bundle
from sonofed_common.contract.errors import BundleError, ConfigurationError
from sonofed_common.contract.fit import bundle_misfit
from sonofed_common.contract.records import Array, Records
from sonofed_server.study.run import StudyRun

MESSAGE_BYTES = 256 * 1024**2


def ship(run: StudyRun) -> None:
    """Install the source bundle at every site.

    Raises
    ------
    ConfigurationError
        The bundle lacks what the study works with, or its segmenter cannot serve it.
    """
    if (reason := bundle_misfit(run.study, run.bundle.manifest)) is not None:
        raise ConfigurationError(reason)
    install_everywhere(run, run.bundle, "ship")


def install_everywhere(run: StudyRun, bundle: Bundle, task: str) -> None:
    """Send a bundle's missing blobs to every site; content-addressed, so none is sent twice.

    Raises
    ------
    BundleError
        A site still lacks blobs after it was sent all of them.
    """
    signed = {
        "manifest": _array((bundle.folder / MANIFEST).read_bytes()),
        "signature": _array((bundle.folder / SIGNATURE).read_bytes()),
    }
    question = request(Missing(**run.common), **signed)
    lacking = {
        site: [str(d) for d in reply.config["missing"]]
        for site, reply in run.exchange.ask("query.missing", question)
    }
    run.events.progress(task, 0, len(lacking))
    for done, (site, digests) in enumerate(lacking.items(), start=1):
        left = digests
        for message in _messages(run, bundle, signed, digests):
            for _, reply in run.exchange.ask("train.install", message, [site]):
                left = reply.config["missing"]
            if site in run.exchange.missing:
                break
        if site not in run.exchange.missing and left:
            raise BundleError(f"site {site} still lacks blobs of the bundle; ship it again")
        run.events.progress(task, done, len(lacking), site=site)


def _messages(
    run: StudyRun, bundle: Bundle, signed: dict[str, Array], digests: list[str]
) -> Iterator[Records]:
    parameters = Install(**run.common)
    blobs: dict[str, Array] = {}
    for digest in digests:
        data = bundle.blob(digest)
        if blobs and sum(b.nbytes for b in blobs.values()) + len(data) > MESSAGE_BYTES:
            yield request(parameters, **signed, blobs=blobs)
            blobs = {}
        blobs[digest] = _array(data)
    yield request(parameters, **signed, blobs=blobs)


def _array(data: bytes) -> Array:
    return np.frombuffer(data, dtype=np.uint8)
