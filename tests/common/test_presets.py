"""The preset ``sonofed`` and its strategies, as a study file has them."""

from __future__ import annotations

from typing import Any

import pytest

from sonofed_common.contract.configuration import validate
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.selection import ranked_columns, stages
from sonofed_common.contract.study import ACTIVE_LEARNING, PRESETS, Selection, Study
from sonofed_simulations.scenarios.scenario import Scenario, read_scenario

TWO_VIEWS = "efficientnet_lite0_two_views"


def a_study(**values: Any) -> Study:
    return validate(Study, {"name": "x", "cohort": {"sites": ["north"]}, **values}, "study")


def test_the_preset_is_two_views_and_typical_images_without_an_embedding() -> None:
    study = a_study(preset="sonofed")
    assert study.classifiers == (TWO_VIEWS,)
    assert study.phases == ("enrol", "ship", "select", "annotate", "classifier", "publish")
    assert (study.selection.strategy, study.selection.scope) == ("typiclust", "per_site")
    assert study.finetuning.batch_norm == "site"
    assert stages(study.selection) == () and ranked_columns(study.selection) == ()


def test_what_the_file_says_itself_wins() -> None:
    study = a_study(
        preset="sonofed",
        classifiers=["resnet18"],
        selection={"strategy": "entropy", "budgets": [0.3]},
        finetuning={"batch_norm": "global"},
    )
    assert study.classifiers == ("resnet18",) and study.finetuning.batch_norm == "global"
    assert (study.selection.strategy, study.selection.scope) == ("entropy", "global")
    phases = ["enrol", "ship", "select"]
    assert list(a_study(preset="sonofed", phases=phases).phases) == phases
    with pytest.raises(ConfigurationError, match="'select' needs centroids, embeddings"):
        a_study(preset="sonofed", selection={"strategy": "dual_score"})


@pytest.mark.parametrize("scope", ["global", "global_with_site_floor"])
def test_typiclust_compares_no_sites(scope: str) -> None:
    with pytest.raises(ConfigurationError, match=f"scope = '{scope}' compares images"):
        a_study(preset="sonofed", selection={"scope": scope})


@pytest.mark.parametrize("strategy", ["dual_score", "entropy", "typiclust", "random"])
def test_a_selection_survives_the_wire(strategy: str) -> None:
    selection = Selection.model_validate({"strategy": strategy})
    assert selection.scope == ("per_site" if strategy == "typiclust" else "global")
    assert Selection.model_validate(selection.model_dump(mode="json")) == selection
    # Left out, the scope still follows where another strategy is put in its place.
    assert "scope" not in selection.model_dump(exclude_unset=True)


def test_a_misspelt_strategy_is_what_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"selection\.strategy"):
        a_study(selection={"strategy": "typicluster"})


@pytest.mark.parametrize("strategy", ["entropy", "typiclust"])
def test_who_looks_through_a_classifier_needs_one(strategy: str) -> None:
    phases = ["enrol", "ship", "select"]
    values: dict[str, Any] = {"phases": phases, "selection": {"strategy": strategy}}
    with pytest.raises(ConfigurationError, match="phase 'select' needs a classifier"):
        a_study(**values, classifiers=[])
    assert a_study(**values).classifying == ["select"]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_validate_and_name_only_what_there_is(preset: str) -> None:
    study = a_study(preset=preset)
    assert study.preset == preset and PRESETS[preset].keys() <= Study.model_fields.keys()
    assert preset == "sonofed" or study.phases == ACTIVE_LEARNING


def test_the_scenario_of_two_views_is_the_preset() -> None:
    scenario = read_scenario("breast_two_views")
    own = scenario.study.model_dump(exclude={"name", "cohort"})
    assert own == a_study(preset="sonofed").model_dump(exclude={"name", "cohort"})
    assert scenario.source.segmentation is not None and scenario.source.diffusion.kind == "none"


def test_a_sources_further_networks_do_not_replace_the_presets() -> None:
    values = read_scenario("breast_two_views").model_dump(mode="json", exclude_unset=True)
    source = {**values["source"], "classifiers": ["efficientnet_lite0", TWO_VIEWS]}
    made = {**values, "source": source, "study": {"preset": "sonofed"}}
    assert validate(Scenario, made, "s").study.classifiers == (TWO_VIEWS,)
    alone = {**made, "source": {**source, "classifiers": ["efficientnet_lite0"]}}
    with pytest.raises(ConfigurationError, match=f"'{TWO_VIEWS}'; name it in"):
        validate(Scenario, alone, "s")


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("section", [{"synthesis": {"per_class": 9}}, {"wgan": {"steps": 9}}])
def test_settings_of_synthetic_images_need_their_phase(
    preset: str, section: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError, match="would do nothing without the phase 'synthesise'"):
        a_study(preset=preset, **section)
