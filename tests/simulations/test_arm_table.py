from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from sonofed_common.contract.errors import ConfigurationError, DataMissingError
from sonofed_common.runtime import SILENT, Events
from sonofed_simulations.tables import TABLES, maker
from sonofed_simulations.tables.arm_findings import Claim, findings
from sonofed_simulations.tables.arm_page import About, write_page
from sonofed_simulations.tables.arm_summary import MEAN, WORST, summarise_arms
from sonofed_simulations.tables.arm_table import make_arm_table
from sonofed_simulations.tables.arms import Arm, ArmCell, Outcome
from sonofed_simulations.tables.manifest import Tested
from sonofed_simulations.tables.request import Request

ARMS = (
    Arm("plain", published="61.3", home="north"),
    Arm("better", "plain", "65.6", home="north"),
    Arm("same", "plain", home="north"),
)
RIGHT = {"plain": 0.6, "better": 0.9, "same": 0.6}


def test_a_row_is_the_mean_of_its_draws() -> None:
    draws = np.random.default_rng(0)
    labels, patients = np.arange(40) % 2, np.arange(40).astype(str)
    found = np.clip(labels * 0.2 + draws.uniform(0, 0.8, (3, 40)), 0, 1)
    arms = [Arm("drawn"), Arm("plain", "drawn")]
    predictions = {"drawn": found, "plain": found[1]}
    cells = [
        ArmCell(arm, 0, Outcome({"north": (labels, predictions[arm.name], patients)}), 1.0)
        for arm in arms
    ]
    drawn, plain = summarise_arms(arms, (0,), cells).rows
    aurocs = [roc_auc_score(labels, one) for one in found]
    assert drawn.values["north"]["auroc"].value == pytest.approx(np.mean(aurocs))
    accuracies = [np.mean((one >= 0.5) == labels) for one in found]
    assert drawn.values["north"]["accuracy"].value == pytest.approx(np.mean(accuracies))
    gained = plain.differences["north"]["auroc"].value
    assert gained == pytest.approx(aurocs[1] - np.mean(aurocs))


def test_the_worst_sites_effect_is_of_the_seeds_worst_sites() -> None:
    # Seed by seed another site is the worst one, and every site gains at its worst.
    sites = ("north", "south", "west")
    right = {"plain": {0: (6, 8, 9), 1: (9, 6, 8)}, "better": {0: (7, 8, 9), 1: (8, 8, 8)}}
    patients, labels = np.arange(10).astype(str), np.arange(10) % 2
    arms = [Arm("plain"), Arm("better", "plain")]
    cells = []
    for arm in arms:
        for seed, counts in right[arm.name].items():
            found = {
                site: (labels, np.where(np.arange(10) < n, labels, 1 - labels), patients)
                for site, n in zip(sites, counts, strict=True)
            }
            cells.append(ArmCell(arm, seed, Outcome(found), 1.0))
    gained = summarise_arms(arms, (0, 1), cells).rows[1].differences[WORST]["accuracy"]
    assert gained.higher == 2 and gained.effect is None
    # Means over seeds first: the lowest is 7 of 10 (south) before, 7.5 (north) after.
    assert gained.value == pytest.approx(0.05)


