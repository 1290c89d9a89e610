from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from sonofed_common.contract.configuration import validate
from sonofed_common.contract.errors import ConfigurationError, DataMissingError
from sonofed_common.contract.study import ACTIVE_LEARNING, Study
from sonofed_common.runtime import SILENT, Events
from sonofed_simulations.comparison import (
    PREDICTIONS,
    Cell,
    Comparison,
    built_in,
    finished_cells,
    read_comparison,
    run_comparison,
    study_of,
)
from sonofed_simulations.comparison_summary import summarise, write_summary
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.scenarios.scenario import read_scenario
from sonofed_simulations.segmentation_comparison import read_mask_comparison

TINY = Path(__file__).parent.parent / "integration" / "tiny.toml"
CHEAP = """
phases = ["enrol", "ship", "select", "annotate", "classifier"]
finetuning.rounds = 1
selection.strategy = "random"
selection.budgets = [0.5]
"""


def cell(variant: str, seed: int, shift: float, patients: int = 40) -> Cell:
    generator = np.random.default_rng(seed)
    predictions = {}
    for site in ("north", "south"):
        labels = np.arange(2 * patients) // 2 % 2
        scores = 1 / (1 + np.exp(-(generator.normal(size=2 * patients) + shift * labels)))
        groups = np.array([f"{site}{n // 2}" for n in range(2 * patients)])
        predictions[site] = (labels, scores, groups)
    return Cell(variant, seed, predictions)


def test_summary_matches_an_independent_mean_and_pairs_by_patient() -> None:
    comparison = Comparison(
        name="x", scenario="demo", seeds=(0, 1), reference=("a",), variants={"a": {}, "b": {}}
    )
    cells = [cell(v, s, shift) for s in (0, 1) for v, shift in (("a", 1.0), ("b", 1.8))]
    summary = summarise(comparison, cells)
    rows = {row.variant: row for row in summary.rows}
    for name in ("a", "b"):
        expected = np.mean(
            [
                roc_auc_score(labels, scores)
                for c in cells
                if c.variant == name
                for labels, scores, _ in c.predictions.values()
            ]
        )
        assert rows[name].auroc.value == pytest.approx(expected)
        assert rows[name].auroc.low < expected < rows[name].auroc.high
    gain = rows["b"].over_reference
    assert gain is not None and rows["a"].over_reference is None
    assert gain.value == pytest.approx(rows["b"].auroc.value - rows["a"].auroc.value)
    # The same noise under both variants: pairing makes the difference surer than either mean.
    assert gain.high - gain.low < rows["a"].auroc.high - rows["a"].auroc.low
    assert gain.low > 0 and gain.p_holm is not None and gain.p_holm < 0.05


def test_differences_of_two_rows_are_those_of_their_means_over_common_seeds() -> None:
    comparison = Comparison(
        name="x",
        scenario="demo",
        seeds=(0, 1),
        reference=("a",),
        variants={"a": {}, "b": {}},
        counterparts={"b": "a"},
    )
    shifts = (("source-only", 0.5), ("bn-adapted", 1.0), ("a", 1.4), ("b", 1.8))
    cells = [cell(v, s, shift) for s in (0, 1) for v, shift in shifts]
    # Seed 1 lacks b: its difference is over seed 0 alone.
    summary = summarise(comparison, [c for c in cells if (c.variant, c.seed) != ("b", 1)])
    means = {
        (c.variant, c.seed): np.mean([roc_auc_score(y, p) for y, p, _ in c.predictions.values()])
        for c in cells
    }
    assert set(summary.differences) == {"bn-adapted over source-only", "b over a"}
    gained = summary.differences["bn-adapted over source-only"]
    assert gained.value == pytest.approx(
        np.mean([means["bn-adapted", s] - means["source-only", s] for s in (0, 1)])
    )
    assert gained.low < gained.value < gained.high
    assert summary.differences["b over a"].value == pytest.approx(means["b", 0] - means["a", 0])


def test_a_variant_without_its_paired_reference_has_no_contrast() -> None:
    comparison = Comparison(
        name="x", scenario="demo", seeds=(0, 1), reference=("a",), variants={"a": {}, "b": {}}
    )
    summary = summarise(comparison, [cell("a", 0, 1.0), cell("b", 1, 1.0)])
    assert all(row.over_reference is None for row in summary.rows)


def test_built_in_comparisons_are_valid() -> None:
    selection, _ = read_comparison(built_in()["breast_selection"])
    assert len(selection.seeds) >= 3 and len(selection.reference) >= 5
    segmentation, _ = read_mask_comparison(built_in()["breast_segmentation"])
    assert len(segmentation.seeds) >= 3 and len(segmentation.plug_in) >= 3


