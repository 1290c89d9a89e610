from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.results import Machine
from sonofed_common.contract.study import Study
from sonofed_common.contract.study_segmentation import Strategy
from sonofed_common.runtime import SILENT, Events
from sonofed_common.segmentation_metrics import ImageScores
from sonofed_simulations.comparison import built_in
from sonofed_simulations.scenarios.scenario import Scenario
from sonofed_simulations.segmentation_comparison import (
    TAKEN,
    SegmentationComparison,
    finished_scores,
    mask_study,
    read_mask_comparison,
    run_mask_comparison,
)
from sonofed_simulations.segmentation_rows import row_names
from sonofed_simulations.segmentation_scores import MaskScores
from sonofed_simulations.segmentation_summary import MaskSummary, summarise_masks
from sonofed_simulations.segmentation_tables import write_mask_summary

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


def write(
    folder: Path,
    strategy: str = "batch_norm",
    rate: float = 3e-3,
    full: bool = True,
    test_fraction: float = 0.4,
) -> Path:
    """A comparison over the tiny study, of a source trained at a rate; return its file."""
    scenario = tomllib.loads(TINY.read_text(encoding="utf-8"))
    scenario["source"]["segmentation"] |= {"epochs": 1, "learning_rate": rate}
    scenario["source_phantoms"]["images"] = 20
    for hospital in scenario["hospitals"].values():
        hospital["phantoms"]["images"] = 10
        hospital["test_fraction"] = test_fraction
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
        "seeds": [0, 1],
        "baseline": "BN",
        "supervised": {"epochs": 1, "learning_rate": 1e-3},
        "variants": variants,
        "rows": {name: row for name, row in ROWS.items() if full or not row.startswith("full")},
        "plug_in": {"adapted": "BN"},
    }
    file = folder / "comparison.toml"
    file.write_text(tomli_w.dumps(values), encoding="utf-8")
    return file


def run(
    file: Path, out: Path, seeds: tuple[int, ...] = (0,)
) -> tuple[SegmentationComparison, Scenario]:
    comparison, scenario = read_mask_comparison(file)
    run_mask_comparison(comparison, scenario, out, None, seeds, SILENT)
    return comparison, scenario


def cells(out: Path, seed: int = 0) -> dict[str, int]:
    """When each row's scores were written, by variant and row."""
    files = (out / f"seed-{seed}").glob("*/*.safetensors")
    files = (path for path in files if path.parent.name not in TAKEN[1:])
    return {f"{p.parent.name}/{p.stem}": p.stat().st_mtime_ns for p in files}


@pytest.mark.long
def test_cells_run_once_and_again_after_what_they_rest_on_changed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    comparison, scenario = run(write(tmp_path), out)
    first = cells(out)
    control = {f"control/{name}" for name in ("source-only", "bn-adapted", "supervised")}
    full = {f"full/{name}" for name in ("target", "mean", "infusion", "adapted-infusion")}
    short = {"short/adapted-source"}
    assert set(first) == control | full | short

    scores = finished_scores(comparison, scenario, out)
    assert list(scores) == list(ROWS)
    for found in scores.values():
        for site, patients in found[0].patients.items():
            dice = found[0].scores[site].dice
            assert dice.shape == (len(patients),) and dice.min() >= 0 and dice.max() <= 1
    # Nothing but the statistics was adapted, so nothing but rounding of means may differ.
    for site, found in scores["adapted"][0].scores.items():
        np.testing.assert_allclose(found.dice, scores["BN"][0].scores[site].dice)
    summary = summarise_masks(comparison, scores, Machine())
    assert [row.name for row in summary.rows] == list(ROWS)
    images = {name: hospital.phantoms.images for name, hospital in scenario.hospitals.items()}
    for site, count in images.items():
        assert summary.tested[site][0] + summary.trained[site][0] == count
    assert summary.tested.keys() == summary.trained.keys() == images.keys()

    run(write(tmp_path), out)
    assert cells(out) == first

    run(write(tmp_path, "tent"), out)
    second = cells(out)
    assert {name for name in first if second[name] != first[name]} == short

    comparison, scenario = run(write(tmp_path, "tent", rate=1e-3, full=False), out)
    third = cells(out)
    assert {name for name in second if third[name] != second[name]} == short | control

    assert finished_scores(comparison, scenario, out)
    others = read_mask_comparison(write(tmp_path, "tent", 1e-3, False, test_fraction=0.6))
    assert finished_scores(*others, out) == {}


