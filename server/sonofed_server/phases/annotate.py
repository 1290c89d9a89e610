"""Annotate: wait for the experts to label what was selected."""

from __future__ import annotations

import time

from sonofed_common.contract.actions import Annotations, request
from sonofed_common.contract.errors import QuorumError
from sonofed_server.study.run import StudyRun

POLL_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 600.0
"""Between two questions: experts take days, and each question is in the hospital's ledger."""


def annotate(run: StudyRun) -> None:
    """Poll until all selected images are labelled, or go on in the end with what there is.

    Experts have ``cohort.annotation_seconds``; the pauses between two questions grow.

    Raises
    ------
    QuorumError
        In the end fewer sites than the quorum have any label.
    """
    until = time.monotonic() + run.study.cohort.annotation_seconds
    pause = POLL_SECONDS
    message = request(Annotations(**run.common))
    while True:
        labelled: dict[str, tuple[int, int]] = {}
        for site, reply in run.exchange.ask("query.annotations", message):
            labelled[site] = (int(reply.metrics["done"]), int(reply.metrics["total"]))
            run.site_facts(site)["labelled"] = labelled[site][0]
        done, total = (sum(column) for column in zip(*labelled.values(), strict=True))
        run.events.progress("annotate", done, total)
        if done >= total:
            return
        if time.monotonic() > until:
            break
        time.sleep(max(0.0, min(pause, until - time.monotonic())))
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
    ready = sum(done > 0 or total == 0 for done, total in labelled.values())
    if ready < run.study.cohort.smallest:
        raise QuorumError(
            f"only {ready} sites have labels at the deadline, below the quorum of "
            f"{run.study.cohort.smallest}; resume once the experts have labelled more"
        )
