"""Reconstruct: wait, site by site and slice by slice, until every pool is redrawn."""

from __future__ import annotations

import time

from sonofed_common.contract.actions import Reconstruct, request
from sonofed_common.contract.errors import QuorumError
from sonofed_server.study.run import StudyRun

SLICE_SECONDS = 10.0


def reconstruct(run: StudyRun) -> None:
    """Poll all sites until each is done; progress counts images.

    Raises
    ------
    QuorumError
        The deadline has passed with fewer finished sites than the quorum.
    """
    parameters = Reconstruct(
        **run.pooled, settings=run.study.reconstruction, slice_seconds=SLICE_SECONDS
    )
    message = request(parameters)
    until = time.monotonic() + run.study.cohort.deadline_seconds
    running = run.exchange.sites()
    progress: dict[str, tuple[int, int]] = {}
    while running and time.monotonic() < until:
        for site, reply in run.exchange.ask("train.reconstruct", message, running):
            progress[site] = (int(reply.config["done"]), int(reply.config["total"]))
            if reply.config["state"] == "done":
                running = [s for s in running if s != site]
                run.site_facts(site)["reconstruction"] = reply.metrics
            done, total = (sum(column) for column in zip(*progress.values(), strict=True))
            run.events.progress("reconstruct", done, total, site=site)
        running = [s for s in running if s not in run.exchange.missing]
    for site in running:
        run.exchange.missing[site] = "reconstruction did not end before the deadline"
    if len(run.exchange.sites()) < run.study.cohort.smallest:
        raise QuorumError(
            f"reconstruction ended in time at {len(run.exchange.sites())} sites, below the quorum "
            f"of {run.study.cohort.smallest}; raise cohort.deadline_seconds or lower "
            "reconstruction.steps"
        )