@pytest.mark.long
def test_a_variant_starts_from_the_source_that_it_names(tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = write(tmp_path, full=False)
    values = tomllib.loads(file.read_text(encoding="utf-8"))
    values["sources"] = {"styled": {"segmentation": {"style_augmentation": True}}}
    values["variants"]["other"] = {**values["variants"]["short"], "source": "styled"}
    values["rows"] |= {
        "styled": "control-styled/source-only",
        "styled, adapted": "other/adapted source",
        "styled, mirrored": "other/mirrored source",
    }
    file.write_text(tomli_w.dumps(values), encoding="utf-8")
    comparison, scenario = run(file, out)
    folder = out / "seed-0"
    own, styled = (Bundle.open(folder / name) for name in ("source", "sources/styled"))
    assert own.id != styled.id
    assert own.manifest.provenance.seeds == styled.manifest.provenance.seeds
    # Nobody shows what the styled source gains by all masks.
    assert not (folder / "control-styled" / "supervised.safetensors").exists()

    scores = finished_scores(comparison, scenario, out)
    assert set(scores) == set(comparison.rows)

    def dice(row: str) -> list[float]:
        return [value for found in scores[row][0].scores.values() for value in found.dice]

    # Re-normalising alone is no learning: the adapted rows are of two sources, and differ.
    np.testing.assert_allclose(dice("adapted"), dice("BN"))
    assert dice("styled, adapted") != dice("adapted")
    assert dice("styled, mirrored") != dice("styled, adapted")

    first = cells(out)
    values["sources"]["styled"]["segmentation"]["learning_rate"] = 1e-3
    file.write_text(tomli_w.dumps(values), encoding="utf-8")
    run(file, out)
    again = cells(out)
    changed = {name for name in first if again[name] != first[name]}
    assert changed == {
        "control-styled/source-only",
        "other/adapted-source",
        "other/mirrored-source",
    }


@pytest.mark.long
def test_each_seed_has_a_source_of_its_own_and_no_score_of_other_images_counts(
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    comparison, scenario = run(write(tmp_path, full=False), out, (0, 1))
    sources = [Bundle.open(out / f"seed-{seed}" / "source") for seed in (0, 1)]
    assert [source.manifest.provenance.seeds["source"] for source in sources] == [0, 1]
    one, other = (source.read("segmenters/source.safetensors") for source in sources)
    assert one != other
    before = finished_scores(comparison, scenario, out)
    assert all(set(found) == {0, 1} for found in before.values())

    # The same studies, sources and rows; other patients are tested.
    kept = cells(out)
    comparison, scenario = read_mask_comparison(write(tmp_path, full=False, test_fraction=0.6))
    told = Events()
    said: list[dict[str, Any]] = []
    told.listeners.append(said.append)
    assert finished_scores(comparison, scenario, out, told) == {}
    assert {(e["seed"], e["variant"]) for e in said} == {
        (seed, variant) for seed in (0, 1) for variant in ("control", "short")
    }
    run_mask_comparison(comparison, scenario, out, None, (0,), SILENT)
    again = cells(out)
    assert set(again) == set(kept) and all(again[name] != kept[name] for name in kept)
    after = finished_scores(comparison, scenario, out)
    assert all(set(found) == {0} for found in after.values())
    for row, found in after.items():
        for site, patients in found[0].patients.items():
            assert len(patients) > len(before[row][0].patients[site])
    summarise_masks(comparison, after, Machine())


def test_rows_of_one_seed_that_were_tested_on_other_patients_are_refused() -> None:
    scores = by_hand()
    patients = scores["B"][1].patients
    patients["south"] = [f"other-{name}" for name in patients["south"]]
    with pytest.raises(ConfigurationError, match="seed 1 were tested on other patients of south"):
        summarise_masks(HAND, scores, Machine())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"baseline": "TENT"}, "'TENT' is not one of the rows"),
        ({"plug_in": {"APL": "BN"}}, "'APL' is not one of the rows"),
        ({"rows": {"BN": "control/bn-adapted", "x": "apl/source"}}, "'apl', which is not a var"),
        ({"rows": {"BN": "control/bn-adpted"}}, "'control/bn-adpted'; the controls are source-o"),
        (
            {"rows": {"BN": "control/bn-adapted", "x": "short/adapted mean"}},
            "row 'x' shows 'short/adapted mean'; variant 'short' has source, adapted source",
        ),
        ({"variants": {"short": {"pseudo_label": {}}}}, "pseudo_labels"),
        ({"variants": {"short": {}, "sites": {}}}, "cannot be called 'sites'"),
        ({"variants": {"short": {"source": "rich"}}}, "starts from 'rich', which is not a source"),
        (
            {"sources": {"rich": {}}, "variants": {"short": {}, "control-rich": {}}},
            "cannot be called 'control-rich'",
        ),
        (
            {"sources": {"rich": {"segmentation": {"epoch": 2}}}},
            "source rich: unknown key 'segmentation.epoch'",
        ),
        ({"rows": {"BN": "control-rich/bn-adapted"}}, "'control-rich', which is not a variant"),
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


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"phases": ["enrol", "ship", "evaluate"]}, ["source"]),
        ({"phases": ["enrol", "ship", "pseudo_label"]}, ["source", "adapted source"]),
        (
            {"phases": ["enrol", "ship", "pretrain", "supervise"]},
            ["source", "target", "mean"],
        ),
        (
            {
                "phases": ["enrol", "ship", "pretrain", "supervise", "ensemble"],
                "supervision": {"branches": "per_site"},
            },
            ["source", "target-a", "target-b", "mean", "infusion"],
        ),
    ],
)
def test_names_of_the_rows_that_a_study_can_show(changes: dict[str, Any], names: list[str]) -> None:
    study = Study.model_validate({"name": "x", "cohort": {"sites": ["a", "b"]}, **changes})
    assert row_names(study) == [*names, *(f"mirrored {name}" for name in names)]


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


