import csv
import json

import pytest

from sonofed_common.contract.results import Machine
from sonofed_simulations.comparison import built_in
from sonofed_simulations.segmentation_comparison import mask_study, read_mask_comparison
from sonofed_simulations.segmentation_summary import MaskSummary, MaskSummaryRow, PlugIn
from sonofed_simulations.statistics import Contrast, Interval
from sonofed_simulations.tables import pseudo_labels, target_informed
from sonofed_simulations.tables.mask_page import MaskClaim, MaskTable, write_mask_page
from sonofed_simulations.tables.mask_table import full, restricted

STILL = Interval(value=0.5, low=0.4, high=0.6)


def row(name, gain, p_holm=0.02):
    low, value, high = gain if gain is not None else (0, 0, 0)
    over = Contrast(value=value, low=low, high=high, p=0.01, p_holm=p_holm)
    return MaskSummaryRow(
        name=name,
        seeds=(0, 1),
        dice=STILL,
        nsd=STILL,
        hd95=STILL,
        ece=STILL,
        worst_site="north",
        worst_site_dice=0.4,
        sites={"north": STILL},
        over_baseline=None if gain is None else over,
    )


def page(tmp_path, claim, *rows, plug_in=()):
    names = {name: "77" for name, *_ in rows} | {"start": ""}
    machine = Machine()
    summary = MaskSummary(
        name="made",
        machine=machine,
        baseline="start",
        rows=(row("start", None), *(row(*r) for r in rows)),
        plug_in=plug_in,
        tested={"north": (3, 3)},
        trained={},
    )
    table = MaskTable("title", "a work", names, "printed", (claim,), ("nothing",))
    write_mask_page(table, summary, "Images of 8 px", tmp_path)
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
    assert {len(r) for r in csv.reader((tmp_path / "table.csv").open())} == {20}
    assert [r["name"] for r in json.loads((tmp_path / "table.json").read_text())] == [
        "start",
        "method",
    ]


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
