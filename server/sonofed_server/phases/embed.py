"""Embed: federated rounds of hypersphere contrastive learning."""

from __future__ import annotations

from sonofed_common.contract.actions import Embed, request
from sonofed_server.aggregation.fedavg import FedAvg
from sonofed_server.aggregation.weights import weight_of
from sonofed_server.study.run import StudyRun

NETWORKS = ("student", "predictor")


def embed(run: StudyRun) -> None:
    """Average student and predictor over the sites, round by round."""
    study, state = run.study, run.state
    history = state.facts.setdefault("embedding", [])
    rounds = study.embedding.rounds
    for number in run.rounds(range(state.position.get("round", 0), rounds)):
        parameters = Embed(**run.encode, round=number)
        message = request(parameters, **{n: state.group(n) for n in NETWORKS})
        means = {name: FedAvg() for name in NETWORKS}
        reports = {}
        sites = run.exchange.sites()
        run.events.progress(f"embed, round {number + 1} of {rounds}", 0, len(sites))
        for done, (site, reply) in enumerate(run.exchange.ask("train.embed", message), start=1):
            for name, mean in means.items():
                mean.add(reply.group(name), weight_of(reply, study.aggregation))
            reports[site] = reply.metrics
            # Or it would stay until the next one is there.
            del reply
            run.events.progress(
                f"embed, round {number + 1} of {rounds}", done, len(sites), site=site
            )
        for name, mean in means.items():
            state.set_group(name, mean.mean())
        history.append(reports)
        state.position["round"] = number + 1
        run.save()
