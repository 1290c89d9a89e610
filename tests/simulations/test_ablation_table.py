from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sonofed_common.contract.errors import ConfigurationError, DataMissingError
from sonofed_common.contract.records import from_bytes
from sonofed_common.contract.study import Embedding
from sonofed_common.models.classifiers import build_classifier
from sonofed_common.runtime import SILENT
from sonofed_simulations.tables import maker
from sonofed_simulations.tables.ablation import Points, Pooled, Stage, points_of, select
from sonofed_simulations.tables.ablation_points import QUICK
from sonofed_simulations.tables.adaptation_ablation import composition
from sonofed_simulations.tables.adaptation_ablation_page import FULL_METHOD, PARTS, PUBLISHED, about
from sonofed_simulations.tables.archive import ARCHIVE, unpack
from sonofed_simulations.tables.features import SiteFeatures
from sonofed_simulations.tables.flat import FlatEncoder, FlatPredictor, train_flat_round
from sonofed_simulations.tables.request import Request
from sonofed_simulations.tables.start import Start

PAGE = Path(__file__).parents[2] / "docs" / "results" / "adaptation-ablation"
SMALL = Embedding(rounds=1, dimension=8, batch_size=4)


def start() -> Start:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_classifier("shufflenet_v2", pretrained=False)
    centroids = np.eye(2, model.feature_dim, dtype=np.float32)
    return Start("0" * 64, "shufflenet_v2", dict(model.state_dict()), "0" * 64, centroids, 0.5)


def pools() -> dict[str, Pooled]:
    draws = torch.Generator().manual_seed(1)
    found = {}
    for name, count in (("north", 5), ("south", 4)):
        images, redrawn = torch.rand(2, count, 1, 32, 32, generator=draws)
        # The first image of each site is redrawn as it is.
        redrawn[0] = images[0]
        found[name] = Pooled(images, redrawn)
    return found


@pytest.mark.parametrize("flat", [False, True])
def test_images_between_clusters_and_near_the_source_are_chosen(flat: bool) -> None:
    # Two bundles of directions, and two images half-way: only the first of these is source-like.
    turns = np.concatenate([np.linspace(0, 0.2, 20), np.linspace(1.4, 1.6, 20), [0.8, 0.79]])
    z = np.stack([np.cos(turns), np.sin(turns)], axis=1).astype(np.float32)
    r = np.full(42, 0.5, np.float32)
    r[40] = 0.1
    found = select(Points(z, r), 2, 0.05, flat, 0)
    assert found[0] == 40 and 41 in found and len(found) == 2


@pytest.mark.parametrize("flat", [False, True])
def test_the_margin_to_the_second_nearest_of_k_clusters_decides(flat: bool) -> None:
    # Two bundles 60 degrees apart and a third far from both. One lone image is half-way between the
    # first two, and so torn between three clusters, not between two; the other one is between the
    # first and the third, and has the smallest range.
    near, far = np.cos(np.pi / 6), np.sin(np.pi / 6)
    centres = np.array([[near, far, 0.0], [near, -far, 0.0], [0.0, 0.0, 1.0]])
    bundles = np.repeat(centres, 20, axis=0) + np.random.default_rng(0).normal(0, 0.02, (60, 3))
    z = np.concatenate([bundles, [[1.0, 0.0, 0.0], [near, far, 0.8]]])
    z = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    points = Points(z, np.full(62, 0.5, np.float32))
    assert select(points, 3, 0.01, flat, 0).tolist() == [60]
    assert select(points, 2, 0.01, flat, 0).tolist() == [61]


@pytest.mark.parametrize(
    "stage", ["full", "without reconstruction", "without hypersphere", "without contrast"]
)
def test_a_stage_maps_every_image_of_every_site(stage: Stage) -> None:
    found = points_of(stage, start(), pools(), SMALL, 0, SILENT)
    assert len(found.z) == len(found.r) == 9
    lengths = np.linalg.norm(found.z, axis=1)
    assert (np.abs(lengths - 1).max() < 1e-5) == (stage != "without hypersphere")
    assert np.isfinite(found.r).all() and found.r.min() >= 0
    if stage != "without reconstruction":
        assert found.r[[0, 5]].max() < np.delete(found.r, [0, 5]).min()