def test_nothing_starts_from_a_source_that_no_row_shows(tmp_path: Path) -> None:
    file = write(tmp_path, full=False)
    values = tomllib.loads(file.read_text(encoding="utf-8"))
    values["sources"] = {"styled": {"segmentation": {"style_augmentation": True}}}
    values["variants"]["other"] = {"source": "styled"}
    file.write_text(tomli_w.dumps(values), encoding="utf-8")
    comparison, scenario = read_mask_comparison(file)
    assert comparison.starts() == {"short": "", "control": ""}
    # What an earlier form of the file trained is passed over.
    out = tmp_path / "out"
    for folder in ("source", "sources/styled"):
        (out / "seed-0" / folder).mkdir(parents=True)
    (out / "seed-0" / "sources" / "styled" / "manifest.json").write_text("{}", encoding="utf-8")
    for name in scenario.hospitals:
        settings = out / "seed-0" / "sites" / name / "site-0.toml"
        settings.parent.mkdir(parents=True)
        settings.touch()
    assert finished_scores(comparison, scenario, out) == {}


OUTLINES = (
    "breast_segmentation",
    "breast_segmentation_further",
    "breast_segmentation_longer",
    "cross_device",
    "nerves",
    "phantom_multiclass",
)


@pytest.mark.parametrize("name", OUTLINES)
def test_the_built_in_comparisons_start_what_they_plug_in_from_what_they_say(name: str) -> None:
    comparison, scenario = read_mask_comparison(built_in()[name])
    assert name.startswith(comparison.scenario) and len(comparison.seeds) >= 3

    def chain(row: str) -> list[Strategy]:
        variant, _, what = comparison.rows[row].partition("/")
        if not what.startswith("adapted "):
            return []
        study = mask_study(comparison, scenario, variant, 0)
        return [s.strategy for s in (study.pseudo_labels, *study.further_pseudo_labels)]

    for method, start in comparison.plug_in.items():
        assert chain(method) == [*chain(start), "apl"]


