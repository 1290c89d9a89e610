import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sonofed_common.contract.errors import DivergenceError, ParameterError
from sonofed_common.contract.records import Records
from sonofed_common.contract.study import Aggregation
from sonofed_server.aggregation.fedavg import FedAvg
from sonofed_server.aggregation.weights import weight_of

shapes = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
finite = st.floats(-1e6, 1e6, width=32)
weights = st.floats(0.5, 1e4)


def mean_of(replies):
    mean = FedAvg()
    for values, weight in replies:
        mean.add(values, weight)
    return mean.mean()


@st.composite
def updates(draw):
    shape = draw(shapes)
    count = draw(st.integers(1, 5))
    values = [draw(arrays.arrays(np.float32, shape, elements=finite)) for _ in range(count)]
    return [({"w": v, "n": np.array(i)}, draw(weights)) for i, v in enumerate(values)]


@given(updates())
def test_running_mean_equals_the_float64_mean_of_all_replies(replies):
    result = mean_of(replies)
    share = [w for _, w in replies]
    expected = np.average(np.stack([v["w"].astype(np.float64) for v, _ in replies]), 0, share)
    assert result["w"].dtype == np.float32 and result["w"].shape == expected.shape
    np.testing.assert_allclose(result["w"], expected, rtol=1e-6, atol=1e-6)
    counter = np.average(np.arange(len(replies)), weights=share)
    assert result["n"].dtype == np.int64 and result["n"].shape == ()
    assert abs(int(result["n"]) - counter) <= 0.5 + 1e-9


@given(updates())
def test_the_same_order_gives_the_same_bits(replies):
    first, second = mean_of(replies), mean_of(replies)
    assert {k: v.tobytes() for k, v in first.items()} == {k: v.tobytes() for k, v in second.items()}


@given(updates())
def test_replies_are_left_as_they_came(replies):
    before = [v["w"].tobytes() for v, _ in replies]
    mean_of(replies)
    assert [v["w"].tobytes() for v, _ in replies] == before


def test_one_reply_is_its_own_mean_bit_for_bit():
    values = {"w": np.random.default_rng(0).normal(size=100).astype(np.float32)}
    assert mean_of([(values, 7)])["w"].tobytes() == values["w"].tobytes()


def test_nothing_was_added():
    assert FedAvg().mean() == {}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_refused(bad):
    with pytest.raises(DivergenceError):
        FedAvg().add({"a": np.zeros(3), "w": np.array([0, bad])}, 1)


@pytest.mark.parametrize(
    "other",
    [
        {"w": np.zeros((2, 1))},
        {"w": np.zeros(3)},
        {"v": np.zeros(2)},
        {"w": np.zeros(2), "v": np.zeros(2)},
        {},
    ],
)
def test_an_update_of_another_model_is_refused(other):
    mean = FedAvg()
    mean.add({"w": np.ones(2)}, 1)
    with pytest.raises(ParameterError, match="different models"):
        mean.add(other, 1)
    assert mean.mean()["w"].tolist() == [1, 1]


@pytest.mark.parametrize("weight", [0, -1, np.nan, np.inf])
def test_a_weight_that_is_no_positive_number_is_refused(weight):
    with pytest.raises(ParameterError, match="positive weight"):
        FedAvg().add({"w": np.ones(2)}, weight)


def test_weights_are_examples_or_all_the_same():
    some, none = Records(config={"examples": 40}), Records(config={"examples": 0})
    assert weight_of(some, Aggregation()) == 40
    assert weight_of(some, Aggregation(weighting="uniform")) == 1
    assert weight_of(none, Aggregation()) == weight_of(none, Aggregation(weighting="uniform")) == 0
