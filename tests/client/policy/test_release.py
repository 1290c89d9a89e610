import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_rules import COMMON, SMALL, STANDARD, WEIGHTS, arrays, numbers, policy

from sonofed_client.enclave.policy import policy_of_all, read_policy
from sonofed_client.enclave.privacy import gaussian, privatise
from sonofed_client.enclave.release import release
from sonofed_common.contract import actions
from sonofed_common.contract.actions import ACTIONS
from sonofed_common.contract.errors import DivergenceError, PolicyError
from sonofed_common.contract.records import Records


def let_out(rule, reply, action="train.classifier", start=None):
    return release(policy(action, **rule), action, reply, lambda: start or {})


def test_the_standard_policy_names_every_action_but_the_one_that_gives_images():
    assert STANDARD.actions.keys() | {"train.synthesise"} == ACTIONS.keys()
    assert policy_of_all().actions.keys() == ACTIONS.keys()
    assert len(STANDARD.digest()) == 64 and STANDARD.digest() == read_policy(None).digest()


RULE = {"arrays": [WEIGHTS], "config": {"examples": "count"}, "metrics": ["loss"]}


def test_a_small_pool_gives_no_moments_of_its_embeddings():
    rule = {
        "min_count": 5,
        "config": {"examples": "count"},
        "arrays": [{"key": key, "dtypes": ["float64"], "numbers": 9} for key in ("sum", "second")],
    }
    moments = {"sum": np.ones(3), "second": np.ones((3, 3))}
    with pytest.raises(PolicyError):
        let_out(rule, Records(moments, {"examples": 4}), "query.cluster")
    out = let_out(rule, Records(moments, {"examples": 5}), "query.cluster").records
    assert out.arrays.keys() == moments.keys()


names = st.one_of(
    st.sampled_from(["weights/a", "weights/", "weights", "loss", "examples", "seed", "weights/b"]),
    st.text(max_size=12),
)


@settings(max_examples=400, deadline=None)
@given(
    st.dictionaries(names, arrays, max_size=3),
    st.dictionaries(names, numbers, max_size=3),
    st.dictionaries(names, numbers, max_size=3),
)
def test_nothing_that_is_not_named_ever_passes(held, config, metrics):
    reply = Records(held, config, metrics)
    named = all(n.startswith("weights/") for n in held)
    named &= set(config) <= {"examples"} and set(metrics) <= {"loss"}
    typed = all(a.dtype in (np.float32, np.int64) for a in held.values())
    typed &= sum(a.size for a in held.values()) <= WEIGHTS["numbers"]
    typed &= all(type(v) is int and 0 <= v < 2**63 for v in config.values())
    typed &= all(type(v) in (int, float) for v in metrics.values())
    typed &= all(abs(v) < 2**63 for v in metrics.values() if type(v) is int)
    if named and typed:
        out = let_out(RULE, reply).records
        assert out.arrays.keys() == held.keys() and out.config == config
        assert out.metrics == (metrics if config.get("examples", 0) >= 5 else {})
    else:
        with pytest.raises(PolicyError) as error:
            let_out(RULE, reply)
        # The sentence crosses the network: a name that nobody expected must not be in it.
        strangers = {*held, *config, *metrics} - {
            "examples",
            "loss",
            "weights",
            "weights/",
            "weights/a",
            "weights/b",
        }
        said = error.value.message
        words = set(re.findall(r"\w+", said))
        for name in strangers:
            # A short word of letters may well be part of one that the sentence has anyway.
            assert len(name) < 4 or name not in (words if name.isalpha() else said)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30), st.dictionaries(names, numbers, max_size=2))
def test_no_action_that_is_not_named_is_let_in_or_out(action, metrics):
    if action == "train.classifier":
        return
    with pytest.raises(PolicyError):
        release(policy(**RULE), action, Records(metrics=metrics), dict)
    with pytest.raises(PolicyError):
        policy(**RULE).admit(actions.Annotations(**COMMON), action, Records())


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("count", [0, 7], [-1, 1.0, "1", None, True, 2**63]),
        ("counts", [[], [1, 2]], [1, [0.5], "12", [[1]]]),
        ("digest", [None, "a" * 64], ["A" * 64, "a" * 63, 5, "a" * 64 + "\n"]),
        ("digests", [[], ["0" * 64]], ["0" * 64, ["x"]]),
        ("text", ["", "cpu", "NVIDIA H200 (SXM)"], ["a\nb", "x" * 129, 5, None, "é", "\x1b[1m"]),
        ("texts", [{}, {"torch": "2.13.0+cpu"}], [{"a": 1}, {"a": {"b": "c"}}, ["a"]]),
    ],
)
def test_facts_are_of_their_kind(kind, good, bad):
    rule = {"config": {"fact": kind}}
    for value in good:
        assert let_out(rule, Records(config={"fact": value})).records.config == {"fact": value}
    for value in bad:
        with pytest.raises(PolicyError, match="fact"):
            let_out(rule, Records(config={"fact": value}))


def test_small_counts_do_not_leave():
    rule = {
        "min_count": 5,
        "config": {"examples": "count", "selected": "counts"},
        "counted": ["images"],
        "arrays": [{"key": "counts", "dtypes": ["int64"], "numbers": 9, "counts": True}],
    }
    for reply in (
        Records(config={"examples": 4}),
        Records(config={"selected": [10, 1]}),
        Records(metrics={"images": 3.0}),
        Records({"counts": np.array([0, 4])}),
        Records({"counts": np.array([-1])}),
    ):
        with pytest.raises(PolicyError, match=r"small|count"):
            let_out(rule, reply)
    whole = Records({"counts": np.array([0, 5])}, {"examples": 0, "selected": [5]}, {"images": 9.0})
    assert let_out(rule, whole).records.metrics == {"images": 9.0}