def test_the_style_source_differs_in_its_augmentation_alone() -> None:
    comparison, scenario = read_mask_comparison(built_in()["breast_segmentation_further"])
    assert comparison.baseline == "BN adaptation"
    assert comparison.rows["BN adaptation"] == "control/bn-adapted"
    assert scenario.source.segmentation is not None
    assert not scenario.source.segmentation.style_augmentation
    assert comparison.sources == {"style": {"segmentation": {"style_augmentation": True}}}
    for row, shown in comparison.rows.items():
        start = comparison.starts()[shown.partition("/")[0]]
        assert (start == "style") == row.startswith("style")
        assert ("mirrored" in row) == ("mirrored" in shown)


def test_the_built_in_rows_are_what_they_are_called() -> None:
    comparison, scenario = read_mask_comparison(built_in()["breast_segmentation"])
    assert len(set(comparison.rows.values())) == len(comparison.rows)
    studies = {
        row: mask_study(comparison, scenario, shown.partition("/")[0], 0)
        for row, shown in comparison.rows.items()
        if not shown.startswith("control/")
    }
    # Branch A with the site's own statistics is the baseline itself.
    unadapted = [row for row in studies if comparison.rows[row].endswith("/source")]
    assert all(studies[row].segmenter_batch_norm == "mixed" for row in unadapted)
    settings = {row: study.pseudo_labels for row, study in studies.items()}
    paper = Study.model_validate({"name": "x", "preset": "paper", "cohort": {"sites": ["a"]}})
    assert settings["APL, as published"] == paper.pseudo_labels
    alone = settings["APL, L_con alone"]
    assert alone.consistency and not alone.self_training
    for row in ("L_ssl with prior", "B, L_ssl with prior", "infusion, L_ssl with prior"):
        assert not settings[row].consistency
        assert settings[row].self_training and settings[row].class_prior > 0


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
    scores = {}
    for site, names in patients.items():
        shared = 0.05 * draws.standard_normal(len(names))
        dice = level + shared + noise * own.standard_normal(len(names)) + 0.1 * (site == "north")
        residuals = np.zeros((len(names), 15))
        residuals[:, 3], residuals[:, 9] = 12.8 * dice, -6.4 * dice
        pixels = np.full(len(names), 64.0)
        scores[site] = ImageScores(dice, dice / 2, 10 - dice, residuals, pixels)
    return MaskScores(patients, scores)


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
            site: [found.scores[site].dice.mean() for found in seeds.values()]
            for site in ("north", "south")
        }
        expected = (np.mean(means["north"]) + np.mean(means["south"])) / 2
        row = rows[name]
        assert row.seeds == (0, 1)
        assert row.dice.value == pytest.approx(expected)
        assert row.dice.low < expected < row.dice.high
        # NSD, HD95 and ECE are functions of Dice here, so their samples are too.
        for of, found in (
            (lambda dice: dice / 2, row.nsd),
            (lambda dice: 10 - dice, row.hd95),
            (lambda dice: (12.8 + 6.4) * dice / 64, row.ece),
        ):
            assert found.value == pytest.approx(of(expected))
            ends = sorted([of(row.dice.low), of(row.dice.high)])
            assert [found.low, found.high] == pytest.approx(ends)
        assert (row.worst_site, row.worst_site_dice) == (
            "south",
            pytest.approx(np.mean(means["south"])),
        )
        share = (LEVELS[name] - 0.3) / (0.7 - 0.3)
        # Noise is shared here, so that only rounding is left of the ratio's interval.
        assert row.way_to_supervised is not None
        way = row.way_to_supervised
        assert [way.value, way.low, way.high] == pytest.approx([share] * 3, abs=1e-6)
        for site, expected in means.items():
            dice = np.mean(expected)
            assert row.sites[site].value == pytest.approx(dice)
            assert row.sites_nsd[site].value == pytest.approx(dice / 2)
            assert row.sites_hd95[site].value == pytest.approx(10 - dice)
            assert row.sites_ece[site].value == pytest.approx((12.8 + 6.4) * dice / 64)


