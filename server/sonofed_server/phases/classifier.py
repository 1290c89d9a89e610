"""Classifier: fine-tune and test each classifier at each labelling budget."""

from __future__ import annotations

from typing import Any

from safetensors.numpy import load

from sonofed_common.contract.actions import EvaluateClassifier, TrainClassifier, request
from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.errors import BundleError, QuorumError
from sonofed_common.contract.records import Array, Records
from sonofed_common.contract.study import ClassifierNorm
from sonofed_server.aggregation.strategies import STRATEGIES
from sonofed_server.aggregation.strategy import Round, Weights
from sonofed_server.aggregation.weights import weight_of
from sonofed_server.phases.ship import install_everywhere
from sonofed_server.study.run import StudyRun


def classifier(run: StudyRun) -> None:
    """Test the source's weights, average fine-tuned weights round by round, test again."""
    if "synthetic_bundle" in run.state.facts:
        install_everywhere(run, _synthetic_bundle(run), "synthetic images")
    for name in run.study.classifiers:
        _evaluate(run, name, "source", {}, "global")
        _evaluate(run, name, "bn_adapted", {}, "site")
        for budget in range(len(run.study.selection.budgets)):
            _finetune(run, name, budget)


def _synthetic_bundle(run: StudyRun) -> Bundle:
    bundle = Bundle.open(run.workspace.synthetic)
    if bundle.id != run.state.facts["synthetic_bundle"]:
        raise BundleError(
            f"{run.workspace.synthetic} is not the bundle that this study signed; find out who "
            "changed it, or delete the checkpoint to start the study anew"
        )
    return bundle


def _finetune(run: StudyRun, name: str, budget: int) -> None:
    study, state = run.study, run.state
    settings = study.finetuning
    stage, group = f"{name}, budget {budget}", f"classifier/{name}/{budget}"
    if _tested(run, name, stage):
        return
    done = state.position.get(group, 0)
    for number in run.rounds(range(done, settings.rounds)):
        parameters = TrainClassifier(
            **run.pooled,
            classifier=name,
            round=number,
            budget=budget,
            settings=settings,
            aggregation=study.aggregation,
            synthetic_bundle=state.facts.get("synthetic_bundle"),
        )
        strategy = STRATEGIES[study.aggregation.strategy](
            Round(
                study.aggregation,
                number,
                settings.rounds,
                lambda: state.group(group) or source_weights(run, name),
                state.aggregation(group),
            )
        )
        message = request(parameters, weights=state.group(group), **strategy.broadcast())
        for site, reply in run.exchange.ask("train.classifier", message):
            labels = run.site_facts(site).setdefault("labels", {})
            labels[str(budget)] = int(reply.config["examples"])
            if weight := weight_of(reply, study.aggregation):
                strategy.add(site, reply, weight)
            # Or it would stay until the next one is there.
            del reply
        updated, kept = strategy.finish()
        if not updated and not state.group(group):
            raise QuorumError(
                f"no site has a label to fine-tune on at {_percent(run, budget)}; let the experts "
                "label what was selected, then resume"
            )
        if updated:
            state.set_group(group, updated)
        state.set_aggregation(group, kept if number + 1 < settings.rounds else Records())
        state.position[group] = number + 1
        run.save()
        run.events.progress(
            f"classifier {name} at {_percent(run, budget)}", number + 1, settings.rounds
        )
    _evaluate(run, name, stage, state.group(group), settings.batch_norm, budget)


def source_weights(run: StudyRun, name: str) -> Weights:
    """Return a classifier's weights as shipped."""
    return load(run.bundle.read(f"classifiers/{name}.safetensors"))


def _evaluate(
    run: StudyRun,
    name: str,
    stage: str,
    weights: dict[str, Array],
    batch_norm: ClassifierNorm,
    budget: int | None = None,
) -> None:
    if _tested(run, name, stage):
        return
    parameters = EvaluateClassifier(
        **run.pooled,
        classifier=name,
        batch_norm=batch_norm,
        budget=budget if batch_norm == "local" else None,
    )
    for site, reply in run.exchange.ask(
        "evaluate.classifier", request(parameters, weights=weights)
    ):
        facts: dict[str, Any] = run.site_facts(site).setdefault("classifiers", {})
        facts.setdefault(name, {})[stage] = reply.metrics
        run.site_facts(site)["test_images"] = int(reply.config["examples"])
    run.state.facts.setdefault("tested", []).append([name, stage])
    run.save()


def _tested(run: StudyRun, name: str, stage: str) -> bool:
    return [name, stage] in run.state.facts.get("tested", [])


def _percent(run: StudyRun, budget: int) -> str:
    return f"{run.study.selection.budgets[budget]:.0%} of the labels"
