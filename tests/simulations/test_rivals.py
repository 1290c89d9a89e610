from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.special import entr, softmax
from scipy.stats import beta
from skactiveml.pool import batch_bald as library_batch_bald

from sonofed_simulations.rivals import DUAL_SCORES, TWO_VIEWS, Pool
from sonofed_simulations.rivals import STRATEGIES as ALL
from sonofed_simulations.rivals.batch_bald import JOINT_SAMPLES, batch_bald
from sonofed_simulations.rivals.pool import UNLABELLED, united

FEATURES, PASSES = 12, 6

STRATEGIES = {name: strategy for name, strategy in ALL.items() if name not in TWO_VIEWS}
"""Two views are other features; what chooses among them is of this list."""


def pool(images: int = 40, labelled: int = 8, seed: int = 0, site: str = "north") -> Pool:
    draws = np.random.default_rng(seed)
    embeddings = draws.uniform(0, 2, (images, FEATURES)).astype(np.float32)
    head = draws.normal(size=(2, FEATURES)).astype(np.float32)
    logits = embeddings @ head.T
    noise = draws.normal(scale=0.5, size=(PASSES, images, 2))
    labels = np.full(images, UNLABELLED)
    labels[:labelled] = np.arange(labelled) % 2
    centroids = np.eye(FEATURES, dtype=np.float32)[:3]
    local = logits + draws.normal(scale=0.3, size=logits.shape)
    return Pool(
        site,
        embeddings,
        logits,
        local.astype(np.float32),
        softmax(logits + noise, axis=2).astype(np.float32),
        labels,
        centroids,
    )