def clusters(least):
    rows = {"key": "sums", "dtypes": ["float64"], "numbers": 1000}
    return {"min_count": least, "arrays": [rows, {**SMALL, "numbers": 99, "rows": ["sums"]}]}


def test_small_clusters_go_with_their_sums():
    reply = Records({"sums": np.ones((4, 2)), "counts": np.array([3, 2, 0, 1])})
    out = let_out(clusters(3), reply, "query.cluster").records.arrays
    assert out["counts"].tolist() == [3, 0, 0, 0]
    assert out["sums"].tolist() == [[1, 1], [0, 0], [1, 1], [0, 0]]
    assert reply.arrays["counts"].tolist() == [3, 2, 0, 1] and reply.arrays["sums"].all()


def test_counts_of_sums_that_do_not_come_are_held_back():
    with pytest.raises(PolicyError, match="sums"):
        let_out(clusters(3), Records({"counts": np.array([9, 1])}), "query.cluster")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(2, 7), st.integers(0, 9))
def test_the_rest_of_a_known_total_is_no_few_images(sizes, least, seed):
    # Whole numbers: a difference is exact, and 0 only of no image.
    vectors = [
        np.random.default_rng((seed, n)).integers(1, 99, (s, 3)) for n, s in enumerate(sizes)
    ]
    sums = np.array([v.sum(axis=0) for v in vectors], dtype=np.float64)
    counts = np.array(sizes)
    reply = Records({"sums": sums, "counts": counts})
    out = let_out(clusters(least), reply, "query.cluster").records.arrays
    hidden = sum(sizes) - out["counts"].sum()
    assert hidden == 0 or hidden >= least or not out["counts"].any()
    shown = out["counts"] > 0
    assert (out["counts"][shown] >= least).all() and (out["counts"] == counts)[shown].all()
    assert (out["sums"][shown] == sums[shown]).all() and not out["sums"][~shown].any()
    if (counts[counts > 0] >= least).all():
        assert np.array_equal(out["counts"], counts)


@pytest.mark.parametrize(
    ("config", "least", "leaves"),
    [
        ({"examples": 5}, 1, True),
        ({"examples": 4}, 1, False),
        ({}, 1, False),
        ({"examples": 40, "measured": 4}, 1, False),
        ({"examples": 40, "measured": 5}, 1, True),
        ({"examples": 40, "measured": 19}, 20, False),
        ({"examples": 40, "measured": 20}, 20, True),
        ({"examples": 40, "measured": 20.0}, 1, False),
    ],
)
def test_metrics_over_too_few_images_do_not_leave(config, least, leaves):
    rule = {"config": {"examples": "count"}, "metrics": ["auroc"], "counted": ["images"]}
    reply = Records(config=config, metrics={"auroc": 0.5, "images": 40})
    out = let_out({**rule, "min_count": least}, reply, "evaluate.classifier").records
    assert out.metrics == {"images": 40} | ({"auroc": 0.5} if leaves else {})
    assert out.config == {k: v for k, v in config.items() if k == "examples"}


def test_withheld_metrics_are_taken_out():
    out = let_out({"withheld": ["loss"]}, Records(metrics={"loss": 0.25})).records
    assert out.metrics == {}


START = {
    "weights/w": np.ones((2, 2), dtype=np.float32),
    "weights/n": np.array(7),
    "weights/running_var": np.zeros(2, dtype=np.float32),
}


def test_updates_are_clipped_by_their_common_change():
    rule = {"arrays": [{**WEIGHTS, "clip": 0.5}]}
    new = {
        "weights/w": START["weights/w"] + np.float32(3),
        "weights/n": np.array(9),
        "weights/running_var": np.full(2, 4, dtype=np.float32),
    }
    released = let_out(rule, Records(new), start=START)
    out = released.records.arrays
    change = [out[n].astype(float) - START[n] for n in ("weights/w", "weights/running_var")]
    assert math.isclose(sum((c**2).sum() for c in change), 0.25, rel_tol=1e-5)
    assert np.allclose(change[1] / change[0][0], 4 / 3, rtol=1e-4)
    assert out["weights/n"] == 7 and out["weights/w"].dtype == np.float32
    assert released.privacy == {"weights/* clip": 0.5, "weights/* noise": 0.0}
    assert new["weights/n"] == 9
    small = {**START, "weights/w": START["weights/w"] + np.float32(0.1)}
    out = let_out(rule, Records(small), start=START).records.arrays
    assert np.array_equal(out["weights/w"], small["weights/w"])


def test_what_cannot_be_clipped_does_not_leave():
    rule = {"arrays": [{**WEIGHTS, "clip": 0.5}]}
    for start in ({}, {"weights/w": START["weights/w"]}, {**START, "weights/n": np.zeros(2)}):
        with pytest.raises(PolicyError, match="start"):
            let_out(rule, Records(START), start=start)
    broken = {**START, "weights/w": np.full((2, 2), np.nan, dtype=np.float32)}
    with pytest.raises(DivergenceError):
        let_out(rule, Records(broken), start=START)


def test_noise_is_gaussian_and_never_the_same():
    drawn = gaussian(200_001)
    assert len(drawn) == 200_001 and np.isfinite(drawn).all()
    assert abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1) < 0.01
    assert abs((np.abs(drawn) < 1).mean() - 0.6827) < 0.01
    assert abs((drawn**4).mean() - 3) < 0.15
    start = {"w": np.zeros(20_000, dtype=np.float32), "running_var": np.zeros(500)}
    first, second = (privatise(start, start, 2.0, 0.5) for _ in range(2))
    assert abs(first["w"].std() - 1.0) < 0.03
    assert (first["running_var"] >= 0).all()
    assert not np.array_equal(first["w"], second["w"])
