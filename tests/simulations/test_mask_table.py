import csv
import json
from pathlib import Path

import numpy as np
import pytest

from sonofed_common.contract.results import Machine
from sonofed_simulations.comparison import built_in
from sonofed_simulations.segmentation_comparison import mask_study, read_mask_comparison
from sonofed_simulations.segmentation_summary import MaskSummary, MaskSummaryRow, PlugIn
from sonofed_simulations.statistics import Contrast, Interval
from sonofed_simulations.tables import TABLES, pseudo_labels, target_informed
from sonofed_simulations.tables.archive import ARCHIVE
from sonofed_simulations.tables.mask_page import MaskClaim, MaskTable, write_mask_page
from sonofed_simulations.tables.mask_table import full, method, restricted

PAGES = Path(__file__).parents[2] / "docs" / "results"
STILL = Interval(value=0.5, low=0.4, high=0.6)


def row(name, gain, p_holm=0.02, seeds=(0, 1), sites=None, gains=None):
    low, value, high = gain if gain is not None else (0, 0, 0)
    over = Contrast(value=value, low=low, high=high, p=0.01, p_holm=p_holm)
    return MaskSummaryRow(
        name=name,
        seeds=seeds,
        dice=STILL,
        nsd=STILL,
        hd95=STILL,
        ece=STILL,
        worst_site="north",
        worst_site_dice=0.4,
        sites={"north": STILL} if sites is None else sites,
        over_baseline=None if gain is None else over,
        sites_over_baseline={} if gains is None else gains,
    )


def at(*values):
    names = ("north", "south", "west", "east")
    found = [Interval(value=v, low=v - 1, high=v + 1) for v in values]
    return dict(zip(names, found, strict=False))


def told(tmp_path):
    with (tmp_path / "table.csv").open() as file:
        lines = {line["row"]: line for line in csv.DictReader(file)}
    return lines, {r["name"]: r for r in json.loads((tmp_path / "table.json").read_text())}


def page(tmp_path, claim, *rows, plug_in=(), start=None):
    shown = [r if isinstance(r, MaskSummaryRow) else row(*r) for r in rows]
    names = {r.name: "77" for r in shown} | {"start": ""}
    machine = Machine()
    summary = MaskSummary(
        name="made",
        machine=machine,
        baseline="start",
        rows=(row("start", None, sites=start), *shown),
        plug_in=plug_in,
        tested={"north": (3, 3)},
        trained={},
    )
    table = MaskTable("made", "title", "a work", names, "printed", (claim,), ("nothing",))
    write_mask_page(table, summary, ("Images of 8 px",), tmp_path)
    return (tmp_path / "README.md").read_text().splitlines()[4]


@pytest.mark.parametrize(
    ("gain", "least", "verdict"),
    [
        ((0.07, 0.08, 0.09), 0.06, "holds and is as large as published"),
        ((0.01, 0.04, 0.07), 0.06, "holds and is as large as published or smaller"),
        ((0.01, 0.02, 0.03), 0.06, "holds and is smaller than published"),
        ((-0.01, 0.02, 0.03), 0.06, "is not told from 0"),
        ((-0.03, -0.02, -0.01), 0.06, "is reversed"),
        ((-0.03, -0.02, -0.01), -0.01, "holds and is as large as published"),
        ((0.01, 0.02, 0.03), -0.01, "is reversed"),
    ],
)
def test_an_effect_is_judged_by_its_interval_and_the_published_one(tmp_path, gain, least, verdict):
    said = page(tmp_path, MaskClaim("It gains", ("method",), least), ("method", gain))
    assert said.startswith("It gains. Here: method over start")
    assert said.endswith(f": the effect {verdict}.")


def test_an_effect_that_does_not_pass_holms_correction_is_not_told(tmp_path):
    claim = MaskClaim("It gains", ("method",), 0.06)
    said = page(tmp_path, claim, ("method", (0.07, 0.08, 0.09), 0.06))
    assert said.endswith(": the effect is not told from 0.")


def test_a_plug_in_is_judged_over_its_start(tmp_path):
    gain = PlugIn(method="method", start="start", value=-0.2, low=-0.3, high=-0.1, p=0.01)
    said = page(
        tmp_path,
        MaskClaim("It adds", ("method",), 0.02, plug_in=True),
        ("method", (0.3, 0.3, 0.3)),
        plug_in=(gain,),
    )
    assert "-0.200" in said and said.endswith("the effect is reversed.")


def test_rows_that_have_not_run_are_not_judged(tmp_path):
    said = page(tmp_path, MaskClaim("It gains", ("absent",), 0.06), ("method", (0.1, 0.2, 0.3)))
    assert said == "It gains. Here: no such row has run."
    assert {len(r) for r in csv.reader((tmp_path / "table.csv").open())} == {32}
    assert [r["name"] for r in json.loads((tmp_path / "table.json").read_text())] == [
        "start",
        "method",
    ]


def test_d_is_of_the_hospitals_differences(tmp_path):
    gains = (0.02, 0.04, -0.01, 0.05)
    one = row("method", (0.01, 0.025, 0.04), gains=at(*gains))
    page(tmp_path, MaskClaim("It gains", ("method",), 0.06), one)
    d = np.mean(gains) / np.std(gains, ddof=1)
    lines, rows = told(tmp_path)
    assert float(lines["method"]["d"]) == pytest.approx(d, abs=1e-5)
    assert (lines["method"]["hospitals_higher"], lines["method"]["hospitals_paired"]) == ("3", "4")
    effect = rows["method"]["effect_over_baseline"]
    assert effect == {"d": pytest.approx(d), "higher": 3, "pairs": 4}
    assert lines["start"]["d"] == "" and rows["start"]["effect_over_baseline"] is None
    assert f"| {d:+.2f} | 3 of 4 |" in (tmp_path / "README.md").read_text()


