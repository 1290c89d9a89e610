"""What the sites select together is what the pooled scores would select, image for image."""

from __future__ import annotations

import hashlib
import hmac
from decimal import ROUND_FLOOR, ROUND_HALF_UP, Decimal
from functools import partial
from itertools import pairwise
from math import pi

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonofed_client.adaptation.ranking import interval_counts, keys
from sonofed_client.adaptation.selector import PoolSelector
from sonofed_common.contract.errors import OrderError, ParameterError, QuorumError
from sonofed_common.contract.selection import WHOLE, RankTable, budget_count, part_widths
from sonofed_common.contract.study import Selection
from sonofed_server.phases.refinement import (
    CountRequest,
    rank_table,
    select_federated,
    threshold,
)

NONE = np.empty((0, 2), dtype=np.uint64)


def federated(sites, options: Selection, seed: int = 0, secrets=None) -> list[set[str]]:
    """Run the true exchange; ``sites`` holds lists of (id, u, r), ``secrets`` one of each site.

    With strategy ``entropy`` u is what predictions lack to the largest one.
    """
    secrets = secrets or [None] * len(sites)
    selectors = [
        PoolSelector(
            [i for i, _, _ in site],
            options,
            seed,
            np.array([u for _, u, _ in site], dtype=np.float32),
            np.array([r for _, _, r in site], dtype=np.float32),
            secret,
            np.array([u for _, u, _ in site], dtype=np.float64),
        )
        for site, secret in zip(sites, secrets, strict=True)
    ]

    def count(request: CountRequest):
        total = np.zeros((len(request.edges), request.split), dtype=np.int64)
        for selector in selectors:
            total += selector.counts(
                request.column, request.edges, request.split, request.cuts, request.tied
            )
        return total

    def send_ranks(tables) -> None:
        for selector in selectors:
            selector.set_ranks(tables)

    cuts = select_federated(options, count, send_ranks)
    chosen: list[set[str]] = [set() for _ in options.budgets]
    for selector in selectors:
        for budget, ids in enumerate(selector.select(cuts)):
            assert chosen[budget].isdisjoint(ids)
            chosen[budget] |= set(ids)
    return chosen


def keyed(secret, text) -> str:
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def pooled(sites, options: Selection, seed: int = 0, secrets=None) -> list[set[str]]:
    """Select with every score in one place, in plain Python."""
    secrets = secrets or [None] * len(sites)
    pool = [(i, u, r, s) for s, site in enumerate(sites) for i, u, r in site]

    def score(image):
        i, u, r, _ = image
        if options.strategy == "random":
            digest = hashlib.sha256(f"{seed}\0{options.draw}\0{i}".encode()).digest()
            return int.from_bytes(digest[:8], "little") // 2
        if options.strategy == "entropy":
            return u
        if options.combine == "radians":
            opposite = max(pi - r, 0.0)
            parts = {"near": r, "far": opposite, "both": 2 * min(r, opposite)}
            return u + options.omega * parts[options.distance_order]
        below = sum(other[2] < r for other in pool)
        above = sum(other[2] > r for other in pool)
        parts = {"near": below, "far": above, "both": 2 * min(below, above)}
        return sum(other[1] < u for other in pool) + options.omega * parts[options.distance_order]

    def tie_break(image):
        i, _, _, site = image
        secret = secrets[site]
        return int(i, 16) if secret is None else int(keyed(secret, i)[:16], 16)

    order = sorted(pool, key=lambda image: (score(image), tie_break(image)))
    own = [[image[0] for image in order if image[3] == s] for s in range(len(sites))]

    def size(share: float, images: int) -> int:
        exact = Decimal(repr(share)) * images
        return min(images, max(1, int(exact.to_integral_value(ROUND_HALF_UP))))

    results: list[set[str]] = []
    taken: list[str] = []
    for share in options.budgets:
        if options.scope == "per_site":
            results.append({i for site in own for i in site[: size(share, len(site))]})
            continue
        room = size(share, len(pool))
        best = set()
        if options.scope == "global_with_site_floor":
            for site in own:
                product = Decimal(repr(options.site_floor)) * Decimal(repr(share)) * len(site)
                best |= set(site[: int(product.to_integral_value(ROUND_FLOOR))])
        for candidates in ([i for i, *_ in order if i in best], [i for i, *_ in order]):
            for i in candidates:
                if i not in taken and len(taken) < room:
                    taken.append(i)
        results.append(set(taken))
    return results


