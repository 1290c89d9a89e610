from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import gaussian_kde, wasserstein_distance

from sonofed_common.contract.errors import ConfigurationError, DataMissingError
from sonofed_common.contract.records import from_bytes
from sonofed_common.models.classifiers import build_classifier
from sonofed_common.runtime import SILENT
from sonofed_simulations.report.view import SourceView
from sonofed_simulations.tables import adaptation_ablation, maker, redrawn
from sonofed_simulations.tables.ablation_points import AblationSettings
from sonofed_simulations.tables.adaptation_homogenisation import found_text as said_of_moves
from sonofed_simulations.tables.adaptation_reconstruction import found_text as said_of_drops
from sonofed_simulations.tables.archive import ARCHIVE, unpack
from sonofed_simulations.tables.article import Article, write_article
from sonofed_simulations.tables.distances import overlap, wasserstein
from sonofed_simulations.tables.redrawn import BLUR, SOURCE, Cells, Redrawn, measure
from sonofed_simulations.tables.redrawn_drops import drops_of, effects_of, means_of
from sonofed_simulations.tables.redrawn_moves import Key, Moved, mean_moves, measured_of
from sonofed_simulations.tables.redrawn_moves import moves_of as moves_of_measured
from sonofed_simulations.tables.redrawn_settings import RedrawnSettings
from sonofed_simulations.tables.request import Request
from sonofed_simulations.tables.settings import SelectionTable

PAGES = Path(__file__).parents[2] / "docs" / "results"
TINY = Path(__file__).parents[1] / "integration" / "tiny.toml"
VALUES = st.lists(st.floats(-1, 1), min_size=3, max_size=12)


