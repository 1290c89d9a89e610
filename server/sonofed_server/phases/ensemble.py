"""Ensemble: the branches' temperatures and, for that rule, the gate of the infusion head."""

from __future__ import annotations

import numpy as np

from sonofed_common.contract.actions import TrainEnsemble, request
from sonofed_common.contract.records import Array
from sonofed_common.models.infusion import (
    HIGHEST_TEMPERATURE,
    LOWEST_TEMPERATURE,
    InfusionHead,
)
from sonofed_common.models.segmenter import Segmenter
from sonofed_common.runtime import derive_seed
from sonofed_server.aggregation.fedavg import FedAvg
from sonofed_server.aggregation.weights import weight_of
from sonofed_server.phases.branches import Branches, Origin, adapted, branches
from sonofed_server.source.gate import bring_home, train_gate
from sonofed_server.source.segmenter import source_temperature
from sonofed_server.study.run import StudyRun


def ensemble(run: StudyRun) -> None:
    """Calibrate the branches before and after pseudo-labelling, and train a gate where asked."""
    found: dict[Origin, Branches | None] = {"branches": branches(run), "adapted": adapted(run)}
    for origin, chosen in found.items():
        if chosen is None or run.state.position.get(origin):
            continue
        arrays = _head(run, chosen, origin).arrays()
        run.state.set_group(f"ensemble/{origin}", arrays)
        temperatures = dict(zip(chosen.names, arrays["temperatures"].tolist(), strict=True))
        run.state.facts.setdefault("temperatures", {})[origin] = temperatures
        run.events.emit("temperatures", origin=origin, **temperatures)
        run.state.position[origin] = 1
        run.save()


def _head(run: StudyRun, chosen: Branches, origin: Origin) -> InfusionHead:
    infusion, seed = run.study.infusion, derive_seed(run.study.seed, "ensemble", origin)
    calibration = infusion.calibration
    trains_gate = infusion.rule == "gate" and len(chosen.names) > 1
    models: list[Segmenter] = []
    if trains_gate or (calibration == "source" and origin == "adapted"):
        models = [_at_home(run, chosen, name, origin) for name in chosen.names]
    temperatures = np.ones(len(chosen.names))
    if calibration == "consensus":
        temperatures = _consensus(run, chosen)
    elif calibration == "source" and origin == "adapted":
        test = run.source().data.test
        temperatures = np.array([source_temperature(model, test) for model in models])
    elif calibration == "source":
        known = chosen.bundle.manifest.facts["segmenters"]
        temperatures = np.array([known[name]["temperature"] for name in chosen.names])
    head = InfusionHead(len(chosen.names), infusion, chosen.facts.classes, seed)
    head.temperatures.copy_(head.temperatures.new_tensor(temperatures))
    if trains_gate:
        run.events.emit(
            "warning",
            message="the gate is trained on source labels, where the source's own branch is at "
            "home: it learns to trust that branch; compare it with the rule 'entropy'",
        )
        source = run.source()
        train_gate(head, models, source.data.pool, seed, run.events, source.segmenter.flips)
    return head


def _at_home(run: StudyRun, chosen: Branches, name: str, origin: Origin) -> Segmenter:
    model = chosen.model(name)
    if origin == "adapted":
        bring_home(model, run.source().data.pool)
    return model


def _consensus(run: StudyRun, chosen: Branches) -> Array:
    parameters = TrainEnsemble(
        **{**run.pooled, "bundle": chosen.bundle.id},
        branches=chosen.names,
        batch_norm=run.study.segmenter_batch_norm,
    )
    mean = FedAvg()
    for _, reply in run.exchange.ask("train.ensemble", request(parameters)):
        if weight := weight_of(reply, run.study.aggregation):
            mean.add({"logarithm": reply.arrays["log_temperatures"]}, weight)
    logarithm = mean.mean().get("logarithm", np.zeros(len(chosen.names)))
    # Rounding must not carry a site's bound beyond what every site accepts.
    return np.clip(np.exp(logarithm), LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE)
