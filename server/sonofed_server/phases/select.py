"""Select: the images most worth a label over all sites, by counts of scores in intervals.

Sites answer counts, but intervals are split until each holds one image: what the counts of a site
say of its scores is as fine as the last intervals, see docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sonofed_common.contract.actions import Histogram, Score, Select, request
from sonofed_common.contract.errors import QuorumError
from sonofed_common.contract.selection import Counts, RankTable
from sonofed_server.phases.refinement import CountRequest, select_federated
from sonofed_server.study.run import StudyRun


def select(run: StudyRun) -> None:
    """Score on site, refine summed histograms, and let each site mark its own share.

    Counts of different sites add up to no selection, so a site that is lost on the way makes the
    selection start again with those that are left.

    Raises
    ------
    QuorumError
        Too few sites are left, or their counts keep changing.
    """
    for attempts_left in reversed(range(len(run.study.cohort.sites))):
        for site in run.study.cohort.sites:
            run.site_facts(site).pop("selected", None)
        try:
            _select(run)
            bar_unselected(run)
            return
        except QuorumError as error:
            enough = len(run.exchange.sites()) >= run.study.cohort.smallest
            if not (enough and attempts_left):
                raise
            run.events.emit("selection-restarted", reason=error.message)


def bar_unselected(run: StudyRun) -> None:
    """Keep sites that missed the finished selection from labelling or training on another."""
    sites = run.study.cohort.sites
    run.exchange.unselected = frozenset(s for s in sites if "selected" not in run.site_facts(s))


def _select(run: StudyRun) -> None:
    exchange, state, settings = run.exchange, run.state, run.study.selection
    batch_norm = run.study.finetuning.start_statistics
    arrays = {"centroids": state.arrays["centroids"]} if settings.strategy == "dual_score" else {}
    queries = 0
    scoring = request(Score(**run.encode, selection=settings, batch_norm=batch_norm), **arrays)
    for site, reply in exchange.ask("train.score", scoring):
        run.site_facts(site)["images"] = int(reply.config["examples"])
    sites = exchange.sites()

    def count(question: CountRequest) -> Counts:
        nonlocal queries
        parameters = Histogram(
            **run.common, column=question.column, split=question.split, tied=question.tied
        )
        message = request(parameters, edges=question.edges, cuts=question.cuts)
        total = np.zeros((len(question.edges), question.split), dtype=np.int64)
        for _, reply in exchange.ask("query.histogram", message):
            total += reply.arrays["counts"]
        _check_same(run, sites)
        queries += 1
        run.events.emit("query", task="select", number=queries, column=question.column)
        return total

    def send_ranks(tables: Mapping[str, RankTable]) -> None:
        ranks = {
            f"{column}/{name}": getattr(table, name)
            for column, table in tables.items()
            for name in ("starts", "cumulative")
        }
        for _ in exchange.ask(
            "train.select", request(Select(**run.common, stage="rank"), ranks=ranks)
        ):
            pass
        _check_same(run, sites)

    cuts = select_federated(settings, count, send_ranks)
    marking = request(Select(**run.common, stage="mark"), cuts=cuts)
    for done, (site, reply) in enumerate(exchange.ask("train.select", marking), start=1):
        run.site_facts(site)["selected"] = [int(n) for n in reply.config["selected"]]
        run.events.progress("select", done, len(sites), site=site, queries=queries)
    _check_same(run, sites)


def _check_same(run: StudyRun, sites: list[str]) -> None:
    if lost := [site for site in sites if site not in run.exchange.sites()]:
        raise QuorumError(f"{', '.join(lost)} left during the selection; repeat it without")
