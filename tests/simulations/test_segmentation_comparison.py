from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.results import Machine
from sonofed_common.runtime import SILENT
from sonofed_simulations.paired import Contrast, PatientDraws, contrast, holm
from sonofed_simulations.segmentation_comparison import (
    MaskScores,
    SegmentationComparison,
    finished_scores,
    read_mask_comparison,
    run_mask_comparison,
)
from sonofed_simulations.segmentation_summary import (
    MaskSummary,
    summarise_masks,
    write_mask_summary,
)

TINY = Path(__file__).parent.parent / "integration" / "tiny_segmentation.toml"
SHORT = ["enrol", "ship", "pseudo_label"]
ROWS = {
    "source-only": "control/source-only",
    "BN": "control/bn-adapted",
    "adapted": "short/adapted source",
    "B": "full/target",
    "mean": "full/mean",
    "infusion": "full/infusion",
    "infusion, adapted": "full/adapted infusion",
    "supervised": "control/supervised",
}


def write(folder: Path, strategy: str = "batch_norm", seed: int = 0, full: bool = True) -> Path:
    """A comparison over the tiny study, of a source trained under a seed; return its file."""
    scenario = tomllib.loads(TINY.read_text(encoding="utf-8"))
    scenario["source"] |= {"seed": seed}
    scenario["source"]["segmentation"]["epochs"] = 1
    scenario["study"] |= {"pretraining": {"rounds": 1, "local_epochs": 1, "patch_size": 8}}
    (folder / "scenario.toml").write_text(tomli_w.dumps(scenario), encoding="utf-8")
    phases = ["enrol", "ship", "pretrain", "supervise", "pseudo_label", "ensemble"]
    labels = {"strategy": strategy, "rounds": 1}
    variants: dict[str, Any] = {"short": {"phases": SHORT, "pseudo_labels": labels}}
    if full:
        variants["full"] = {"phases": phases, "pseudo_labels": {"strategy": "tent", "rounds": 1}}
    values = {
        "name": "small",
        "scenario": str(folder / "scenario.toml"),
        "seeds": [0],
        "baseline": "BN",
        "supervised": {"epochs": 1, "learning_rate": 1e-3},
        "variants": variants,
        "rows": {name: row for name, row in ROWS.items() if full or not row.startswith("full")},
        "plug_in": {"adapted": "BN"},
    }
    file = folder / "comparison.toml"
    file.write_text(tomli_w.dumps(values), encoding="utf-8")
    return file


def run(file: Path, out: Path) -> SegmentationComparison:
    comparison, scenario = read_mask_comparison(file)
    run_mask_comparison(comparison, scenario, out, None, (0,), SILENT)
    return comparison


def cells(out: Path) -> dict[str, int]:
    """When each row's scores were written, by variant and row."""
    files = (out / "seed-0").glob("*/*.safetensors")
    return {f"{p.parent.name}/{p.stem}": p.stat().st_mtime_ns for p in files}