class Coins:
    """An experiment whose classifiers are right by chance; of one seed all toss the same coins."""

    def __init__(self, seeds: Sequence[int] = (0, 1, 2)) -> None:
        self.seeds = seeds
        self.runs: list[tuple[str, int]] = []

    @property
    def arms(self) -> Sequence[Arm]:
        return ARMS

    @property
    def about(self) -> About:
        claims = (
            Claim("It rises by 4 points", ("better", "same"), "south"),
            Claim("It falls", ("better",), "south", direction=-1),
            Claim("Home is easier", ("plain",), "", quantity="gap"),
        )
        return About("Coins", "a work", claims, "accuracy, %", "south", ("tossed",), ("all",))

    def origin(self, arm: Arm, seed: int) -> Mapping[str, Any]:
        return {"right": RIGHT[arm.name]}

    def facts(self) -> Mapping[str, Any]:
        return {"data": {"north": "digest"}}

    def tested(self) -> Tested:
        return {"seed-0": {"north": ["p2", "p1", "p2"], "south": ["p7"]}}

    def run(self, arm: Arm, seed: int) -> Outcome:
        self.runs.append((arm.name, seed))
        draws = np.random.default_rng(seed)
        predictions = {}
        for site in ("north", "south"):
            labels = (np.arange(80) % 4 == 0).astype(np.int64)
            correct = draws.random(80) < RIGHT[arm.name]
            probabilities = np.where(correct == (labels == 1), 0.7, 0.2)
            patients = np.array([f"{seed}-{n // 2}" for n in range(80)])
            predictions[site] = (labels, probabilities, patients)
        return Outcome(predictions, {"images": 100.0 + seed})


def request(out: Path, shard: tuple[int, int] = (1, 1), events: Events = SILENT) -> Request:
    return Request("coins", True, out, None, shard, events)


def cells(table: Coins) -> list[ArmCell]:
    return [ArmCell(a, s, table.run(a, s), 1.0) for s in table.seeds for a in table.arms]


def test_rows_are_the_metrics_and_differences_are_paired() -> None:
    table = Coins()
    made = cells(table)
    summary = summarise_arms(ARMS, table.seeds, made)
    rows = {row.arm: row for row in summary.rows}
    assert summary.sites == ("north", "south", MEAN) and summary.cells == summary.wanted == 9
    reference = {
        "accuracy": lambda y, p: np.mean((p >= 0.5) == y),
        "balanced_accuracy": lambda y, p: balanced_accuracy_score(y, p >= 0.5),
        "auroc": roc_auc_score,
    }
    for name, row in rows.items():
        own = [cell for cell in made if cell.arm.name == name]
        for metric, measure in reference.items():
            by_site = {
                site: np.mean([measure(*cell.outcome.predictions[site][:2]) for cell in own])
                for site in ("north", "south")
            }
            for site, value in by_site.items():
                assert row.values[site][metric].value == pytest.approx(value)
            found = row.values[MEAN][metric]
            assert found.value == pytest.approx(np.mean(list(by_site.values())))
            assert found.low < found.value < found.high
            assert row.gap[metric].value == pytest.approx(by_site["north"] - by_site["south"])
    gain = rows["better"].differences["south"]["accuracy"]
    assert gain.low > 0.1 and gain.p_holm is not None and gain.p <= gain.p_holm < 0.05
    assert gain.higher == gain.seeds == 3 and gain.effect is not None and gain.effect > 1
    nothing = rows["same"].differences["south"]["auroc"]
    assert (nothing.value, nothing.low, nothing.high, nothing.higher) == (0, 0, 0, 0)
    assert nothing.effect is None and not rows["plain"].differences
    assert rows["plain"].facts["images"] == tuple(
        cell.outcome.facts["images"] for cell in made if cell.arm.name == "plain"
    )
    assert len(set(rows["plain"].facts["images"])) == 3


def test_counts_stand_for_each_seed_and_other_facts_as_their_mean(tmp_path: Path) -> None:
    table = Coins()
    made = [
        replace(
            cell,
            outcome=replace(cell.outcome, facts={**cell.outcome.facts, "share": (seed + 1) / 7}),
        )
        for seed, cell in enumerate(cells(table))
    ]
    write_page(summarise_arms(ARMS[:1], table.seeds, made), table.about, tmp_path)
    page = (tmp_path / "README.md").read_text()
    counts = [f"{cell.outcome.facts['images']:.0f}" for cell in made if cell.arm.name == "plain"]
    shares = [cell.outcome.facts["share"] for cell in made if cell.arm.name == "plain"]
    assert f"| plain | {', '.join(counts)} | {np.mean(shares):.4g} |" in page