def test_two_hospitals_have_no_spread_worth_dividing_by(tmp_path):
    one = row("method", (0.01, 0.025, 0.04), gains=at(0.02, 0.03))
    page(tmp_path, MaskClaim("It gains", ("method",), 0.06), one)
    lines, _ = told(tmp_path)
    assert (lines["method"]["d"], lines["method"]["hospitals_paired"]) == ("", "2")


@pytest.mark.parametrize("seeds", [(0, 1), (0, 1, 2)])
def test_d_over_a_start_is_of_hospitals_in_the_same_seeds(tmp_path, seeds):
    gain = PlugIn(method="method", start="start", value=0.05, low=0.01, high=0.1, p=0.01)
    one = row("method", (0.0, 0.1, 0.2), seeds=seeds, sites=at(0.6, 0.45, 0.3, 0.25))
    claim = MaskClaim("It adds", ("method",), 0.02, plug_in=True)
    page(tmp_path, claim, one, plug_in=(gain,), start=at(0.5, 0.4, 0.3, 0.2))
    lines, rows = told(tmp_path)
    (start,) = rows["method"]["over_start"]
    assert lines["method"]["start"] == start["start"] == "start"
    assert float(lines["method"]["over_start"]) == start["value"] == 0.05
    steps = (0.1, 0.05, 0.0, 0.05)
    if seeds == (0, 1):
        d = np.mean(steps) / np.std(steps, ddof=1)
        assert start["effect"]["d"] == pytest.approx(d)
        assert start["effect"]["pairs"] == 4
        assert float(lines["method"]["over_start_d"]) == pytest.approx(d, abs=1e-5)
    else:
        # The start has another set of seeds: a hospital's two means are no pair.
        assert start["effect"] is None and lines["method"]["over_start_d"] == ""


@pytest.mark.parametrize("table", [pseudo_labels.TABLE, target_informed.TABLE])
def test_the_pages_effects_are_those_of_the_comparisons_hospitals(table):
    whole = json.loads((PAGES / "breast_segmentation.json").read_text(encoding="utf-8"))
    by_name = {one["name"]: one for one in whole["rows"]}
    lines, rows = told(PAGES / table.name)
    assert list(lines) == list(rows) and set(rows) == set(table.published)

    def hand(own, other):
        sites = by_name[other]["sites"]
        steps = [by_name[own]["sites"][site]["value"] - sites[site]["value"] for site in sites]
        return np.mean(steps) / np.std(steps, ddof=1), sum(step > 0 for step in steps)

    for name, line in lines.items():
        if name != whole["baseline"]:
            d, higher = hand(name, whole["baseline"])
            assert float(line["d"]) == pytest.approx(d, abs=1e-4)
            assert (int(line["hospitals_higher"]), line["hospitals_paired"]) == (higher, "4")
        if line["start"]:
            d, higher = hand(name, line["start"])
            assert float(line["over_start_d"]) == pytest.approx(d, abs=1e-4)
            assert int(line["over_start_hospitals_higher"]) == higher
    started = {name for name, line in lines.items() if line["start"]}
    assert started == {
        p["method"] for p in whole["plug_in"] if {p["method"], p["start"]} <= set(rows)
    }


@pytest.mark.parametrize("table", [pseudo_labels.TABLE, target_informed.TABLE])
def test_a_page_says_what_stands_in_the_place_of_an_archive(table):
    comparison, scenario = read_mask_comparison(built_in()["breast_segmentation"])
    said = method(table, comparison, scenario)
    text = (PAGES / table.name / "README.md").read_text(encoding="utf-8")
    assert all(f"- {item}" in text for item in said)
    assert f"sonofed-lab table {table.name} " in text and TABLES[table.name]
    assert not (PAGES / table.name / ARCHIVE).exists()
    # The minutes are those of the comparison's own page.
    prose = " ".join((PAGES / "breast_segmentation.md").read_text(encoding="utf-8").split())
    assert "85 minutes of one core a seed" in text and "85 minutes of one core a seed" in prose
    assert f"all {len(comparison.rows)} rows" in text


def test_the_full_form_is_longer_and_larger_and_every_variant_of_it_a_study():
    quick, small = read_mask_comparison(built_in()["breast_segmentation"])
    longer, large = full(quick, small)
    assert set(quick.seeds) < set(longer.seeds) and longer.rows == quick.rows
    assert large.source.image_size > small.source.image_size
    assert large.source.segmentation.epochs > small.source.segmentation.epochs
    for variant in longer.variants:
        assert mask_study(longer, large, variant, 4).image_size == large.source.image_size


@pytest.mark.parametrize("table", [pseudo_labels.TABLE, target_informed.TABLE])
def test_a_table_runs_the_variants_of_its_rows_alone(table):
    whole, _ = read_mask_comparison(built_in()["breast_segmentation"])
    part = restricted(whole, table.published)
    needed = {where.partition("/")[0] for where in part.rows.values()}
    assert list(part.rows) == list(table.published)
    assert needed == {*part.variants, "control"}
    assert len(part.variants) < len(whole.variants)
    judged = {name for claim in table.claims for name in claim.rows}
    assert judged <= part.rows.keys()