def test_which_settings_ask_how_fine_counts() -> None:
    scores = np.random.default_rng(0).random((2, 40)).astype(np.float32)
    ids = [f"{n:016x}" for n in range(40)]
    asked = {}
    own = scores[0].astype(np.float64)
    for scope in ("global", "per_site"):
        for how in ("rank", "radians", "entropy"):
            chosen = {"strategy": how} if how == "entropy" else {"combine": how}
            options = Selection(scope=scope, budgets=(0.25,), **chosen)
            selector = PoolSelector(ids, options, 0, *scores, informativeness=own)
            alone = set()

            def count(request: CountRequest, selector=selector, alone=alone):
                counts = selector.counts(
                    request.column, request.edges, request.split, request.cuts, request.tied
                )
                widths = part_widths(request.edges, request.split)
                for interval, part in np.argwhere(counts == 1):
                    low = request.edges[interval, 0] + np.uint64(part) * widths[interval]
                    alone.add((request.column, int(low)))
                return counts

            select_federated(options, count, selector.set_ranks)
            asked[scope, how] = {c: sum(k == c for k, _ in alone) for c, _ in alone}
    # With ranks every image stands alone in some interval of either score, in any scope.
    for scope in ("global", "per_site"):
        assert min(asked[scope, "rank"][c] for c in ("uncertainty", "representativeness")) >= 40
    for how in ("radians", "entropy"):
        assert asked["global", how].keys() == {"informativeness"}
        assert asked["per_site", how] == {}
    # Only what lies around the threshold is split further: most images never stand alone.
    assert asked["global", "entropy"]["informativeness"] < 40


angle = st.floats(0, float(np.nextafter(np.float32(pi), np.float32(0))), width=32)
tied = st.sampled_from([0.0, 0.5, float(np.float32(1.1)), float(np.float32(np.pi))])
identity = st.integers(0, 2**64 - 1) | st.integers(0, 5) | st.integers(2**64 - 6, 2**64 - 1)


@st.composite
def pools(draw):
    column = draw(st.sampled_from([angle, tied, angle | tied]))
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 5, 17]), max_size=5))
    ids = draw(st.lists(identity, min_size=sum(sizes), max_size=sum(sizes), unique=True))
    images = [(f"{i:016x}", draw(column), draw(column)) for i in ids]
    ends = np.cumsum([0, *sizes])
    return [images[a:b] for a, b in pairwise(ends)]


options_of_a_study = st.builds(
    Selection,
    strategy=st.sampled_from(["dual_score", "dual_score", "dual_score", "entropy", "random"]),
    distance_order=st.sampled_from(["near", "far", "both"]),
    combine=st.sampled_from(["rank", "radians"]),
    omega=st.sampled_from([0.0, 0.5, 1.0, 2.0, 0.3]),
    budgets=st.sets(
        st.sampled_from([0.01, 0.1, 0.2, 0.25, 0.3, 0.5, 0.55, 0.8, 1.0]), min_size=1, max_size=4
    ).map(lambda chosen: tuple(sorted(chosen))),
    scope=st.sampled_from(["global", "per_site", "global_with_site_floor"]),
    site_floor=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    draw=st.integers(0, 3),
)


@settings(max_examples=150, deadline=None)
@given(pools(), options_of_a_study, st.integers(0, 9))
def test_federated_equals_pooled_element_for_element(sites, options, draw) -> None:
    # Of a tenth of the examples no site has a secret; of the others each has its own.
    secrets = [f"{draw} {n}".encode() if draw else None for n in range(len(sites))]
    chosen = federated(sites, options, 7, secrets)
    assert chosen == pooled(sites, options, 7, secrets)
    images = sum(map(len, sites))
    for share, small, large in zip(options.budgets, chosen, [*chosen[1:], None], strict=True):
        assert large is None or small <= large
        if options.scope != "per_site":
            assert len(small) == budget_count(share, images)


