"""Settings of pseudo-labelling that a study's strategy does not read."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from sonofed_common.contract.configuration import validate
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.study import PRESETS, Study
from sonofed_common.contract.study_segmentation import READ_BY, PseudoLabels, Strategy

OTHERS: dict[str, Any] = {
    "consistency": True,
    "self_training": False,
    "relevance": "inverse",
    "disagreement": 1.0,
    "class_mean_confidence": False,
    "class_prior": 1.0,
    "prior_shares": "source",
    "teacher_momentum": 0.5,
    "threshold": 0.8,
    "quantile": 0.2,
    "passes": 3,
    "perturbed_heads": 3,
}
"""Of every setting that not all strategies read: a value that is not its default."""


def a_study(preset: str = "default", **values: Any) -> Study:
    cohort = {"cohort": {"sites": ["north"]}}
    return validate(Study, {"name": "x", "preset": preset, **cohort, **values}, "study")


@pytest.mark.parametrize("name", READ_BY)
@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_a_setting_of_other_strategies_is_refused(strategy: Strategy, name: str) -> None:
    section = {"strategy": strategy, "local_epochs": 2, name: OTHERS[name]}
    if strategy in READ_BY[name]:
        if name in ("self_training", "relevance", "disagreement"):
            section["consistency"] = True
        for values in ({"pseudo_labels": section}, {"further_pseudo_labels": [section]}):
            study = a_study(**values)
            settings = (study.pseudo_labels, *study.further_pseudo_labels)[-1]
            assert getattr(settings, name) == OTHERS[name]
        return
    with pytest.raises(ConfigurationError, match=f"pseudo_labels.*{name}.* would do nothing: it"):
        a_study(pseudo_labels=section)
    with pytest.raises(ConfigurationError, match=f"further_.*{name}.* would do nothing: it"):
        a_study(further_pseudo_labels=[section])
    # As good as left out.
    section[name] = PseudoLabels.model_fields[name].default
    assert a_study(pseudo_labels=section).pseudo_labels.strategy == strategy


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"relevance": "count"}, "relevance would do nothing: it is part of consistency"),
        ({"prior_shares": "source", "class_prior": 0.0}, "prior_shares .* part of class_prior"),
        (
            {"class_mean_confidence": False, "consistency": True, "self_training": False},
            "class_mean_confidence would do nothing: it is part of self_training",
        ),
        ({"self_training": False}, "would train nothing: .* name strategy 'batch_norm'"),
        (
            {"strategy": "dpl", "perturbed_heads": 8},
            "perturbed_heads would do nothing: it is of strategy 'upl_sfda'; leave it out",
        ),
    ],
)
def test_what_a_study_switches_off_has_no_settings(section: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        a_study(pseudo_labels=section)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_what_a_preset_sets_for_another_strategy_is_no_mistake(
    preset: str, strategy: Strategy
) -> None:
    section = {"strategy": strategy}
    study = a_study(preset, pseudo_labels=section, further_pseudo_labels=[section])
    assert study.pseudo_labels.consistency == (preset == "paper")
    written = study.model_dump(mode="json")
    assert validate(Study, written, "study").digest() == study.digest()
    # A site gets the settings without the preset's name.
    assert PseudoLabels.model_validate(written["pseudo_labels"]) == study.pseudo_labels


def test_the_paper_without_its_consistency_keeps_the_rest() -> None:
    study = a_study("paper", pseudo_labels={"consistency": False})
    assert study.pseudo_labels.relevance == "count"
    with pytest.raises(ConfigurationError, match="relevance would do nothing"):
        a_study("paper", pseudo_labels={"consistency": False, "relevance": "inverse"})
