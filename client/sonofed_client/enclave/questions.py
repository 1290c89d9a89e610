"""Questions: all that a study asks of a site, for who reads it and for what is held to it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sonofed_common.contract import actions
from sonofed_common.contract.actions import Parameters
from sonofed_common.contract.selection import MAX_PARTS, ranked_columns, stages
from sonofed_common.contract.study import Phase, Study
from sonofed_common.contract.study_segmentation import PLAIN_MEAN

ANY_BUNDLE = "0" * 64
SHIPPING: frozenset[Phase] = frozenset(
    {"ship", "synthesise", "supervise", "pseudo_label", "publish"}
)
"""Phases of which a bundle comes to the sites."""

Choice = Collection[object] | None
"""Values of which a parameter is one or, where it is a list, holds each once at most; None: any."""


@dataclass(frozen=True)
class Question:
    """One action that a study asks of a site.

    Attributes
    ----------
    action : str
        Named action.
    parameters : Parameters
        As the coordinator sends them, or one example where it chooses.
    times : int or None
        How often at most; None where nobody can know before.
    choices : mapping of str to collection or None
        Parameters that the coordinator chooses, and among which values; all others are fixed.
    """

    action: str
    parameters: Parameters
    times: int | None = None
    choices: Mapping[str, Choice] = field(default_factory=dict)

    def misfits(self, parameters: Parameters) -> list[str]:
        """Return the names of parameters that are not as this question asks them."""
        return [name for name in type(parameters).model_fields if not self._fits(name, parameters)]

    def _fits(self, name: str, parameters: Parameters) -> bool:
        value = getattr(parameters, name)
        if name not in self.choices:
            return bool(value == getattr(self.parameters, name))
        choice = self.choices[name]
        values = value if isinstance(value, tuple) else (value,)
        return choice is None or (len(set(values)) == len(values) and set(values) <= set(choice))


def questions(study: Study) -> Iterator[Question]:
    """Yield what a study asks of a site, in the order of its phases.

    What is not yielded here is neither shown to the hospital nor answered once it has approved.
    """
    common: dict[str, Any] = {"study": study.name, "seed": study.seed}
    pooled = {**common, "bundle": ANY_BUNDLE, "image_size": study.image_size}
    for phase in study.phases:
        if phase in SHIPPING:
            yield Question("query.missing", actions.Missing(**common))
            yield Question("train.install", actions.Install(**common))
        if phase == "enrol":
            describe = actions.Describe(**common, study_digest=study.digest())
            yield Question("query.describe", describe, choices={"content": None})
        elif phase == "reconstruct":
            redraw = actions.Reconstruct(**pooled, settings=study.reconstruction)
            free: dict[str, Choice] = {"bundle": None, "slice_seconds": None}
            yield Question("train.reconstruct", redraw, choices=free)
        elif phase in ("embed", "cluster", "select"):
            yield from _selecting(study, phase, common, pooled)
        elif phase == "annotate":
            yield Question("query.annotations", actions.Annotations(**common))
        elif phase == "synthesise":
            draw = actions.Synthesise(**common, settings=study.synthesis, wgan=study.wgan)
            yield Question("train.synthesise", draw, 1)
        elif phase == "classifier":
            yield from _classifying(study, pooled)
        elif phase in ("pretrain", "pseudo_label", "ensemble", "evaluate"):
            yield from _segmenting(study, phase, pooled)


def _selecting(
    study: Study, phase: Phase, common: dict[str, Any], pooled: dict[str, Any]
) -> Iterator[Question]:
    settings: dict[str, Any] = {"settings": study.embedding, "reconstruction": study.reconstruction}
    backbone = next(iter(study.classifiers), "")
    encode = {**pooled, "classifier": backbone, "pairs": study.pairs, **settings}
    bundle: dict[str, Choice] = {"bundle": None}
    if phase == "embed":
        embed = actions.Embed(**encode, round=0)
        yield Question("train.embed", embed, study.embedding.rounds, {**bundle, "round": None})
    elif phase == "cluster":
        times = study.clustering.iterations + 1
        yield Question("query.cluster", actions.Cluster(**encode), times, bundle)
    else:
        score = actions.Score(
            **encode, selection=study.selection, batch_norm=study.finetuning.start_statistics
        )
        yield Question("train.score", score, choices=bundle)
        ranked = ranked_columns(study.selection)
        compared = ("informativeness", "identity") if stages(study.selection) else ()
        for column in (*ranked, *compared):
            counts = actions.Histogram(**common, column=column, split=MAX_PARTS)
            free: dict[str, Choice] = {"split": None}
            free |= {"tied": None} if column == "identity" else {}
            yield Question("query.histogram", counts, choices=free)
        if ranked:
            yield Question("train.select", actions.Select(**common, stage="rank"))
        yield Question("train.select", actions.Select(**common, stage="mark"))


def _classifying(study: Study, pooled: dict[str, Any]) -> Iterator[Question]:
    settings, budgets = study.finetuning, len(study.selection.budgets)
    both: tuple[Literal["site", "global"], ...] = ("global", "site")
    for name in study.classifiers:
        for budget in range(budgets):
            train = actions.TrainClassifier(
                **pooled,
                classifier=name,
                round=0,
                budget=budget,
                settings=settings,
                aggregation=study.aggregation,
            )
            free: dict[str, Choice] = {"bundle": None, "round": None}
            free |= {"synthetic_bundle": None} if "synthesise" in study.phases else {}
            yield Question("train.classifier", train, settings.rounds, free)
        for batch_norm in both:
            # The source's own weights are tested both ways, fine-tuned ones as the study says.
            times = 1 + budgets * (batch_norm == settings.batch_norm)
            test = actions.EvaluateClassifier(**pooled, classifier=name, batch_norm=batch_norm)
            yield Question("evaluate.classifier", test, times, {"bundle": None})
        for budget in range(budgets) if settings.batch_norm == "local" else ():
            test = actions.EvaluateClassifier(
                **pooled, classifier=name, batch_norm="local", budget=budget
            )
            yield Question("evaluate.classifier", test, 1, {"bundle": None})


def _segmenting(study: Study, phase: Phase, pooled: dict[str, Any]) -> Iterator[Question]:
    names, bundle = _branches(study), {"bundle": None}
    many: dict[str, Choice] = {**bundle, "branches": names}
    source: dict[str, Any] = {**pooled, "branches": ("source",)}
    norm = study.segmenter_batch_norm
    if phase == "pretrain":
        pretrain = actions.Pretrain(**pooled, round=0, settings=study.pretraining)
        free: dict[str, Choice] = {**bundle, "round": None}
        yield Question("train.pretrain", pretrain, study.pretraining.rounds, free)
    elif phase == "pseudo_label":
        for earlier, wanted in study.adaptations:
            train = actions.TrainSegmenter(
                **pooled,
                branch="source",
                round=0,
                earlier_rounds=earlier,
                settings=wanted,
                batch_norm=norm,
            )
            free = {**bundle, "round": None, "branch": names}
            yield Question("train.segmenter", train, len(names) * wanted.rounds, free)
    elif phase == "ensemble" and study.infusion.calibration == "consensus":
        times = 1 + ("pseudo_label" in study.phases)
        calibrate = actions.TrainEnsemble(**source, batch_norm=norm)
        yield Question("train.ensemble", calibrate, times, many)
    elif phase == "evaluate":
        informed, adapted = len(names) > 1, "pseudo_label" in study.phases
        untouched = actions.EvaluateSegmenter(**source, infusion=PLAIN_MEAN, batch_norm="global")
        yield Question("evaluate.segmenter", untouched, 1, {"bundle": None})
        own = actions.EvaluateSegmenter(**source, infusion=PLAIN_MEAN)
        test = actions.EvaluateSegmenter(**source, infusion=PLAIN_MEAN, batch_norm=norm)
        infused = "ensemble" in study.phases
        later = 2 * informed + adapted + (informed and adapted and not infused)
        yield Question("evaluate.segmenter", own, 1 + later * (norm == "site"), many)
        if later and norm != "site":
            yield Question("evaluate.segmenter", test, later, many)
        if infused:
            test = actions.EvaluateSegmenter(**source, infusion=study.infusion, batch_norm=norm)
            yield Question("evaluate.segmenter", test, 1 + adapted, many)


def _branches(study: Study) -> tuple[str, ...]:
    if "supervise" not in study.phases:
        return ("source",)
    if study.supervision.branches == "shared":
        return ("source", "target")
    return ("source", *(f"target-{site}" for site in study.cohort.sites))