def found_in(selector, column, whole, tied=None) -> dict[int, int]:
    """Keys of a column and how many images have each, by bisection as a curious coordinator may."""
    found, waiting = {}, [(int(whole[0, 0]), int(whole[0, 1]) or 2**64)]
    while waiting:
        low, high = waiting.pop()
        edges = np.array([[low, high % 2**64]], dtype=np.uint64)
        counts = selector.counts(column, edges, 256, NONE, tied)[0]
        width = -(-(high - low) // 256)
        for part in np.flatnonzero(counts).tolist():
            start = low + part * width
            end = min(start + width, high)
            if end - start == 1:
                found[start] = int(counts[part])
            else:
                waiting.append((start, end))
    return found


def test_no_question_tells_an_id() -> None:
    scores = np.random.default_rng(0).random((2, 6)).astype(np.float32)
    ids = [f"{n:016x}" for n in (3, 99, 10**6, 10**12, 2**63, 2**64 - 1)]
    options = Selection(combine="radians")
    told = []
    for secret in (b"north, trial", b"north, other"):
        selector = PoolSelector(ids, options, 3, scores[0], scores[1], secret)
        keys_of = found_in(selector, "informativeness", WHOLE["informativeness"])
        identities = [found_in(selector, "identity", WHOLE["identity"], key) for key in keys_of]
        told.append({f"{n:016x}" for one in identities for n in one})
        assert len(told[-1]) == 6
    # Neither an id nor anything that two studies could be joined by.
    assert told[0].isdisjoint(ids) and told[0].isdisjoint(told[1])


def test_a_table_that_would_make_ties_is_refused() -> None:
    scores = np.random.default_rng(0).random((2, 6)).astype(np.float32)
    ids = [f"{n:016x}" for n in range(6)]
    selector = PoolSelector(ids, Selection(), 0, scores[0], scores[1])
    honest = {}
    for column, own in zip(("uncertainty", "representativeness"), scores, strict=True):
        honest[column] = rank_table(partial(interval_counts, keys(own)), WHOLE[column])
    joined = RankTable(np.zeros(1, dtype=np.uint64), np.array([0, 6]))
    starts = honest["uncertainty"].starts
    two = RankTable(starts[[0, 1, 2, 4, 5]], np.array([0, 1, 2, 4, 5, 6]))
    for forged in (joined, two):
        with pytest.raises(ParameterError, match="another pool"):
            selector.set_ranks({**honest, "uncertainty": forged})
    # Six images of one score where the pool is said to hold five.
    tied = PoolSelector(ids, Selection(), 0, np.zeros(6, dtype=np.float32), scores[1])
    few = RankTable(np.zeros(1, dtype=np.uint64), np.array([0, 5]))
    with pytest.raises(ParameterError, match="another pool"):
        tied.set_ranks({**honest, "uncertainty": few})
    tied.set_ranks({**honest, "uncertainty": joined})
    selector.set_ranks(honest)


def test_a_larger_pool_needs_few_queries() -> None:
    generator = np.random.default_rng(0)
    scores = generator.uniform(0, 1, (2000, 2)).astype(np.float32)
    images = [(f"{generator.integers(2**63):016x}", float(u), float(r)) for u, r in scores]
    sites = [images[:300], images[300:301], images[301:]]
    options = Selection(budgets=(0.1, 0.2))
    assert federated(sites, options) == pooled(sites, options)

    asked = 0

    def query(edges, split):
        nonlocal asked
        asked += 1
        return interval_counts(keys(scores[:, 0].copy()), edges, split)

    table = rank_table(query, WHOLE["uncertainty"])
    assert asked <= 5
    below, above = table.ranks(keys(scores[:, 0].copy()))
    assert below.tolist() == [int((scores[:, 0] < s).sum()) for s in scores[:, 0]]
    assert above.tolist() == [int((scores[:, 0] > s).sum()) for s in scores[:, 0]]


def test_more_crowded_bins_than_one_query_may_ask_for() -> None:
    width = (int(WHOLE["uncertainty"][0, 1]) - 1) // 65536 + 1
    crowded = np.arange(40000, dtype=np.uint64) * np.uint64(width)
    values = np.concatenate([crowded, crowded + np.uint64(1), crowded + np.uint64(1)])

    def query(edges, split):
        assert edges.shape[0] * split <= 65536
        return interval_counts(values, edges, split)

    below, above = rank_table(query, WHOLE["uncertainty"]).ranks(values)
    ordered = np.sort(values)
    assert np.array_equal(below, np.searchsorted(ordered, values, side="left"))
    assert np.array_equal(above, len(values) - np.searchsorted(ordered, values, side="right"))


def test_random_draws_differ_and_repeat() -> None:
    site = [(f"{i:016x}", 0.0, 0.0) for i in range(100)]
    first, second = (Selection(strategy="random", draw=d) for d in (0, 1))
    assert federated([site], first) == federated([site[:40], site[40:]], first)
    assert federated([site], first) != federated([site], second)


def test_identical_ids_at_the_border_are_left_out_rather_than_overspent() -> None:
    copies = [[("000000000000000a", 0.5, 0.5)], [("000000000000000a", 0.5, 0.5)]]
    assert federated(copies, Selection(budgets=(0.5,))) == [set()]


@given(st.lists(st.floats(0, 4, width=32), min_size=2, max_size=20))
def test_keys_keep_the_order_of_scores(values) -> None:
    scores = np.array(values, dtype=np.float32)
    for wide in (scores, scores.astype(np.float64) / 3):
        mapped = keys(wide)
        assert np.array_equal(wide[:, None] < wide, mapped[:, None] < mapped)


def test_negative_zero_is_zero() -> None:
    assert keys(np.array([-0.0], dtype=np.float32)) == keys(np.array([0.0], dtype=np.float32))


@given(
    st.lists(identity, max_size=30),
    st.lists(identity, min_size=2, max_size=8, unique=True),
    st.integers(1, 9),
    st.booleans(),
)
def test_interval_counts_lose_and_invent_nothing(values, bounds, split, to_the_end) -> None:
    bounds = sorted(bounds)[: len(bounds) // 2 * 2]
    edges = [[a, b] for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
    if to_the_end:
        edges[-1][1] = 2**64
    counts = interval_counts(
        np.array(values, dtype=np.uint64),
        np.array([[a, b % 2**64] for a, b in edges], dtype=np.uint64),
        split,
    )
    for (low, high), row in zip(edges, counts, strict=True):
        width = -(-(high - low) // split)
        marks = [min(low + j * width, high) for j in range(split + 1)]
        assert row.tolist() == [sum(a <= v < b for v in values) for a, b in pairwise(marks)]


@pytest.mark.parametrize(
    ("edges", "split"),
    [
        (np.array([[0, 9], [5, 20]], dtype=np.uint64), 2),
        (np.array([[9, 3]], dtype=np.uint64), 2),
        (np.array([[0, 9]], dtype=np.uint64), 65537),
        (np.array([[0, 9]], dtype=np.uint64), 0),
        (np.array([[0, 9]], dtype=np.int64), 2),
        (np.empty((0, 2), dtype=np.uint64), 2),
    ],
)
def test_questions_that_do_not_validate_are_refused(edges, split) -> None:
    with pytest.raises(ParameterError):
        interval_counts(np.array([1], dtype=np.uint64), edges, split)


def test_site_refuses_questions_out_of_order_and_bad_scores() -> None:
    ids, one = ["00000000000000ff"], np.ones(1, dtype=np.float32)
    selector = PoolSelector(ids, Selection(), 0, one, one)
    with pytest.raises(OrderError):
        selector.counts("informativeness", WHOLE["informativeness"], 2, NONE)
    with pytest.raises(ParameterError):
        selector.set_ranks({})
    bad_cuts = (np.zeros((1, 2)), np.zeros((1, 3), dtype=np.uint64), np.uint64(0), np.uint64([0]))
    for cuts in map(np.asarray, bad_cuts):
        with pytest.raises(ParameterError, match="cuts"):
            selector.counts("uncertainty", WHOLE["uncertainty"], 2, cuts)
        with pytest.raises(ParameterError, match="cuts"):
            selector.select(cuts)
    with pytest.raises(ParameterError, match="number of cuts"):
        selector.select(NONE)
    with pytest.raises(ParameterError, match="tied"):
        selector.counts("identity", WHOLE["identity"], 2, NONE)
    foreign = RankTable(np.array([2**31], dtype=np.uint64), np.array([0, 1]))
    with pytest.raises(ParameterError):
        selector.set_ranks({"uncertainty": foreign, "representativeness": foreign})
    for strategy in ("entropy", "typiclust"):
        alone = Selection(strategy=strategy)
        for score in (None, one, np.float64([-1]), np.float64([np.nan]), np.ones(2)):
            with pytest.raises(ParameterError):
                PoolSelector(ids, alone, 0, informativeness=score)
    for scores in (np.float32([np.nan]), np.float32([-1]), np.float32([4]), np.float64([1])):
        with pytest.raises(ParameterError):
            PoolSelector(ids, Selection(), 0, scores, one)
    for bad in (["ff"], ["zz000000000000ff"]):
        with pytest.raises(ParameterError):
            PoolSelector(bad, Selection(), 0, one, one)


def test_a_pool_that_changes_between_queries_is_noticed() -> None:
    values = np.arange(100, dtype=np.uint64) * np.uint64(3)
    answers = 0

    def shrinking(edges, split):
        nonlocal answers
        answers += 1
        return interval_counts(values[: 100 if answers == 1 else 40], edges, split)

    for ask in (rank_table, lambda query, whole: threshold(query, whole, 77)):
        answers = 0
        with pytest.raises(QuorumError):
            ask(shrinking, WHOLE["identity"])