def test_a_site_below_the_baseline_shows() -> None:
    scores = by_hand(noise=0.02)
    for found in scores["B"].values():
        south = found.scores["south"]
        found.scores["south"] = replace(south, dice=south.dice - 0.25)
    rows = {row.name: row for row in summarise_masks(HAND, scores, Machine()).rows}
    assert rows["BN"].sites_over_baseline == {}
    gained = rows["B"].sites_over_baseline
    for site, found in gained.items():
        pairs = [scores[name] for name in ("B", "BN")]
        mine, theirs = ([s.scores[site].dice.mean() for s in one.values()] for one in pairs)
        assert found.value == pytest.approx(np.mean(mine) - np.mean(theirs))
    assert gained["south"].high < 0 < gained["north"].low
    assert rows["B"].over_baseline is not None
    mean = np.mean([found.value for found in gained.values()])
    assert rows["B"].over_baseline.value == pytest.approx(mean)
    way = rows["B"].way_to_supervised
    assert way is not None and way.low < way.value < way.high


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
                pair = (scores[name][seed].scores[site].dice[images] for name in ("B", "BN"))
                one, other = pair
                sites.append(one.mean() - other.mean())
        samples.append(np.mean(sites))
    low, high = np.percentile(samples, [2.5, 97.5])
    width = high - low
    assert row.over_baseline.low == pytest.approx(low, abs=0.08 * width)
    assert row.over_baseline.high == pytest.approx(high, abs=0.08 * width)


HAND_NAMES = list(LEVELS)


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
    scores = by_hand()
    for found in scores["supervised"].values():
        found.trained.update({"north": 31, "south": 17})
    summary = summarise_masks(HAND, scores, Machine())
    write_mask_summary(summary, tmp_path)
    kept = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert MaskSummary.model_validate(kept) == summary
    text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    for row in summary.rows:
        assert f"| {row.name} | 2 | {row.dice.value:.3f} (" in text
    assert "| tested | 40, 40 | 25, 25 |" in text
    assert "| labelled for the supervised control | 31, 31 | 17, 17 |" in text
    titles = {
        "NSD by site (95%)": "sites_nsd",
        "HD95 by site, pixels": "sites_hd95",
        "ECE by site (95%)": "sites_ece",
    }
    for title, found in titles.items():
        table = text.split(title)[1].split("\n\n")[1]
        assert table.startswith("| method | north | south |")
        for line, row in zip(table.splitlines()[2:], summary.rows, strict=True):
            shown = [float(cell.split(" ")[0]) for cell in line.split(" | ")[1:]]
            values = [one.value for one in getattr(row, found).values()]
            assert shown == pytest.approx(values, abs=0.051)
    assert "Dice over BN by site" in text and "| B | +0.100 (+0.100 to +0.100) |" in text
    assert "| B | A | +0.050 (+0.050 to +0.050) | 0.002 |" in text