def test_findings_claim_what_exceeds_its_interval_only() -> None:
    table = Coins()
    made = cells(table)
    said = findings(summarise_arms(ARMS, table.seeds, made), table.about.claims)
    rises, falls = said.split("It falls")
    assert said.endswith("after Holm's correction, gaps by their own interval alone.")
    assert "has the published sign, beyond its interval, in 1 of 2 (better +" in rises
    assert "in 1 of 2 it is not told from 0 (the largest such: same +0.000" in rises
    assert "reversed, beyond its interval, in 1 of 1 (better +" in falls
    assert "Home is easier. Here: **accuracy** gap" in falls
    part = findings(summarise_arms(ARMS, table.seeds, made[:1]), table.about.claims)
    assert part.startswith("**1 of 9 cells have run.**") and "Home is easier. Here: " in part
    # One seed has an interval of its own, and says nothing.
    assert "1 of 1 have run in fewer than 3 seeds and tell nothing yet" in part
    assert "sign" not in part.split("Home is easier")[1]
    assert "It rises" not in part and "It falls" not in part


def test_an_arm_is_compared_on_the_seeds_that_both_have() -> None:
    table = Coins()
    made = [cell for cell in cells(table) if (cell.arm.name, cell.seed) != ("plain", 1)]
    row = next(r for r in summarise_arms(ARMS, table.seeds, made).rows if r.arm == "better")
    one, other = (
        np.mean([roc_auc_score(*c.outcome.predictions["north"][:2]) for c in made
                 if c.arm.name == name and c.seed != 1])
        for name in ("better", "plain")
    )  # fmt: skip
    assert row.seeds == 3 and row.differences["north"]["auroc"].seeds == 2
    assert row.differences["north"]["auroc"].value == pytest.approx(one - other)


def test_shards_make_the_page_and_finished_cells_are_kept(tmp_path: Path) -> None:
    table = Coins()
    make_arm_table(table, request(tmp_path, (1, 2)))
    assert json.loads((tmp_path / "table.json").read_text())["cells"] == 4
    made = make_arm_table(table, request(tmp_path, (2, 2)))
    assert made.cells == made.wanted == 9 == len(set(table.runs)) == len(table.runs)
    page = (tmp_path / "README.md").read_text()
    assert "| better | 3 | 65.6 | " in page and "9 of 9 cells" in page
    assert b"<svg" in (tmp_path / "differences.svg").read_bytes()
    with (tmp_path / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * 3 * 3
    assert {line["difference"] for line in lines if line["arm"] == "plain"} == {""}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["data"] == {"north": "digest"} and manifest["seeds"] == [0, 1, 2]
    split = manifest["splits"]["seed-0"]
    assert split["north"]["test"] == 3
    assert split["north"]["test_patients"] == hashlib.sha256(b"p1\np2").hexdigest()[:16]
    with (tmp_path / "splits.csv").open() as file:
        assert list(csv.reader(file)) == [
            ["split", "site", "test patient"],
            ["seed-0", "north", "p1"],
            ["seed-0", "north", "p2"],
            ["seed-0", "south", "p7"],
        ]
    assert manifest["versions"]["torch"] and manifest["machine"]["cores"] >= 1


def test_an_interrupted_table_writes_what_has_finished(tmp_path: Path) -> None:
    def stop(event: dict[str, object]) -> None:
        if event.get("task") == "cells" and event["done"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_arm_table(Coins(), request(tmp_path, events=Events(listeners=[stop])))
    assert "**2 of 9 cells have run.**" in (tmp_path / "README.md").read_text()


def test_every_table_has_a_maker_and_real_data_must_be_named(tmp_path: Path) -> None:
    assert all(callable(maker(name)) for name in TABLES)
    with pytest.raises(DataMissingError, match="table coins uses real data"):
        _ = request(tmp_path).real_data
    with pytest.raises(ConfigurationError, match="3/2"):
        make_arm_table(Coins(), request(tmp_path, (3, 2)))