def test_a_variant_that_is_no_study_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(
        f'name = "x"\nscenario = "{TINY}"\nseeds = [0]\nreference = ["a"]\n'
        "[variants.a]\nselection = { uncertanty = 'range' }\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigurationError, match="uncertainty"):
        read_comparison(file)


@pytest.mark.parametrize(
    "other", ["classifiers = ['resnet18']", "image_size = 64", "classifiers = ['a', 'b']"]
)
def test_variants_that_have_no_controls_in_common_are_refused(tmp_path: Path, other: str) -> None:
    scenario = tmp_path / "scenario.toml"
    two = TINY.read_text().replace('["shufflenet_v2"]', '["shufflenet_v2", "resnet18"]', 1)
    scenario.write_text(two)
    other = other.replace("'a', 'b'", "'shufflenet_v2', 'resnet18'")
    file = tmp_path / "bad.toml"
    file.write_text(
        f'name = "x"\nscenario = "{scenario}"\nseeds = [0]\nreference = ["a"]\n'
        f"[variants.a]\n[variants.b]\n{other}\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigurationError, match="all be of one classifier and image size"):
        read_comparison(file)


def test_two_processes_prepare_a_folder_one_after_the_other(tmp_path: Path) -> None:
    comparison, scenario = read_comparison(built_in()["breast_selection"])
    waiting = threading.Event()
    failed: list[Exception] = []

    def run() -> None:
        events = Events(listeners=[lambda e: waiting.set() if e["event"] == "waiting" else None])
        try:
            run_comparison(comparison, scenario, tmp_path, None, (0,), events)
        except DataMissingError as error:
            failed.append(error)

    with Laboratory(scenario, tmp_path, None, SILENT).alone():
        other = threading.Thread(target=run)
        other.start()
        assert waiting.wait(30)
        assert not failed
    other.join(30)
    # Once it was alone it went on, as far as it could without data.
    assert len(failed) == 1


def test_a_variant_of_another_preset_has_that_presets_values() -> None:
    scenario = read_scenario(str(TINY))
    values = scenario.study.model_dump(mode="json", exclude_unset=True)
    values |= {"preset": "paper", "embedding": {"margin": 2.0}}
    paper = validate(Study, values, "paper")
    scenario = scenario.model_copy(update={"study": paper})
    assert paper.selection.uncertainty == "range" and not paper.finetuning.balanced
    comparison = Comparison(
        name="x",
        scenario="tiny",
        seeds=(0,),
        reference=("a",),
        variants={"a": {"preset": "default"}, "b": {}},
    )
    default, same = (study_of(comparison, scenario, name, 0) for name in ("a", "b"))
    assert default.selection.uncertainty == "margin" and default.finetuning.balanced
    assert default.embedding.margin == 2.0 and default.finetuning.rounds == 2
    assert same.selection == paper.selection and same.finetuning == paper.finetuning


def test_a_variant_of_the_default_preset_keeps_the_scenarios_network_alone() -> None:
    scenario = read_scenario("breast_two_views")
    comparison = Comparison(
        name="x",
        scenario="breast_two_views",
        seeds=(0,),
        reference=("a",),
        variants={
            "a": {"preset": "default"},
            "b": {},
            "c": {"selection": {"strategy": "entropy"}},
        },
    )
    default, same, other = (study_of(comparison, scenario, name, 0) for name in "abc")
    assert default.phases == ACTIVE_LEARNING and default.selection.strategy == "dual_score"
    assert default.classifiers == same.classifiers == scenario.source.classifiers
    assert same.phases == scenario.study.phases and same.selection == scenario.study.selection
    assert (other.selection.strategy, other.selection.scope) == ("entropy", "global")


@pytest.mark.long
def test_cells_run_once_and_again_after_a_change(tmp_path: Path, prepared: Path) -> None:
    file = tmp_path / "small.toml"
    text = (
        f'name = "x"\nscenario = "{TINY}"\nseeds = [0, 1]\nreference = ["random-0"]\n'
        f"[variants.random-0]\n{CHEAP}[variants.random-1]\n{CHEAP}selection.draw = 1\n"
    )
    file.write_text(text, encoding="utf-8")
    comparison, scenario = read_comparison(file)
    run_comparison(comparison, scenario, prepared, None, (0, 1), SILENT)
    kept = {p: p.stat().st_mtime_ns for p in prepared.rglob(PREDICTIONS)}
    assert len(kept) == 8
    run_comparison(comparison, scenario, prepared, None, (0,), SILENT)
    assert {p: p.stat().st_mtime_ns for p in prepared.rglob(PREDICTIONS)} == kept
    cells, left_out = finished_cells(comparison, scenario, prepared, None)
    assert len(cells) == 8 and left_out == []
    summary = summarise(comparison, cells)
    write_summary(summary, prepared)
    assert [row.variant for row in summary.rows] == [
        "source-only",
        "bn-adapted",
        "random-0",
        "random-1",
    ]
    assert "bn-adapted over source-only" in (prepared / "comparison.md").read_text(encoding="utf-8")

    file.write_text(text.replace("draw = 1", "draw = 2"), encoding="utf-8")
    comparison, scenario = read_comparison(file)
    run_comparison(comparison, scenario, prepared, None, (0,), SILENT)
    changed = {p.relative_to(prepared) for p, t in kept.items() if p.stat().st_mtime_ns != t}
    assert changed == {Path("seed-0/random-1") / PREDICTIONS}
    cells, left_out = finished_cells(comparison, scenario, prepared, None)
    assert len(cells) == 7 and left_out == ["seed-1/random-1"]
    # Other test images: nothing of either seed is of the scenario as it is now.
    hillview = scenario.hospitals["hillview"].model_copy(update={"test_fraction": 0.3})
    hospitals = {**scenario.hospitals, "hillview": hillview}
    changed_scenario = scenario.model_copy(update={"hospitals": hospitals})
    cells, left_out = finished_cells(comparison, changed_scenario, prepared, None)
    assert cells == [] and len(left_out) == 8
    with pytest.raises(ConfigurationError, match="seed 7"):
        run_comparison(comparison, scenario, prepared, None, (7,), SILENT)
