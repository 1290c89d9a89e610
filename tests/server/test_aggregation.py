"""Aggregation strategies against float64 references of their papers' updates."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sonofed_client.adaptation.drift import next_variate, proximal, scaffold, trained, zeros
from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.records import Records, from_bytes, grouped, to_bytes
from sonofed_common.contract.study import Aggregation
from sonofed_common.training import Training, fit
from sonofed_server.aggregation.feddg_ga import STEP, adjusted
from sonofed_server.aggregation.strategies import STRATEGIES
from sonofed_server.aggregation.strategy import Round

CURVATURES = [np.diag([1.0, 3.0]), np.diag([4.0, 0.5]), np.array([[2.0, 0.3], [0.3, 1.0]])]
OPTIMA = [np.array([1.0, -1.0]), np.array([-2.0, 0.5]), np.array([0.0, 2.0])]
SIZES = {"north": 30.0, "south": 10.0, "west": 20.0}
SHARES = np.array(list(SIZES.values())) / sum(SIZES.values())
STEPS, RATE, MU = 5, 0.2, 0.7
ITEMS = 2 * STEPS


class Point(nn.Module):
    """Two weights, whose loss at a site is half a squared distance to the site's optimum."""

    def __init__(self, weights):
        super().__init__()
        self.w = nn.Parameter(torch.from_numpy(np.array(weights["w"], dtype=np.float32)))

    def loss_at(self, site):
        curvature = torch.from_numpy(CURVATURES[site]).float()
        away = self.w - torch.from_numpy(OPTIMA[site]).float()
        return 0.5 * away @ curvature @ away


def gradient(site, w):
    return CURVATURES[site] @ (w - OPTIMA[site])


def rates(rounds, number):
    """The learning rate of each of a round's steps, over the cosine of all rounds."""
    total = rounds * STEPS
    return [RATE * (1 + np.cos(np.pi * (number * STEPS + k) / total)) / 2 for k in range(STEPS)]


def federate(name, rounds, **settings):
    """Weights after each round of a study of three quadratic sites, through the product's code."""
    aggregation = Aggregation(strategy=name, **settings)
    weights, state, own, history = {"w": np.zeros(2, np.float32)}, Records(), {}, []
    for number in range(rounds):
        strategy = STRATEGIES[name](
            Round(aggregation, number, rounds, lambda w=weights: w, from_bytes(to_bytes(state)))
        )
        sent = strategy.broadcast().get("control", {})
        for place, site in enumerate(SIZES):
            model = Point(weights)
            start, correct, arrays = trained(model), None, {}
            common = {k: torch.from_numpy(np.array(v)) for k, v in sent.items()} or zeros(model)
            before = own.get(site, zeros(model))
            if name == "fedprox":
                correct = proximal(model, aggregation.proximal_weight)
            if name == "scaffold":
                correct = scaffold(model, common, before)
            training = Training(
                epochs=1,
                learning_rate=RATE,
                batch_size=2,
                seed=0,
                optimizer="sgd",
                first_epoch=number,
                last_epoch=rounds,
            )
            received = model.loss_at(place).item()
            fit(
                model,
                ITEMS,
                lambda _, m=model, p=place: m.loss_at(p),
                training,
                before_step=correct,
            )
            if name == "scaffold":
                rate = training.total_rate(ITEMS)
                own[site] = next_variate(common, before, start, trained(model), rate)
                arrays = grouped("control", {"w": (own[site]["w"] - before["w"]).numpy()})
            arrays |= grouped("weights", {k: v.numpy() for k, v in trained(model).items()})
            losses = {"received_loss": received, "trained_loss": model.loss_at(place).item()}
            strategy.add(site, Records(arrays, metrics=losses), SIZES[site])
        weights, state = strategy.finish()
        history.append(weights["w"].astype(np.float64))
    return history, state


def descend(site, w, steps, correction=lambda w: 0.0):
    for rate in steps:
        w = w - rate * (gradient(site, w) + correction(w))
    return w


def loss(site, w):
    return 0.5 * (w - OPTIMA[site]) @ CURVATURES[site] @ (w - OPTIMA[site])


@pytest.mark.parametrize(("name", "mu"), [("fedavg", 0.0), ("fedprox", MU)])
def test_fedprox_takes_the_papers_steps_and_fedavg_those_without_its_term(name, mu):
    w = np.zeros(2)
    settings = {"mu": mu} if name == "fedprox" else {}
    for number, found in enumerate(federate(name, 3, **settings)[0]):
        ends = [descend(i, w, rates(3, number), lambda x, w=w: mu * (x - w)) for i in range(3)]
        w = SHARES @ np.array(ends)
        np.testing.assert_allclose(found, w, rtol=1e-5, atol=1e-6)


def test_fedprox_of_weight_0_is_fedavg_bit_for_bit():
    average, prox = federate("fedavg", 3)[0], federate("fedprox", 3, mu=0.0)[0]
    assert [w.tobytes() for w in prox] == [w.tobytes() for w in average]
    other = federate("fedprox", 3, mu=0.1)[0]
    assert not np.array_equal(other[0], average[0])


def test_fedadam_takes_the_papers_steps():
    w, m, v, eta = np.zeros(2), np.zeros(2), np.full(2, 1e-6), 0.05
    for number, found in enumerate(federate("fedadam", 4, server_learning_rate=eta)[0]):
        change = SHARES @ np.array([descend(i, w, rates(4, number)) for i in range(3)]) - w
        m, v = 0.9 * m + 0.1 * change, 0.99 * v + 0.01 * change**2
        w = w + eta * m / (np.sqrt(v) + 1e-3)
        np.testing.assert_allclose(found, w, rtol=1e-4, atol=1e-5)


