"""Enrol: find the cohort's sites among the connected nodes and record what they are."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sonofed_common.contract.actions import Describe, request
from sonofed_common.contract.errors import (
    ConfigurationError,
    QuorumError,
    SonoFedError,
    StudyWaitingError,
    error_from_code,
)
from sonofed_common.contract.records import Records
from sonofed_server.phases.select import bar_unselected
from sonofed_server.study.run import StudyRun

RETRY_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 30.0
"""Between two questions to a hospital that still thinks about the study; each is in its ledger."""


def enrol(run: StudyRun) -> None:
    """Ask every node for its name until the whole cohort has answered or the deadline has passed.

    A hospital that has not yet decided on the study is asked again, with growing pauses. A resumed
    study starts anew where a site's images are not those that it enrolled with.

    Raises
    ------
    ConfigurationError
        Two nodes have the same site's name.
    QuorumError
        Fewer sites than the quorum connected in time. A node's own error is raised in its place
        when there is one.
    """
    exchange, cohort = run.exchange, run.study.cohort
    message = request(Describe(**run.common, study_digest=run.study.digest(), content=run.study))
    until = time.monotonic() + cohort.deadline_seconds
    asked: set[int] = set()
    waiting: dict[int, _Waiting] = {}
    failures: list[SonoFedError] = []
    replies: dict[str, Records] = {}
    # A node that fails has no name; it counts as one of the cohort, which need not wait for it.
    while len(exchange.nodes) + len(failures) < len(cohort.sites):
        now = time.monotonic()
        undecided = {node for node, wait in waiting.items() if now < wait.until}
        fresh = sorted(exchange.connected() - asked - undecided)
        asked.update(fresh)
        for node, reply in exchange.ask_nodes("query.describe", message, fresh, until):
            before = waiting.pop(node, None)
            if isinstance(reply, StudyWaitingError):
                asked.discard(node)
                waiting[node] = _Waiting.after(before, reply)
                if before is None:
                    run.events.emit("study-waiting", reason=str(reply))
            elif isinstance(reply, SonoFedError):
                failures.append(reply)
                run.events.emit("node-failed", reason=str(reply))
            elif (site := str(reply.config["site"])) in cohort.sites:
                if exchange.nodes.get(site, node) != node:
                    raise ConfigurationError(
                        f"two nodes say that they are site {site}; give each hospital a name of "
                        "its own, or stop one of the nodes"
                    )
                exchange.nodes[site] = node
                replies[site] = reply
                run.events.progress("enrol", len(exchange.nodes), len(cohort.sites), site=site)
        if time.monotonic() > until:
            break
        if len(exchange.nodes) + len(failures) < len(cohort.sites):
            time.sleep(RETRY_SECONDS)
    failures += [wait.error for wait in waiting.values()]
    if changed := [site for site, reply in replies.items() if _changed(run, site, reply)]:
        run.state.clear()
        run.events.emit("study-restarted", reason="the images changed", sites=changed)
    for site, reply in replies.items():
        run.site_facts(site).update(description=reply.config, rounded=reply.metrics)
    if "select" in run.state.done:
        bar_unselected(run)
    _check_quorum(run, failures)


@dataclass(frozen=True)
class _Waiting:
    error: StudyWaitingError
    pause: float
    until: float

    @classmethod
    def after(cls, before: _Waiting | None, error: StudyWaitingError) -> _Waiting:
        pause = RETRY_SECONDS if before is None else min(2 * before.pause, LONGEST_PAUSE_SECONDS)
        return cls(error, pause, time.monotonic() + pause)


def _changed(run: StudyRun, site: str, reply: Records) -> bool:
    before = run.site_facts(site).get("description", {}).get("snapshot")
    return before is not None and before != reply.config.get("snapshot")


def _check_quorum(run: StudyRun, failures: list[SonoFedError]) -> None:
    nodes, cohort = run.exchange.nodes, run.study.cohort
    absent = [site for site in cohort.sites if site not in nodes]
    reasons = "; ".join(str(error) for error in failures)
    for site in absent:
        run.site_facts(site)["missing"] = (
            f"enrol: {reasons}" if failures else "did not connect before the deadline"
        )
    if len(nodes) >= cohort.smallest:
        return
    sentence = (
        f"{len(nodes)} of {len(cohort.sites)} sites enrolled, below the quorum of "
        f"{cohort.smallest}; missing: {', '.join(absent)}"
    )
    if failures:
        raise error_from_code(failures[0].code, f"{sentence}; a node: {failures[0].message}")
    raise QuorumError(sentence)
