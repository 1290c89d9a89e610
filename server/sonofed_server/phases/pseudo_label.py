"""Pseudo-label: source-free adaptation of each branch at the sites, averaged round by round."""

from __future__ import annotations

from safetensors.numpy import save

from sonofed_common.contract.actions import TrainSegmenter, request
from sonofed_server.aggregation.fedavg import FedAvg
from sonofed_server.aggregation.weights import weight_of
from sonofed_server.phases.branches import Branches, branches, install_branches
from sonofed_server.study.run import StudyRun


def pseudo_label(run: StudyRun) -> None:
    """Adapt every branch, sign the adapted ones under the same names, and install them.

    Each strategy of the study goes on from the weights of the one before it.
    A branch that no site has an image for stays as it was. A site whose training of one branch
    fails is asked for the next one.
    """
    unadapted = branches(run)
    weights = {}
    for name in unadapted.names:
        # A branch that an interrupted study has begun goes on without whom it had lost.
        if _group(name) not in run.state.position:
            run.exchange.forgive()
        _adapt(run, unadapted, name)
        found = run.state.group(_group(name))
        weights[name] = save(found) if found else unadapted.weights(name)
    # Who could not train a branch can still be tested with it.
    run.exchange.forgive()
    install_branches(run, "adapted", weights, {})


def _adapt(run: StudyRun, unadapted: Branches, name: str) -> None:
    study, state, group = run.study, run.state, _group(name)
    rounds = [
        (earlier, each, number)
        for earlier, each in study.adaptations
        for number in range(each.rounds)
    ]
    history = state.facts.setdefault("pseudo_labels", {}).setdefault(name, [])
    first = state.position.get(group, 0)
    for done, number in enumerate(run.rounds(n for _, _, n in rounds[first:]), start=first):
        earlier, settings, _ = rounds[done]
        parameters = TrainSegmenter(
            **{**run.pooled, "bundle": unadapted.bundle.id},
            branch=name,
            round=number,
            earlier_rounds=earlier,
            settings=settings,
            batch_norm=study.segmenter_batch_norm,
        )
        message = request(parameters, weights=state.group(group))
        mean = FedAvg()
        reports = {}
        for site, reply in run.exchange.ask("train.segmenter", message):
            if weight := weight_of(reply, study.aggregation):
                mean.add(reply.group("weights"), weight)
            run.site_facts(site)["images"] = int(reply.config["examples"])
            reports[site] = reply.metrics
        if updated := mean.mean():
            state.set_group(group, updated)
        history.append(reports)
        state.position[group] = done + 1
        run.save()
        run.events.progress(f"pseudo-label {name}", done + 1, len(rounds))


def _group(name: str) -> str:
    return f"segmenter/{name}"