def of_points(points: np.ndarray, **changes: object) -> Pool:
    count = len(points)
    even = np.zeros((count, 2), dtype=np.float32)
    plain = Pool(
        "north",
        points.astype(np.float32),
        even,
        even,
        np.full((2, count, 2), 0.5, dtype=np.float32),
        np.full(count, UNLABELLED),
        np.eye(points.shape[1], dtype=np.float32)[:1],
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("labelled", [0, 8])
def test_a_strategy_takes_as_many_unlabelled_images_as_asked_and_repeats(
    name: str, labelled: int
) -> None:
    shown = pool(labelled=labelled)
    before = shown.embeddings.copy(), shown.passes.copy(), shown.labels.copy()
    chosen = STRATEGIES[name].select(shown, 10, seed=3)
    assert chosen.dtype == np.int64 and len(chosen) == len(set(chosen.tolist())) == 10
    assert set(chosen.tolist()) <= set(shown.unlabelled.tolist())
    assert STRATEGIES[name].select(shown, 10, seed=3).tolist() == chosen.tolist()
    after = shown.embeddings, shown.passes, shown.labels
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_can_take_all_that_is_left(name: str) -> None:
    shown = pool(images=20, labelled=4)
    chosen = STRATEGIES[name].select(shown, 16, seed=0)
    assert sorted(chosen.tolist()) == shown.unlabelled.tolist()


def test_random_differs_by_seed() -> None:
    draws = {tuple(STRATEGIES["random"].select(pool(), 10, seed).tolist()) for seed in range(5)}
    assert len(draws) == 5


def test_max_entropy_takes_the_most_uncertain_best_first() -> None:
    margins = np.array([4.0, 0.1, 3.0, 0.0, 2.0])
    logits = np.stack([margins, np.zeros(5)], axis=1)
    shown = of_points(np.eye(5), logits=logits)
    assert STRATEGIES["max-entropy"].select(shown, 3, 0).tolist() == [3, 1, 4]


def test_bald_wants_disagreement_where_entropy_wants_doubt() -> None:
    doubtful = np.full((4, 2), 0.5)
    torn = np.array([[0.95, 0.05], [0.05, 0.95]] * 2)
    sure = np.array([[0.99, 0.01]] * 4)
    passes = np.stack([doubtful, torn, sure], axis=1)
    shown = of_points(np.eye(3), passes=passes)
    assert STRATEGIES["bald"].select(shown, 1, 0).tolist() == [1]


def test_batch_bald_does_not_ask_the_same_question_twice() -> None:
    # Images 0 and 1 always move together, image 2 on its own, a little less.
    first = np.array([0.95, 0.95, 0.05, 0.05])
    second = np.array([0.9, 0.1, 0.9, 0.1])
    positive = np.stack([first, first, second], axis=1)
    passes = np.stack([positive, 1 - positive], axis=2)
    shown = of_points(np.eye(3), passes=passes)
    assert set(STRATEGIES["batch-bald"].select(shown, 2, 0).tolist()) & {0, 1}
    assert 2 in STRATEGIES["batch-bald"].select(shown, 2, 0).tolist()
    assert 2 not in STRATEGIES["bald"].select(shown, 2, 0).tolist()


@pytest.mark.parametrize("classes", [2, 3])
def test_batch_bald_picks_what_the_library_picks(classes: int) -> None:
    draws = np.random.default_rng(classes)
    passes = softmax(
        2 * draws.normal(size=(40, classes)) + draws.normal(size=(10, 40, classes)), axis=2
    )
    passes[:, 5:8] = passes[:, :3]
    utilities = library_batch_bald(passes.copy(), 25, JOINT_SAMPLES, random_state=7)
    found = batch_bald(passes, 25, 7)
    # What the library has picked has no utility in its later rows.
    for done, utility in enumerate(utilities):
        assert set(np.flatnonzero(np.isnan(utility))) == set(found[:done])
    assert utilities[-1][found[-1]] == np.nanmax(utilities[-1])


def blobs(sizes: tuple[int, ...], spread: float = 0.05) -> np.ndarray:
    draws = np.random.default_rng(1)
    centres = 1 + 4 * np.eye(len(sizes), 6)
    parts = [
        c + draws.normal(scale=spread, size=(n, 6)) for c, n in zip(centres, sizes, strict=True)
    ]
    return np.concatenate(parts)


def test_core_set_covers_better_than_chance() -> None:
    points = blobs((50, 5, 3, 2))
    chosen = STRATEGIES["core-set"].select(of_points(points), 4, 0)
    assert cdist(points, points[chosen]).min(axis=1).max() < 1
    drawn = STRATEGIES["random"].select(of_points(points), 4, 0)
    assert cdist(points, points[drawn]).min(axis=1).max() > 1


def test_typiclust_takes_one_dense_image_of_each_cluster_and_skips_covered_ones() -> None:
    points = blobs((20, 20, 20))
    # The last of each cluster is far off its centre.
    points[[19, 39, 59]] += 0.6
    shown = of_points(points)
    chosen = STRATEGIES["typiclust"].select(shown, 3, 0)
    assert sorted((chosen // 20).tolist()) == [0, 1, 2]
    assert not {19, 39, 59} & set(chosen.tolist())
    labels = shown.labels.copy()
    labels[0] = 1
    more = STRATEGIES["typiclust"].select(replace(shown, labels=labels), 2, 0)
    assert sorted((more // 20).tolist()) == [1, 2]


def test_probcover_covers_the_largest_group_first() -> None:
    points = blobs((6, 30))
    assert STRATEGIES["probcover"].select(of_points(points), 2, 0)[0] >= 6


def test_clue_goes_where_the_doubt_is() -> None:
    points = blobs((20, 20))
    logits = np.zeros((40, 2))
    logits[:20, 0] = 12.0
    shown = of_points(points, logits=logits)
    assert (STRATEGIES["clue"].select(shown, 3, 0) >= 20).sum() >= 2


def test_badge_starts_with_the_largest_gradient() -> None:
    points = np.ones((5, 4))
    points[2] *= 10
    logits = np.stack([np.full(5, 0.1), np.zeros(5)], axis=1)
    assert STRATEGIES["badge"].select(of_points(points, logits=logits), 2, 0)[0] == 2


def test_vaal_avoids_what_looks_labelled() -> None:
    points = blobs((30, 30))
    labels = np.full(60, UNLABELLED)
    labels[:10] = 0
    chosen = STRATEGIES["vaal"].select(of_points(points, labels=labels), 10, 0)
    assert (chosen >= 30).mean() > 0.8


def test_lfosa_takes_what_is_surely_known() -> None:
    draws = np.random.default_rng(0)
    largest = np.concatenate([draws.normal(1, 0.1, 20), draws.normal(5, 0.1, 20)])
    logits = np.stack([largest, np.zeros(40)], axis=1)
    chosen = STRATEGIES["lfosa"].select(of_points(np.eye(40), logits=logits), 10, 0)
    assert (chosen >= 20).all()


def test_feal_passes_over_neighbours_of_what_it_took() -> None:
    # Five images in one direction, all most uncertain, and three alone.
    points = np.concatenate([np.tile(np.eye(4)[:1], (5, 1)), np.eye(4)[1:]])
    logits = np.zeros((8, 2))
    logits[5:, 0] = [1.0, 2.0, 3.0]
    # The last is nearly certain: without it every other would be calibrated alike.
    shown = of_points(points, logits=logits, local_logits=logits)
    chosen = STRATEGIES["feal"].select(shown, 3, 0).tolist()
    assert chosen[0] < 5 and chosen[1:] == [5, 6]


def test_feal_calibrates_both_heads_aleatoric_uncertainty_by_the_common_epistemic_one() -> None:
    common = np.array([[3.0, 2.6], [2.5, 1.2], [2.3, 1.1], [3.5, 0.3]])
    local = np.array([[1.9, 2.4], [3.8, 2.7], [0.0, 3.0], [2.2, 2.2]])
    draws = np.random.default_rng(0)

    def aleatoric(logits: np.ndarray) -> np.ndarray:
        return np.array([entr(draws.dirichlet(x + 1, 200_000)).sum(1).mean() for x in logits])

    # Two classes: the entropy of the distribution of one chance.
    epistemic = np.array([beta.entropy(*(x + 1)) for x in common])
    calibration = (epistemic - epistemic.min()) / np.ptp(epistemic)
    terms = aleatoric(common), aleatoric(local)
    order = np.argsort(-calibration * (terms[0] + terms[1]))[:3]
    for without in (sum(terms), calibration * terms[0], calibration * terms[1], calibration):
        assert np.argsort(-without)[:3].tolist() != order.tolist()
    shown = of_points(np.eye(4), logits=common, local_logits=local)
    assert STRATEGIES["feal"].select(shown, 3, 0).tolist() == order.tolist()


def test_logo_takes_the_most_uncertain_of_each_local_cluster() -> None:
    points = blobs((10, 10))
    logits = np.zeros((20, 2))
    logits[:, 0] = 5.0
    logits[[3, 14], 0] = 0.1
    local = np.tile([1.0, 0.0], (20, 1))
    shown = of_points(points, logits=logits, local_logits=local)
    assert set(STRATEGIES["logo"].select(shown, 2, 0).tolist()) == {3, 14}


def test_kafal_takes_where_the_two_heads_differ() -> None:
    logits = np.zeros((6, 2))
    local = logits.copy()
    local[[1, 4], 0] = [2.0, 4.0]
    shown = of_points(np.eye(6), logits=logits, local_logits=local)
    assert STRATEGIES["kafal"].select(shown, 2, 0).tolist() == [4, 1]


def test_kafal_takes_the_divergence_in_both_directions() -> None:
    common = np.array([[1.6, 1.5], [0.0, -1.3], [-1.2, 0.6]])
    local = np.array([[1.9, -1.9], [0.4, 1.7], [1.2, -0.1]])
    p, q = softmax(local, axis=1), softmax(common, axis=1)
    ways = (p * np.log(p / q)).sum(axis=1), (q * np.log(q / p)).sum(axis=1)
    order = np.argsort(-(ways[0] + ways[1])).tolist()
    assert all(np.argsort(-one_way).tolist() != order for one_way in ways)
    shown = of_points(np.eye(3), logits=common, local_logits=local)
    assert STRATEGIES["kafal"].select(shown, 3, 0).tolist() == order


def test_kafal_weighs_the_classes_that_a_site_knows() -> None:
    logits = np.zeros((4, 2))
    local = logits.copy()
    local[2], local[3] = [1.5, 0.0], [0.0, 1.5]
    # Known images are all of class 1: a gain on the rare class 0 moves their balance further.
    labels = np.array([1, 1, UNLABELLED, UNLABELLED])
    shown = of_points(np.eye(4), logits=logits, local_logits=local, labels=labels)
    assert STRATEGIES["kafal"].select(shown, 1, 0).tolist() == [2]


@pytest.mark.parametrize("name", DUAL_SCORES)
def test_the_dual_score_ranks_all_sites_images_together(name: str) -> None:
    strategy = STRATEGIES[name]
    both = united([pool(seed=1), pool(seed=2, site="south")])
    assert strategy.ranks_globally and both.passes.shape == (PASSES, 80, 2)
    assert both.labels.tolist() == pool().labels.tolist() * 2
    assert len(set(strategy.select(both, 20, 0).tolist())) == 20


def test_near_and_far_pull_to_opposite_ends_of_the_distance_to_the_source() -> None:
    shown = pool(images=200, labelled=0)
    cosine = (shown.unit @ shown.source_centroids.T).max(axis=1)
    near, far = (
        cosine[STRATEGIES[f"dual-margin-{order}"].select(shown, 40, 0)].mean()
        for order in ("near", "far")
    )
    assert near > cosine.mean() > far


def test_only_those_that_look_at_a_sites_own_head_ask_for_one() -> None:
    shown = pool()
    other = replace(shown, local_logits=-shown.local_logits)
    for name, strategy in STRATEGIES.items():
        same = strategy.select(shown, 8, 1).tolist() == strategy.select(other, 8, 1).tolist()
        assert same or strategy.uses_local, name


def test_only_those_that_look_at_draws_of_dropout_ask_for_them() -> None:
    shown = pool()
    without = replace(shown, passes=shown.passes[:0])
    for name, strategy in STRATEGIES.items():
        if not strategy.uses_passes:
            same = strategy.select(without, 8, 1).tolist() == strategy.select(shown, 8, 1).tolist()
            assert same, name
