"""Scope: a request is held to the study that the hospital approved."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel

from sonofed_common.contract import actions
from sonofed_common.contract.actions import Parameters
from sonofed_common.contract.errors import StudyDeniedError
from sonofed_common.contract.study import Infusion, Phase, Study

PHASES: Mapping[str, frozenset[Phase]] = {
    "query.missing": frozenset({"ship", "supervise", "pseudo_label", "publish"}),
    "train.install": frozenset({"ship", "supervise", "pseudo_label", "publish"}),
    "train.reconstruct": frozenset({"reconstruct"}),
    "train.embed": frozenset({"embed"}),
    "query.cluster": frozenset({"cluster"}),
    "train.score": frozenset({"select"}),
    "query.histogram": frozenset({"select"}),
    "train.select": frozenset({"select"}),
    "query.annotations": frozenset({"annotate"}),
    "train.classifier": frozenset({"classifier"}),
    "evaluate.classifier": frozenset({"classifier"}),
    "train.pretrain": frozenset({"pretrain"}),
    "train.segmenter": frozenset({"pseudo_label"}),
    "train.ensemble": frozenset({"ensemble"}),
    "evaluate.segmenter": frozenset({"evaluate"}),
}
"""Phases that each action serves; enrolment alone describes."""

PLAIN = Infusion(rule="mean", calibration="none")
"""Infusion of the stages that are tested before the study's own."""


def check_scope(study: Study, action: str, parameters: Parameters) -> None:
    """Refuse what the approved study does not ask for.

    Parameters
    ----------
    study : Study
        What the hospital approved.
    action : str
        A named action.
    parameters : Parameters
        Validated parameters of it.

    Raises
    ------
    StudyDeniedError
        No phase of the study needs the action, or its parameters are not the study's.
    """
    if action in PHASES and not PHASES[action] & set(study.phases):
        raise StudyDeniedError(f"the approved study has no phase that needs {action}")
    for name, given, approved in _pairs(study, parameters):
        if given not in approved:
            raise StudyDeniedError(
                f"the {name} of {action} is not that of the study that this hospital approved"
            )


def _pairs(study: Study, parameters: Parameters) -> list[tuple[str, object, tuple[object, ...]]]:
    """Name of each parameter that the study fixes, its value, and the values it may have."""
    pairs: list[tuple[str, object, tuple[object, ...]]] = [
        ("seed", parameters.seed, (study.seed,)),
    ]
    if isinstance(parameters, actions.Pooled):
        pairs.append(("image_size", parameters.image_size, (study.image_size,)))
    if isinstance(parameters, actions.Encode):
        pairs += [
            ("classifier", parameters.classifier, study.classifiers),
            ("pairs", parameters.pairs, (study.pairs,)),
            ("settings", parameters.settings, (study.embedding,)),
            ("reconstruction", parameters.reconstruction, (study.reconstruction,)),
        ]
    if isinstance(parameters, actions.Score):
        pairs.append(("selection", parameters.selection, (study.selection,)))
    if isinstance(parameters, actions.TrainClassifier):
        budgets = tuple(range(len(study.selection.budgets)))
        pairs.append(("budget", parameters.budget, budgets))
    if isinstance(parameters, actions.TrainClassifier | actions.EvaluateClassifier):
        pairs.append(("classifier", parameters.classifier, study.classifiers))
    if isinstance(parameters, actions.EvaluateSegmenter):
        pairs.append(("infusion", parameters.infusion, (study.infusion, PLAIN)))
    sections: tuple[tuple[type[Parameters], tuple[BaseModel, ...]], ...] = (
        (actions.Reconstruct, (study.reconstruction,)),
        (actions.TrainClassifier, (study.finetuning,)),
        (actions.Pretrain, (study.pretraining,)),
        (actions.TrainSegmenter, study.adaptations),
    )
    for kind, approved in sections:
        if isinstance(parameters, kind):
            pairs.append(("settings", getattr(parameters, "settings", None), approved))
    return pairs
