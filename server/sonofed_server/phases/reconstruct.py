"""Reconstruct: wait, site by site and slice by slice, until every pool is redrawn."""

from __future__ import annotations

import time

from sonofed_common.contract.actions import Reconstruct, request
from sonofed_common.contract.errors import QuorumError
from sonofed_server.study.run import StudyRun

SLICE_SECONDS = 10.0


def reconstruct(run: StudyRun) -> None:
    """Poll all sites until each is done; progress counts images.

    A pool may take longer than the deadline: a site is lost only where none of its images was
    redrawn for as long as that.

    Raises
    ------
    QuorumError
        Fewer sites than the quorum are left.
    """
    parameters = Reconstruct(
        **run.pooled, settings=run.study.reconstruction, slice_seconds=SLICE_SECONDS
    )
    message = request(parameters)
    exchange, cohort = run.exchange, run.study.cohort
    running = exchange.sites()
    progress = dict.fromkeys(running, (0, 0))
    moved = dict.fromkeys(running, time.monotonic())
    while running:
        for site, reply in exchange.ask("train.reconstruct", message, running):
            before, _ = progress[site]
            progress[site] = (int(reply.config["done"]), int(reply.config["total"]))
            if progress[site][0] > before:
                moved[site] = time.monotonic()
            if reply.config["state"] == "done":
                running = [s for s in running if s != site]
                run.site_facts(site)["reconstruction"] = reply.metrics
            done, total = (sum(column) for column in zip(*progress.values(), strict=True))
            run.events.progress("reconstruct", done, total, site=site)
        running = [s for s in running if s not in exchange.missing]
        latest = time.monotonic() - cohort.deadline_seconds
        for site in [s for s in running if moved[s] < latest]:
            exchange.lose(site, "train.reconstruct", "no image was redrawn within the deadline")
            running.remove(site)
    if len(exchange.sites()) < cohort.smallest:
        raise QuorumError(
            f"reconstruction ended at {len(exchange.sites())} sites, below the quorum of "
            f"{cohort.smallest}; the others redrew no image within cohort.deadline_seconds"
        )
