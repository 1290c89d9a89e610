from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.runtime import SILENT
from sonofed_simulations.comparison import (
    PREDICTIONS,
    Cell,
    Comparison,
    built_in,
    finished_cells,
    read_comparison,
    run_comparison,
)
from sonofed_simulations.comparison_summary import summarise, write_summary
from sonofed_simulations.segmentation_comparison import read_mask_comparison

TINY = Path(__file__).parent.parent / "integration" / "tiny.toml"
CHEAP = 'phases = ["enrol", "ship", "select", "annotate", "classifier"]'


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


@pytest.mark.slow
def test_cells_run_once_and_again_after_a_change(tmp_path: Path) -> None:
    file = tmp_path / "small.toml"
    text = (
        f'name = "x"\nscenario = "{TINY}"\nseeds = [0]\nreference = ["random-0"]\n'
        f"[variants.random-0]\n{CHEAP}\nselection = {{ strategy = 'random' }}\n"
        f"[variants.random-1]\n{CHEAP}\nselection = {{ strategy = 'random', draw = 1 }}\n"
    )
    file.write_text(text, encoding="utf-8")
    out = tmp_path / "out"
    comparison, scenario = read_comparison(file)
    run_comparison(comparison, scenario, out, None, (0,), SILENT)
    kept = {p: p.stat().st_mtime_ns for p in out.rglob(PREDICTIONS)}
    assert len(kept) == 4
    run_comparison(comparison, scenario, out, None, (0,), SILENT)
    assert {p: p.stat().st_mtime_ns for p in out.rglob(PREDICTIONS)} == kept
    summary = summarise(comparison, finished_cells(comparison, out))
    write_summary(summary, out)
    assert [row.variant for row in summary.rows] == [
        "source-only",
        "bn-adapted",
        "random-0",
        "random-1",
    ]
    assert "bn-adapted" in (out / "comparison.md").read_text(encoding="utf-8")

    file.write_text(text.replace("draw = 1", "draw = 2"), encoding="utf-8")
    comparison, scenario = read_comparison(file)
    run_comparison(comparison, scenario, out, None, (0,), SILENT)
    changed = {p.parent.name for p, t in kept.items() if p.stat().st_mtime_ns != t}
    assert changed == {"random-1"}
    with pytest.raises(ConfigurationError, match="seed 7"):
        run_comparison(comparison, scenario, out, None, (7,), SILENT)
