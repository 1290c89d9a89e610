"""Tables of outlines: rows of the segmentation comparison beside published numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sonofed_common.data.readers import read
from sonofed_server.source.data import provenance_of
from sonofed_server.source.settings import SourceData
from sonofed_server.study.report import this_machine
from sonofed_simulations.comparison import built_in
from sonofed_simulations.scenarios.scenario import Scenario
from sonofed_simulations.segmentation_comparison import (
    SegmentationComparison,
    finished_scores,
    read_mask_comparison,
    run_mask_comparison,
)
from sonofed_simulations.segmentation_rows import CONTROL
from sonofed_simulations.segmentation_scores import MaskScores
from sonofed_simulations.segmentation_summary import summarise_masks
from sonofed_simulations.segmentation_tables import mask_table
from sonofed_simulations.tables.manifest import Tested, write_facts
from sonofed_simulations.tables.mask_page import MaskTable, write_mask_page
from sonofed_simulations.tables.request import Made, Request, part_of

COMPARISON = "breast_segmentation"
FULL_SEEDS = (0, 1, 2, 3, 4)
FULL_SIZE = 256
FULL_EPOCHS = {"source": 60, "supervised": 30}
"""The quick form has the comparison's own seeds, size and epochs."""


def make_mask_table(table: MaskTable, request: Request) -> Made:
    """Run one shard's seeds where they are not there yet, and write the page of what has finished.

    Parameters
    ----------
    table : MaskTable
        What to show.
    request : Request
        ``out`` gets README.md, table.csv, table.json, differences.svg, manifest.json, splits.csv
        and, in ``work``, the studies; a shard is some of the seeds.

    Raises
    ------
    ConfigurationError
        The shard is out of range.
    """
    request.check()
    comparison, scenario = read_mask_comparison(built_in()[COMPARISON])
    if not request.quick:
        comparison, scenario = full(comparison, scenario)
    comparison = restricted(comparison, table.published)
    work, data = request.out / "work", request.real_data
    seeds = tuple(part_of(comparison.seeds, request.shard))
    run_mask_comparison(comparison, scenario, work, data, seeds, request.events)
    scores = finished_scores(comparison, scenario, work, request.events)
    summary = summarise_masks(comparison, scores, this_machine())
    write_mask_page(table, summary, method(table, comparison, scenario), request.out)
    facts = {
        "seeds": list(comparison.seeds),
        "data": data_facts(scenario, data),
        "comparison": comparison.model_dump(mode="json"),
        "scenario": scenario.model_dump(mode="json", exclude_none=True),
        "tested": summary.tested,
    }
    write_facts(request.out, facts, _tested(scores))
    done = sum(len(row.seeds) for row in summary.rows)
    return Made(mask_table(summary), done, len(comparison.rows) * len(comparison.seeds))


def method(
    table: MaskTable, comparison: SegmentationComparison, scenario: Scenario
) -> tuple[str, ...]:
    """Say for a page of what size images are, how long trainings were, and what is kept of them."""
    segmentation = scenario.source.segmentation
    assert segmentation is not None
    return (
        f"Images of {scenario.source.image_size} px; the source's segmenter, "
        f"{segmentation.encoder}, trained for {segmentation.epochs} epochs, supervised for "
        f"{comparison.supervised.epochs} more.",
        "No hours stand here: the studies' seconds were not recorded. For all 23 rows of the "
        "comparison's own run, docs/results/breast_segmentation.md says about 85 minutes of one "
        "core a seed.",
        "There is no archive of cells: behind a row stand whole studies, whose scores a run keeps "
        "under `work` and no page does. In its place stand the rows' numbers in table.json, means "
        "over seeds with their intervals, and those of all 23 rows in "
        "docs/results/breast_segmentation.json. "
        f"`sonofed-lab table {table.name} --data DATA --out OUT` runs the studies anew, with "
        "`--quick` at the comparison's own size, length and seeds.",
    )


def data_facts(scenario: Scenario, data: Path) -> dict[str, Any]:
    """Count and digest the source's and every hospital's images and masks, for a manifest."""
    parts = {"source": scenario.source.data}
    for name, hospital in scenario.hospitals.items():
        assert hospital.kind is not None
        parts[name] = SourceData(kind=hospital.kind, path=hospital.path, devices=hospital.devices)
    found = {}
    for name, part in parts.items():
        samples = [
            sample
            for sample in read(part.kind, data / part.path).samples
            if not part.devices or sample.device.startswith(tuple(part.devices))
        ]
        found[name] = provenance_of(part, samples, masks=True).model_dump(mode="json")
    return found


def _tested(scores: Mapping[str, Mapping[int, MaskScores]]) -> Tested:
    by_seed = {seed: found for seeds in scores.values() for seed, found in seeds.items()}
    return {f"seed-{seed}": by_seed[seed].patients for seed in sorted(by_seed)}


def full(
    comparison: SegmentationComparison, scenario: Scenario
) -> tuple[SegmentationComparison, Scenario]:
    """Make the form for a GPU of a comparison: more seeds, larger images, longer training."""
    supervised = comparison.supervised.model_copy(update={"epochs": FULL_EPOCHS["supervised"]})
    assert scenario.source.segmentation is not None
    segmentation = scenario.source.segmentation.model_copy(update={"epochs": FULL_EPOCHS["source"]})
    source = scenario.source.model_copy(
        update={"image_size": FULL_SIZE, "segmentation": segmentation}
    )
    return (
        comparison.model_copy(update={"seeds": FULL_SEEDS, "supervised": supervised}),
        scenario.model_copy(
            update={
                "source": source,
                "study": scenario.study.model_copy(update={"image_size": FULL_SIZE}),
            }
        ),
    )


def restricted(comparison: SegmentationComparison, rows: Iterable[str]) -> SegmentationComparison:
    """Leave out of a comparison what some of its rows do not need."""
    shown = {name: comparison.rows[name] for name in rows}
    needed = {where.partition("/")[0] for where in shown.values()} - {CONTROL}
    starts = {m: s for m, s in comparison.plug_in.items() if m in shown and s in shown}
    variants = {name: v for name, v in comparison.variants.items() if name in needed}
    return comparison.model_copy(update={"rows": shown, "variants": variants, "plug_in": starts})