@given(VALUES, VALUES, st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_the_distance_of_weighted_samples_is_scipys(
    one: list[float], two: list[float], seed: int
) -> None:
    draws = np.random.default_rng(seed)
    weights = [draws.integers(1, 4, (3, len(x))).astype(np.float64) for x in (one, two)]
    found = wasserstein(np.array(one), weights[0], np.array(two), weights[1])
    expected = [wasserstein_distance(one, two, u, v) for u, v in zip(*weights, strict=True)]
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_overlap_is_the_area_under_both_densities() -> None:
    draws = np.random.default_rng(0)
    one, two = draws.normal(0, 1, 60), draws.normal(1, 2, 50)
    ones = np.ones((1, 60)), np.ones((1, 50))
    grid = np.linspace(-15, 15, 6000)
    low = np.minimum(gaussian_kde(one)(grid), gaussian_kde(two)(grid))
    assert overlap(one, ones[0], two, ones[1])[0] == pytest.approx(
        np.trapezoid(low, grid), abs=1e-3
    )
    assert overlap(one, ones[0], one, ones[0])[0] == pytest.approx(1, abs=1e-3)
    assert overlap(one, ones[0], two + 50, ones[1])[0] == pytest.approx(0, abs=1e-6)
    # A sample without its second half is as if that were not there, at the same bandwidth.
    half = np.repeat([[1.0, 0.0]], 30, axis=1)
    assert overlap(one, half, one[:30], np.ones((1, 30)))[0] > 0.9


def cell(
    site: str,
    way: str,
    seed: int,
    quality: float,
    before: Sequence[float],
    after: Sequence[float],
) -> Redrawn:
    count = len(before)
    spread = np.linspace(-0.05, 0.05, count)
    values = {
        "ssim": quality + spread,
        "psnr": 20 + 10 * quality + spread,
        "feature_distance": 1 - quality + spread,
    }
    patients = tuple(f"{site}-{n // 2}" for n in range(count))
    return Redrawn(site, way, seed, patients, values, np.array(before), np.array(after), 1.0)


def cells(north_quality: float, north_after: float) -> Cells:
    source = np.linspace(0.7, 0.9, 40).tolist()
    before, after = (np.linspace(x - 0.1, x + 0.1, 40).tolist() for x in (0.4, north_after))
    found: dict[tuple[str, str], list[Redrawn]] = {}
    for way, seeds in (("default", (0, 1)), (BLUR, (0,))):
        for seed in seeds:
            moved = after if way == "default" else before
            for one in (
                cell(SOURCE, way, seed, 0.8, source, source),
                cell("north", way, seed, north_quality, before, moved),
            ):
                found.setdefault((way, one.site), []).append(one)
    return found


def moves_of(found: Cells) -> dict[Key, Moved]:
    return moves_of_measured(measured_of(found))


def test_quality_is_compared_with_the_source_way_by_way() -> None:
    means = means_of(cells(0.6, 0.8))
    drops = drops_of(means)
    assert means["default", "north", "ssim"][0] == pytest.approx(0.6)
    assert drops["default", "north", "psnr"].value == pytest.approx(-2)
    assert drops["default", "north", "feature_distance"].value == pytest.approx(0.2)
    assert all(found.p_holm < 0.05 for found in drops.values())
    said = said_of_drops(drops)
    assert "SSIM is worse at 1 of 1 (north -0.200" in said
    assert "feature distance is worse at 1 of 1 (north +0.200" in said
    assert "Of the 3 drops under diffusion, 3 stand under the blur too" in said
    assert "as published**: no hospital has run" in said


def test_a_drop_is_told_beside_the_spread_of_the_images() -> None:
    found = dict(cells(0.6, 0.8))
    # One seed of three has the hospital above the source.
    third = cell("north", "default", 2, 0.9, [0.4] * 40, [0.8] * 40)
    found["default", "north"] = [*found["default", "north"], third]
    source = cell(SOURCE, "default", 2, 0.8, [0.8] * 40, [0.8] * 40)
    found["default", SOURCE] = [*found["default", SOURCE], source]
    effect = effects_of(found)["default", "north", "ssim"]
    spread = np.linspace(-0.05, 0.05, 40).std(ddof=1)
    assert effect.d == pytest.approx((0.7 - 0.8) / spread)
    assert (effect.higher, effect.pairs) == (1, 3)
    assert effects_of(found)[BLUR, "north", "ssim"].d == pytest.approx(-0.2 / spread)


def test_quality_that_does_not_differ_is_level() -> None:
    said = said_of_drops(drops_of(means_of(cells(0.8, 0.8))))
    assert "SSIM is level at 1 of 1" in said and "is worse" not in said
    assert "Of the 0 drops" in said


def test_a_hospital_that_lands_on_the_source_came_nearer() -> None:
    moves = moves_of(cells(0.8, 0.8))
    near = moves["default", "north", "Wasserstein-1"]
    assert near.before == pytest.approx(0.4) and near.after == pytest.approx(0)
    assert near.change.value == pytest.approx(-0.4) and near.change.high < -0.3
    assert near.both == pytest.approx(0)
    shares = moves["default", "north", "overlap"]
    assert shares.before < 0.05 and shares.after == pytest.approx(1, abs=1e-3)
    still = moves[BLUR, "north", "Wasserstein-1"].change
    assert (still.value, still.low, still.high) == (0, 0, 0)
    said = said_of_moves(moves)
    assert "larger than its interval at 1 of 1 (north -0.400" in said
    assert "it is not told from 0 at 1 of 1 (north +0.000" in said
    assert "Of the 2 approaches under diffusion, 0 stand under the blur too" in said


def test_a_hospital_that_drifts_off_is_told_as_reversed() -> None:
    said = said_of_moves(moves_of(cells(0.8, 0.1)))
    assert "reversed, beyond its interval, at 1 of 1" in said and "no hospital comes nearer" in said


def test_a_way_that_moves_source_and_hospital_alike_changes_nothing() -> None:
    source, north = (np.linspace(x - 0.1, x + 0.1, 40) for x in (0.8, 0.4))
    moved = {
        ("default", site): [cell(site, "default", 0, 0.8, before, before - 0.4)]
        for site, before in ((SOURCE, source), ("north", north))
    }
    found = moves_of(moved)["default", "north", "Wasserstein-1"]
    assert found.change.value == pytest.approx(0.4) and found.shared.value == pytest.approx(0)
    assert found.shared.low <= 0 <= found.shared.high
    said = said_of_moves(moves_of(moved))
    assert said.index("it is not told from 0 at 1 of 1") < said.index("reversed")


def test_changes_are_paired_by_seed_and_their_mean_by_hospital() -> None:
    source = np.linspace(0.7, 0.9, 40)
    ends = {"north": (0.5, 0.6, 0.8), "south": (0.4, 0.4, 0.3), "west": (0.5, 0.5, 0.5)}
    found = {
        ("default", SOURCE): [cell(SOURCE, "default", s, 0.8, source, source) for s in (0, 1, 2)]
    }
    for site, means in ends.items():
        found["default", site] = [
            cell(site, "default", seed, 0.8, source - 0.4, source - 0.8 + mean)
            for seed, mean in enumerate(means)
        ]
    # Equal shapes lie as far apart as their means do.
    changes = {site: 0.8 - np.array(means) - 0.4 for site, means in ends.items()}
    moves = moves_of(found)
    north = moves["default", "north", "Wasserstein-1"].change_effect
    own = changes["north"]
    assert north.d == pytest.approx(own.mean() / own.std(ddof=1))
    assert (north.higher, north.pairs) == (0, 3)
    assert moves["default", "west", "Wasserstein-1"].change.value == pytest.approx(-0.1)
    mean = mean_moves(measured_of(found))["default", "Wasserstein-1"]
    over = np.array([change.mean() for change in changes.values()])
    assert mean.change.value == pytest.approx(over.mean()) and mean.before == pytest.approx(0.4)
    assert mean.change_effect.d == pytest.approx(over.mean() / over.std(ddof=1))
    assert (mean.change_effect.higher, mean.change_effect.pairs) == (1, 3)


def test_two_seeds_have_no_spread_worth_dividing_by() -> None:
    effect = moves_of(cells(0.8, 0.8))["default", "north", "Wasserstein-1"].change_effect
    assert effect.d is None and (effect.higher, effect.pairs) == (0, 2)


def test_the_pages_effects_are_those_of_their_archives(tmp_path: Path) -> None:
    name = "adaptation-homogenisation"
    shutil.copy(PAGES / name / ARCHIVE, tmp_path / ARCHIVE)
    unpack(tmp_path)
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for path in (tmp_path / "work").rglob("*.safetensors"):
        arrays = from_bytes(path.read_bytes()).arrays
        seed = int(path.parent.parent.name.removeprefix("seed-"))
        found[path.parent.name, path.stem, seed] = arrays
    with (PAGES / name / "table.csv").open(encoding="utf-8") as file:
        moved = list(csv.DictReader(file))
    told = [r for r in moved if r["distance"] == "Wasserstein-1" and r["pairs_of"] == "seeds"]
    assert len(told) == 12
    for row in told:
        way, site = row["redrawn"], row["hospital"]
        changes, both = [], []
        for seed in sorted(s for w, where, s in found if (w, where) == (way, site)):
            own, source = found[way, site, seed], found[way, SOURCE, seed]
            before = wasserstein_distance(own["before"], source["before"])
            changes.append(wasserstein_distance(own["after"], source["before"]) - before)
            both.append(wasserstein_distance(own["after"], source["after"]) - before)
        if way == BLUR:
            assert len(changes) == 1 and row["change_d"] == row["shared_d"] == ""
            continue
        for part, steps in (("change", np.array(changes)), ("shared", np.array(both))):
            assert float(row[f"{part}_d"]) == pytest.approx(
                steps.mean() / steps.std(ddof=1), abs=1e-4, rel=1e-3
            )
            assert int(row[f"{part}_higher"]) == (steps > 0).sum()
    with (PAGES / "adaptation-reconstruction" / "table.csv").open(encoding="utf-8") as file:
        drops = [row for row in csv.DictReader(file) if row["site"] != SOURCE]
    assert len(drops) == 36
    for row in drops:
        seeds = sorted(s for w, site, s in found if (w, site) == (row["redrawn"], row["site"]))
        one, two = (
            np.mean([found[row["redrawn"], site, s][row["measure"]] for s in seeds], axis=0)
            for site in (row["site"], SOURCE)
        )
        spread = np.sqrt((np.var(one, ddof=1) + np.var(two, ddof=1)) / 2)
        assert len(one) == len(two) and float(row["over_source_d"]) == pytest.approx(
            (one.mean() - two.mean()) / spread, abs=1e-4
        )


def test_a_way_without_the_sources_cells_has_no_distance() -> None:
    found = dict(cells(0.8, 0.8))
    del found["default", SOURCE]
    assert {way for way, _, _ in moves_of(found)} == {BLUR}


def test_each_image_is_measured_by_itself() -> None:
    model = build_classifier("resnet18", pretrained=False).eval()
    images = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    redrawn = images.clone()
    redrawn[2] = 1 - redrawn[2]
    source = SourceView(model.features(images).detach().numpy())
    found = measure(images, redrawn, model, source)
    assert found["ssim"][:2] == pytest.approx([1, 1]) and found["ssim"][2] < 0.5
    error = float((images[2] - redrawn[2]).square().mean())
    assert found["psnr"][2] == pytest.approx(-10 * np.log10(error), abs=1e-3)
    assert found["feature_distance"][:2] == pytest.approx([0, 0], abs=1e-5)
    assert found["before"][:2] == pytest.approx(found["after"][:2])
    assert found["before"][2] != found["after"][2]


def test_a_page_holds_its_numbers_and_figures(tmp_path: Any) -> None:
    rows = [{"site": "north", "value": 0.25}, {"site": "south", "value": None}]
    article = Article(
        "Title", "a work", "It holds.", {"Numbers": ["| a |"]}, ("so",), ("that",), rows,
        {"one.svg": b"<svg/>"},
    )  # fmt: skip
    write_article(article, tmp_path)
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert page.startswith("# Title\n\nAfter a work.\n\nIt holds.\n\n## Numbers\n\n| a |\n")
    assert page.index("- so") < page.index("## What is adapted") < page.index("- that")
    assert (tmp_path / "table.csv").read_text() == "site,value\nnorth,0.25000\nsouth,\n"
    assert (tmp_path / "one.svg").read_bytes() == b"<svg/>"


@pytest.mark.slow
def test_the_full_forms_are_made_whole_and_share_their_cells(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny = RedrawnSettings(scenario=str(TINY), image_size=32, images=6, seeds=(0, 1), epochs=2)
    monkeypatch.setattr(redrawn, "FULL", tiny)
    forms = {"source": tiny, "splits": SelectionTable(scenario=tiny.scenario, seeds=(0,), folds=2)}
    monkeypatch.setattr(adaptation_ablation, "FULL", AblationSettings.model_validate(forms))
    out = tmp_path / "out"
    before: dict[Path, int] = {}
    for name in ("adaptation-reconstruction", "adaptation-homogenisation", "adaptation-ablation"):
        made = maker(name)(Request(name, False, out, tmp_path, (1, 1), SILENT))
        assert made.cells == made.wanted > 0
        page = (out / "README.md").read_text()
        assert "the classifier for 2 epochs and the diffusion for 1, at 32 px" in page
        cells = {p: p.stat().st_mtime_ns for p in (out / "work/redrawn").rglob("*.safetensors")}
        assert cells and before in ({}, cells)
        before = cells
    assert json.loads((out / "table.json").read_text())["cells"] == 8


@pytest.mark.parametrize("name", ["adaptation-reconstruction", "adaptation-homogenisation"])
def test_what_cannot_be_made_is_refused_before_anything_is_trained(
    name: str, tmp_path: Any
) -> None:
    with pytest.raises(ConfigurationError, match="shard 3/2 does not exist"):
        maker(name)(Request(name, True, tmp_path, None, (3, 2), SILENT))
    with pytest.raises(DataMissingError, match="--data"):
        maker(name)(Request(name, True, tmp_path, None, (1, 1), SILENT))