@pytest.mark.slow
def test_cells_run_once_and_again_after_what_they_rest_on_changed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    comparison = run(write(tmp_path), out)
    first = cells(out)
    control = {f"control/{name}" for name in ("source-only", "bn-adapted", "supervised")}
    whole = ("source", "target", "mean", "infusion")
    full = {f"full/{prefix}{name}" for name in whole for prefix in ("", "adapted-")}
    short = {"short/source", "short/adapted-source"}
    assert set(first) == control | full | short

    scores = finished_scores(comparison, out)
    assert list(scores) == list(ROWS)
    for found in scores.values():
        for site, patients in found[0].patients.items():
            dice = found[0].measures[site]["dice"]
            assert dice.shape == (len(patients),) and dice.min() >= 0 and dice.max() <= 1
    # Nothing but the statistics was adapted, so nothing but rounding of means may differ.
    for site, measures in scores["adapted"][0].measures.items():
        np.testing.assert_allclose(measures["dice"], scores["BN"][0].measures[site]["dice"])
    summary = summarise_masks(comparison, scores, Machine())
    assert [row.name for row in summary.rows] == list(ROWS)

    run(write(tmp_path), out)
    assert cells(out) == first

    run(write(tmp_path, "tent"), out)
    second = cells(out)
    assert {name for name in first if second[name] != first[name]} == short

    run(write(tmp_path, "tent", seed=1, full=False), out)
    third = cells(out)
    assert {name for name in second if third[name] != second[name]} == short | control


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"baseline": "TENT"}, "'TENT' is not one of the rows"),
        ({"plug_in": {"APL": "BN"}}, "'APL' is not one of the rows"),
        ({"rows": {"BN": "control/bn-adapted", "x": "apl/source"}}, "'apl', which is not a var"),
        ({"variants": {"short": {"pseudo_label": {}}}}, "pseudo_labels"),
    ],
)
def test_a_comparison_that_fits_nothing_is_refused(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    file = write(tmp_path, full=False)
    values = tomllib.loads(file.read_text(encoding="utf-8")) | change
    if "rows" in change:
        values.pop("plug_in")
    file.write_text(tomli_w.dumps(values), encoding="utf-8")
    with pytest.raises(ConfigurationError, match=sentence):
        read_mask_comparison(file)


def comparison_of(rows: dict[str, str], plug_in: dict[str, str]) -> SegmentationComparison:
    return SegmentationComparison.model_validate(
        {
            "name": "x",
            "scenario": "none",
            "seeds": [0, 1],
            "baseline": "BN",
            "supervised": {"epochs": 1, "learning_rate": 1e-3},
            "variants": {"v": {}},
            "rows": rows,
            "plug_in": plug_in,
        }
    )


HAND = comparison_of(
    {
        "source-only": "control/source-only",
        "BN": "control/bn-adapted",
        "A": "v/source",
        "B": "v/target",
        "supervised": "control/supervised",
    },
    {"B": "A", "A": "BN"},
)
LEVELS = {"source-only": 0.3, "BN": 0.4, "A": 0.45, "B": 0.5, "supervised": 0.7}


def scores_of(level: float, seed: int, noise: float = 0.0, tag: int = 0) -> MaskScores:
    """Two sites; the north does better by 0.1 and has two images a patient."""
    draws = np.random.default_rng(seed)
    own = np.random.default_rng([seed, tag])
    patients = {
        "north": [f"n{n // 2}" for n in range(40)],
        "south": [f"s{n}" for n in range(25)],
    }
    measures = {}
    for site, names in patients.items():
        shared = 0.05 * draws.standard_normal(len(names))
        dice = level + shared + noise * own.standard_normal(len(names)) + 0.1 * (site == "north")
        measures[site] = {"dice": dice, "nsd": dice / 2, "hd95": 10 - dice}
    return MaskScores(patients, measures)


def by_hand(noise: float = 0.0) -> dict[str, dict[int, MaskScores]]:
    return {
        name: {seed: scores_of(level, seed, noise, tag) for seed in (0, 1)}
        for tag, (name, level) in enumerate(LEVELS.items())
    }


def test_means_worst_site_and_way_to_supervised() -> None:
    scores = by_hand()
    rows = {row.name: row for row in summarise_masks(HAND, scores, Machine()).rows}
    for name, seeds in scores.items():
        means = {
            site: [found.measures[site]["dice"].mean() for found in seeds.values()]
            for site in ("north", "south")
        }
        expected = (np.mean(means["north"]) + np.mean(means["south"])) / 2
        row = rows[name]
        assert row.seeds == (0, 1)
        assert row.dice.value == pytest.approx(expected)
        assert row.dice.low < expected < row.dice.high
        assert row.nsd == pytest.approx(expected / 2) and row.hd95 == pytest.approx(10 - expected)
        assert (row.worst_site, row.worst_site_dice) == (
            "south",
            pytest.approx(np.mean(means["south"])),
        )
        share = (LEVELS[name] - 0.3) / (0.7 - 0.3)
        assert row.way_to_supervised == pytest.approx(share)
        assert row.sites["north"].value == pytest.approx(np.mean(means["north"]))


def test_differences_of_one_constant_are_sure() -> None:
    summary = summarise_masks(HAND, by_hand(), Machine())
    least = 2 / 2001
    assert {p.method: p.start for p in summary.plug_in} == {"B": "A", "A": "BN"}
    for gained in summary.plug_in:
        bounds = (gained.value, gained.low, gained.high)
        assert bounds == pytest.approx((0.05,) * 3)
        assert gained.p == pytest.approx(least) and gained.p_holm == pytest.approx(2 * least)
    for row in summary.rows:
        if row.name == "BN":
            assert row.over_baseline is None
            continue
        assert row.over_baseline is not None
        assert row.over_baseline.value == pytest.approx(LEVELS[row.name] - LEVELS["BN"])
        # Four methods are compared with the baseline.
        assert row.over_baseline.p_holm == pytest.approx(4 * least)


def test_intervals_are_those_of_an_independent_bootstrap_of_patients() -> None:
    scores = by_hand(noise=0.1)
    row = summarise_masks(HAND, scores, Machine()).rows[HAND_NAMES.index("B")]
    assert row.over_baseline is not None
    draws = np.random.default_rng(99)
    samples = []
    for _ in range(2000):
        sites = []
        for site, count in (("north", 20), ("south", 25)):
            drawn = draws.integers(0, count, count)
            size = 2 if site == "north" else 1
            images = (drawn[:, None] * size + np.arange(size)).ravel()
            for seed in (0, 1):
                pair = (scores[name][seed].measures[site]["dice"][images] for name in ("B", "BN"))
                one, other = pair
                sites.append(one.mean() - other.mean())
        samples.append(np.mean(sites))
    low, high = np.percentile(samples, [2.5, 97.5])
    width = high - low
    assert row.over_baseline.low == pytest.approx(low, abs=0.08 * width)
    assert row.over_baseline.high == pytest.approx(high, abs=0.08 * width)


HAND_NAMES = list(LEVELS)


def test_a_patient_is_drawn_as_one_in_all_seeds() -> None:
    draws = PatientDraws([("a", ["p", "q"]), ("a", ["q", "r"]), ("b", ["p"])])
    first, second = draws.weights("a", ["p", "q", "q"]), draws.weights("a", ["q", "r"])
    assert first.shape == (2001, 3) and np.all(first[0] == 1)
    assert np.array_equal(first[:, 1], first[:, 2]) and np.array_equal(first[:, 1], second[:, 0])
    assert np.all((first[:, 0] + second.sum(axis=1))[1:] == 3)
    assert first[1:].mean(axis=0) == pytest.approx(1, abs=0.07)
    assert np.all(draws.weights("b", ["p"]) == 1)


def test_holm_by_hand() -> None:
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.6}
    tested = {name: Contrast(value=0, low=0, high=0, p=value) for name, value in p.items()}
    # Ordered: 4 x .01, then 3 x .03, then the larger of .09 and 2 x .04, then 1 x .6.
    expected = {"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.6}
    found = {name: value.p_holm for name, value in holm(tested).items()}
    assert found == pytest.approx(expected)
    sure = {"a": tested["a"], "d": tested["d"].model_copy(update={"p": 0.9})}
    assert {n: c.p_holm for n, c in holm(sure).items()} == pytest.approx({"a": 0.02, "d": 0.9})


def test_p_is_two_sided_and_never_zero() -> None:
    values = np.concatenate([[1.0], np.repeat([-1.0, 1.0], [3, 97])])
    assert contrast(values, np.zeros(101)).p == pytest.approx(0.06)
    assert contrast(-values, np.zeros(101)).p == pytest.approx(0.06)
    assert contrast(np.ones(101), np.zeros(101)).p == pytest.approx(2 / 101)
    assert contrast(np.zeros(101), np.zeros(101)).p == 1


def test_rows_without_a_paired_seed_have_no_difference() -> None:
    scores = by_hand()
    del scores["BN"][1], scores["A"][1], scores["B"][0], scores["supervised"]
    summary = summarise_masks(HAND, scores, Machine())
    rows = {row.name: row for row in summary.rows}
    assert list(rows) == ["source-only", "BN", "A", "B"]
    assert rows["A"].over_baseline is not None and rows["B"].over_baseline is None
    assert all(row.way_to_supervised is None for row in rows.values())
    assert [gained.method for gained in summary.plug_in] == ["A"]


def test_the_summary_is_written_for_machines_and_for_readers(tmp_path: Path) -> None:
    summary = summarise_masks(HAND, by_hand(), Machine())
    write_mask_summary(summary, tmp_path)
    kept = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert MaskSummary.model_validate(kept) == summary
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    for row in summary.rows:
        assert f"| {row.name} | 2 | {row.dice.value:.3f} (" in text
    assert "| B | A | +0.050 (+0.050 to +0.050) | 0.002 |" in text
