"""Enrol: find the cohort's sites among the connected nodes and record what they are."""

from __future__ import annotations

import time

from sonofed_common.contract.actions import Describe, request
from sonofed_common.contract.errors import QuorumError, SonoFedError
from sonofed_server.study.run import StudyRun

RETRY_SECONDS = 0.5


def enrol(run: StudyRun) -> None:
    """Ask every node for its name until the whole cohort is there or the deadline has passed.

    Raises
    ------
    QuorumError
        Fewer sites than the quorum connected in time.
    """
    exchange, cohort = run.exchange, run.study.cohort
    parameters = Describe(**run.common, study_digest=run.study.digest())
    until = time.monotonic() + cohort.deadline_seconds
    asked: set[int] = set()
    while len(exchange.nodes) < len(cohort.sites) and time.monotonic() < until:
        for node in sorted(set(exchange.grid.get_node_ids()) - asked):
            asked.add(node)
            reply = exchange.ask_node("query.describe", request(parameters), node, until)
            if isinstance(reply, SonoFedError):
                run.events.emit("node-failed", reason=str(reply))
                if not isinstance(reply, QuorumError):
                    raise reply
                continue
            site = str(reply.config["site"])
            if site in cohort.sites:
                exchange.nodes[site] = node
                run.site_facts(site).update(description=reply.config, rounded=reply.metrics)
                run.events.progress("enrol", len(exchange.nodes), len(cohort.sites), site=site)
        if len(exchange.nodes) < len(cohort.sites):
            time.sleep(RETRY_SECONDS)
    absent = [site for site in cohort.sites if site not in exchange.nodes]
    for site in absent:
        run.site_facts(site)["missing"] = "did not connect before the deadline"
    if len(exchange.nodes) < cohort.smallest:
        raise QuorumError(
            f"{len(exchange.nodes)} of {len(cohort.sites)} sites connected before the deadline, "
            f"below the quorum of {cohort.smallest}; missing: {', '.join(absent)}"
        )