def test_a_flat_round_draws_reconstructions_to_their_images() -> None:
    student, predictor = FlatEncoder(start().model(), 8, 0), FlatPredictor(8, 0)
    pool, teacher = pools()["north"], copy.deepcopy(student).train()

    def gap() -> float:
        student.train()
        with torch.no_grad():
            predicted = predictor(student(pool.redrawn))
            return float((predicted - teacher(pool.images)).square().mean())

    def spread() -> float:
        student.eval()
        with torch.no_grad():
            return float(student(pool.images).std(0).mean())

    before, apart = gap(), spread()
    settings = Embedding(
        rounds=1, local_epochs=12, batch_size=8, learning_rate=1e-3, teacher_momentum=1.0
    )
    train_flat_round(student, predictor, pool.images, pool.redrawn, settings, 0, 0)
    assert gap() < 0.85 * before
    assert spread() > 0.5 * apart


def features(name: str, labels: list[int]) -> SiteFeatures:
    empty = np.zeros((0, 2), np.float32)
    return SiteFeatures(
        name, empty, np.array(labels), empty, empty, empty, np.zeros(0, np.int64), ()
    )


def test_what_was_chosen_is_counted_at_the_site_whose_pool_it_is_of() -> None:
    sites = [features("north", [0, 1, 1]), features("empty", []), features("south", [1, 0])]
    assert composition(sites, [np.array([4, 0, 2])]) == {
        "labels": 3,
        "labels at north": 2,
        "labels at empty": 0,
        "labels at south": 1,
        "malignant share": pytest.approx(1 / 3),
    }
    drawn = composition(sites, [np.array([0, 1]), np.array([3, 4])])
    assert drawn["labels at north"] == drawn["labels at south"] == 1
    assert drawn["malignant share"] == 0.5


def test_the_pages_composition_sums_to_the_labels_and_is_that_of_its_archive(
    tmp_path: Path,
) -> None:
    shutil.copy(PAGE / ARCHIVE, tmp_path / ARCHIVE)
    unpack(tmp_path)
    rows = json.loads((PAGE / "table.json").read_text(encoding="utf-8"))["rows"]
    assert [row["arm"] for row in rows] == list(PARTS)
    for row in rows:
        facts = row["facts"]
        sites = [values for name, values in facts.items() if name.startswith("labels at ")]
        assert len(sites) == 4
        assert np.sum(sites, axis=0) == pytest.approx(np.array(facts["labels"]))
        assert all(0 < share < 1 for share in facts["malignant share"])
        for seed in range(row["seeds"]):
            path = tmp_path / "work" / "cells" / f"seed-{seed}" / f"{row['arm']}.safetensors"
            kept = from_bytes(path.read_bytes()).config["facts"]
            assert kept == {name: values[seed] for name, values in facts.items()}


def test_the_page_sends_for_savings_to_a_table_of_several_budgets() -> None:
    (said,) = [item for item in about(QUICK).method if "saves against Random" in item]
    assert "one budget" in said and "docs/results/adaptation-selection" in said
    told = json.loads((PAGE.parent / "adaptation-selection" / "table.json").read_text())
    assert [c for c in told["curves"] if f"`{c['strategy']}`" in said and c["saving"] is not None]


def test_every_arm_is_set_against_the_full_method_and_every_claim_has_its_arms() -> None:
    assert PARTS[FULL_METHOD] == ("full", 4)
    claimed = {arm for claim in about(QUICK).claims for arm in claim.arms}
    assert claimed == PARTS.keys() - {FULL_METHOD} and PUBLISHED.keys() <= PARTS.keys()
    # One thing at a time: another stage at the same k, or another k of the same stage.
    for name, part in PARTS.items():
        if part is not None and name != FULL_METHOD:
            assert (part[0] == "full") != (part[1] == 4)


def test_what_cannot_be_made_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    make = maker("adaptation-ablation")
    with pytest.raises(ConfigurationError, match="does not exist"):
        make(Request("adaptation-ablation", True, tmp_path, None, (3, 2), SILENT))
    with pytest.raises(DataMissingError, match="--data"):
        make(Request("adaptation-ablation", True, tmp_path, None, (1, 1), SILENT))
