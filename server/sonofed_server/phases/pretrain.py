"""Pretrain: federated rounds of target-informed pretraining of the segmenter's encoder."""

from __future__ import annotations

from sonofed_common.contract.actions import Pretrain, request
from sonofed_common.contract.errors import SiteEmptyError
from sonofed_common.contract.records import Array, Records
from sonofed_server.aggregation.fedavg import FedAvg
from sonofed_server.aggregation.weights import weight_of
from sonofed_server.study.run import StudyRun

ENCODER = "encoder."
"""Prefix of the encoder's weights among those that are pretrained."""


def pretrain(run: StudyRun) -> None:
    """Average the sites' pretrained networks round by round, or keep each site's own.

    Raises
    ------
    SiteEmptyError
        No site has an image.
    """
    settings, state = run.study.pretraining, run.state
    history = state.facts.setdefault("pretraining", [])
    for number in run.rounds(range(state.position.get("round", 0), settings.rounds)):
        history.append(_round(run, Pretrain(**run.pooled, round=number, settings=settings)))
        state.position["round"] = number + 1
        run.save()
    if not encoders(run):
        raise SiteEmptyError("no site has an image to pretrain on; add images at one of them")


def encoders(run: StudyRun) -> dict[str, dict[str, Array]]:
    """Pretrained encoders by the name of the branch that starts from each, in a fixed order."""
    groups = {"target": "pretrain"}
    if _per_site(run):
        groups = {f"target-{site}": f"pretrain/{site}" for site in run.study.cohort.sites}
    found = {name: run.state.group(group) for name, group in groups.items()}
    return {
        name: {k.removeprefix(ENCODER): v for k, v in arrays.items() if k.startswith(ENCODER)}
        for name, arrays in found.items()
        if arrays
    }


def _round(run: StudyRun, parameters: Pretrain) -> dict[str, dict[str, int | float]]:
    state, per_site = run.state, _per_site(run)
    task = f"pretrain, round {parameters.round + 1} of {parameters.settings.rounds}"
    mean = FedAvg()
    reports = {}
    sites = run.exchange.sites()
    run.events.progress(task, 0, len(sites))

    def message(site: str) -> Records:
        group = f"pretrain/{site}" if per_site else "pretrain"
        return request(parameters, weights=state.group(group))

    asked = message if per_site else message("")
    for done, (site, reply) in enumerate(run.exchange.ask("train.pretrain", asked), start=1):
        weight = weight_of(reply, run.study.aggregation)
        if weight and per_site:
            state.set_group(f"pretrain/{site}", reply.group("weights"))
        elif weight:
            mean.add(reply.group("weights"), weight)
        run.site_facts(site)["images"] = int(reply.config["examples"])
        reports[site] = reply.metrics
        # Or it would stay until the next one is there.
        del reply
        run.events.progress(task, done, len(sites), site=site)
    if averaged := mean.mean():
        state.set_group("pretrain", averaged)
    return reports


def _per_site(run: StudyRun) -> bool:
    return run.study.supervision.branches == "per_site"