def test_fedadam_averages_the_statistics_of_normalisation():
    names = ("n.running_mean", "n.num_batches_tracked", "w")
    start = dict(zip(names, (np.float32([0.0]), np.array(2), np.float32([0.0])), strict=True))
    strategy = STRATEGIES["fedadam"](Round(Aggregation(strategy="fedadam"), 0, 1, lambda: start))
    for site, value in (("north", 1.0), ("south", 4.0)):
        reply = dict(
            zip(names, (np.float32([value]), np.array(8), np.float32([value])), strict=True)
        )
        strategy.add(site, Records(grouped("weights", reply)), 1.0)
    weights, state = strategy.finish()
    assert weights["n.running_mean"] == 2.5 and weights["n.num_batches_tracked"] == 8
    step = 0.01 * 0.25 / (np.sqrt(0.99e-6 + 0.01 * 2.5**2) + 1e-3)
    assert weights["w"] == pytest.approx(step, rel=1e-5)
    assert set(state.arrays) == {"m/w", "v/w"}


def test_scaffold_takes_the_papers_steps():
    w, c, own = np.zeros(2), np.zeros(2), [np.zeros(2)] * 3
    history, state = federate("scaffold", 4)
    for number, found in enumerate(history):
        steps = rates(4, number)
        ends = [descend(i, w, steps, lambda _, c=c - own[i]: c) for i in range(3)]
        after = [own[i] - c + (w - ends[i]) / sum(steps) for i in range(3)]
        c = c + SHARES @ (np.array(after) - np.array(own))
        w, own = SHARES @ np.array(ends), after
        np.testing.assert_allclose(found, w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state.group("control")["w"], c, rtol=1e-4, atol=1e-5)


def test_scaffold_ends_at_the_pooled_optimum_and_fedavg_elsewhere():
    pooled = np.linalg.solve(
        np.tensordot(SHARES, CURVATURES, 1),
        sum(p * a @ b for p, a, b in zip(SHARES, CURVATURES, OPTIMA, strict=True)),
    )
    ends = {name: federate(name, 24)[0][-1] for name in ("scaffold", "fedavg")}
    assert np.linalg.norm(ends["scaffold"] - pooled) < 0.01
    assert np.linalg.norm(ends["fedavg"] - pooled) > 0.03


def test_scaffold_refuses_a_reply_without_control_variate():
    strategy = STRATEGIES["scaffold"](Round(Aggregation(strategy="scaffold"), 0, 1, dict))
    with pytest.raises(ParameterError, match="site north sent no control variate of its weights"):
        strategy.add("north", Records({"weights/w": np.zeros(2)}), 1.0)


def test_feddg_ga_takes_the_papers_weights():
    w, shares, before = np.zeros(2), SHARES.copy(), None
    history, state = federate("feddg_ga", 4)
    for number, found in enumerate(history):
        if before is not None:
            gaps = np.array([loss(i, w) for i in range(3)]) - before
            moved = gaps - gaps.mean()
            step = STEP * (1 - (number - 1) / 4)
            shares = np.clip(shares + step * moved / np.abs(moved).max(), 0, 1)
            shares /= shares.sum()
        ends = [descend(i, w, rates(4, number)) for i in range(3)]
        before = np.array([loss(i, end) for i, end in enumerate(ends)])
        w = shares @ np.array(ends)
        np.testing.assert_allclose(found, w, rtol=1e-4, atol=1e-5)
    kept = list(state.config["shares"].values())
    np.testing.assert_allclose(kept, shares, rtol=1e-4)
    assert not np.allclose(kept, SHARES)


def test_feddg_ga_keeps_the_weight_of_a_site_without_losses():
    settings = Aggregation(strategy="feddg_ga", weighting="uniform")
    state = Records()
    for number in range(2):
        strategy = STRATEGIES["feddg_ga"](Round(settings, number, 2, dict, state))
        for site in SIZES:
            told = {"received_loss": float(len(site)), "trained_loss": 0.1}
            if site == "west":
                told = {"received_loss": float("nan")} if number else {}
            strategy.add(site, Records({"weights/w": np.ones(2)}, metrics=told), 1.0)
        state = strategy.finish()[1]
    # The gaps are equal, and the third site is not among them.
    assert state.config["shares"] == pytest.approx(dict.fromkeys(SIZES, 1 / 3))


sites = st.integers(2, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.floats(0.01, 1), min_size=n, max_size=n),
        st.lists(st.floats(-5, 5), min_size=n, max_size=n),
    )
)


@given(sites, st.floats(0.01, STEP))
def test_feddg_ga_weights_sum_to_1_and_grow_with_the_largest_gap(drawn, step):
    raw, values = drawn
    shares = {str(n): share / sum(raw) for n, share in enumerate(raw)}
    gaps = {str(n): gap for n, gap in enumerate(values)}
    after = adjusted(shares, gaps, step)
    assert sum(after.values()) == pytest.approx(1)
    assert all(0 <= share <= 1 for share in after.values())
    if max(values) - min(values) > 1e-3:
        largest, smallest = (f(gaps, key=gaps.__getitem__) for f in (max, min))
        odds = after[largest] * shares[smallest] - after[smallest] * shares[largest]
        assert odds > 0
