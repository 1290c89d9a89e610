import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.study_segmentation import Infusion
from sonofed_common.models.infusion import (
    InfusionHead,
    confidence,
    fit_temperature,
    gate_loss,
    lattice,
    normalised_entropy,
)

RULES = ("entropy", "maxprob", "gate", "mean")


def draw(branches, classes, seed=0, images=2, size=6, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(branches, images, classes, size, size, generator=generator)
    return (scale * logits).softmax(2)


def trained_gate(branches, classes, seed=0):
    head = InfusionHead(branches, Infusion(rule="gate"), classes)
    generator = torch.Generator().manual_seed(seed)
    for weight in head.gate.parameters():
        weight.data = torch.randn(weight.shape, generator=generator)
    return head


def heads(branches, classes, tau):
    fixed = [InfusionHead(branches, Infusion(rule=r, tau=tau), classes) for r in RULES]
    return [*fixed, trained_gate(branches, classes)]


@given(st.integers(1, 5), st.integers(2, 5), st.floats(0.01, 10), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_weights_and_probabilities_sum_to_one(branches, classes, tau, seed):
    p = draw(branches, classes, seed)
    for head in heads(branches, classes, tau):
        head.load({**head.arrays(), "temperatures": np.linspace(0.5, 2, branches)})
        infused, weights = head(p)
        assert infused.shape == p.shape[1:] and weights.shape == p[:, :, 0].shape
        assert bool((weights >= 0).all())
        torch.testing.assert_close(weights.sum(0), torch.ones_like(weights[0]))
        torch.testing.assert_close(infused.sum(1), torch.ones_like(infused[:, 0]))


@given(st.integers(2, 5), st.integers(2, 4), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_the_order_of_the_branches_does_not_matter(branches, classes, seed):
    p = draw(branches, classes, seed)
    order = torch.randperm(branches, generator=torch.Generator().manual_seed(seed))
    for head in heads(branches, classes, 0.1):
        infused, weights = head(p)
        shuffled, moved = head(p[order])
        torch.testing.assert_close(shuffled, infused)
        torch.testing.assert_close(moved, weights[order])


@pytest.mark.parametrize("branches", [1, 3])
def test_identical_branches_stay_as_they_are(branches):
    one = draw(1, 3)
    for head in heads(branches, 3, 0.1):
        infused, weights = head(one.expand(branches, -1, -1, -1, -1))
        torch.testing.assert_close(infused, one[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / branches))


def test_certain_pixels_stay_finite():
    p = torch.zeros(2, 1, 2, 4, 4)
    p[0, :, 0] = p[1, :, 1] = 1
    for head in heads(2, 2, 0.01):
        head.load({**head.arrays(), "temperatures": np.array([0.05, 20.0])})
        assert all(bool(torch.isfinite(t).all()) for t in head(p))


def test_entropy_follows_the_branch_that_is_surer_once_calibrated():
    sure, unsure = draw(1, 2, scale=4), draw(1, 2, seed=1, scale=0.5)
    p = torch.cat([sure, unsure])
    head = InfusionHead(2, Infusion(tau=0.1), 2)
    _, weights = head(p)
    surer = normalised_entropy(p)[0] < normalised_entropy(p)[1]
    assert torch.equal(weights[0] > 0.5, surer) and weights[0].mean() > 0.7
    # A branch that is sure without reason is not believed after calibration.
    head.load({"temperatures": np.array([20.0, 1.0])})
    _, weights = head(p)
    assert weights[1].mean() > 0.5
    _, equal = InfusionHead(2, Infusion(rule="mean"), 2)(p)
    assert bool((equal == 0.5).all())


def test_a_small_tau_takes_the_surest_branch():
    p = draw(3, 2)
    for rule in ("entropy", "maxprob"):
        infused, _ = InfusionHead(3, Infusion(rule=rule, tau=1e-4), 2)(p)
        surest = p.amax(2).argmax(0)
        taken = p.gather(0, surest[None, :, None].expand(1, -1, 2, -1, -1))[0]
        agree = (infused - taken).abs().amax(1) < 1e-3
        assert agree.float().mean() > 0.95


def test_weights_of_two_entropies_by_hand():
    p = torch.tensor([[0.9, 0.1], [0.5, 0.5]]).view(2, 1, 2, 1, 1)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) / math.log(2)
    first = math.exp(-entropy / 0.5) / (math.exp(-entropy / 0.5) + math.exp(-1 / 0.5))
    infused, weights = InfusionHead(2, Infusion(tau=0.5), 2)(p)
    assert weights.flatten().tolist() == pytest.approx([first, 1 - first], rel=1e-5)
    assert infused[0, 0].item() == pytest.approx(first * 0.9 + (1 - first) * 0.5, rel=1e-5)


def test_confidence_is_the_lead_of_the_best_class():
    p = torch.tensor([0.2, 0.5, 0.3]).view(1, 3, 1, 1)
    assert confidence(p).shape == (1, 1, 1)
    assert confidence(p).item() == pytest.approx(0.2)


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_temperature_of_overconfident_logits_is_found(true):
    generator = torch.Generator().manual_seed(5)
    logits = 2 * torch.randn(40_000, 3, generator=generator)
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    scaled = (true * logits).log_softmax(1)
    found = fit_temperature(scaled, targets)
    assert found == pytest.approx(true, rel=0.05)
    assert found == fit_temperature(scaled, targets)


def test_temperatures_stay_in_their_range():
    right = torch.tensor([[0.9, 0.1]]).log().expand(100, 2)
    assert 0.05 <= fit_temperature(right, torch.zeros(100)) < 0.1
    assert 19 < fit_temperature(right, torch.ones(100)) <= 20
    assert fit_temperature(right[:0], torch.zeros(0)) == 1


def test_a_gate_learns_whom_to_trust_and_serves_any_number_of_branches():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 2, (8, 1, 8, 8), generator=generator).byte()
    truth = torch.cat([1 - targets, targets], 1).float()
    # The good branch is unsure, the bad one sure and wrong half of the time.
    good = 0.5 + 0.2 * (truth - 0.5)
    flips = torch.rand(8, 1, 8, 8, generator=generator) < 0.5
    bad = torch.where(flips, 1 - truth, truth) * 0.98 + 0.01
    p = torch.stack([good, bad])
    head = InfusionHead(2, Infusion(rule="gate"), 2)
    _, start = head(p)
    torch.testing.assert_close(start, torch.full_like(start, 0.5))
    before = gate_loss(head, p, targets).item()
    optimizer = torch.optim.Adam(head.gate.parameters(), 0.05)
    for _ in range(40):
        optimizer.zero_grad()
        gate_loss(head, p, targets).backward()
        optimizer.step()
    assert gate_loss(head, p, targets).item() < before - 0.02
    other = InfusionHead(3, Infusion(rule="gate"), 2)
    other.load({k: v for k, v in head.arrays().items() if k != "temperatures"})
    with torch.no_grad():
        _, weights = other(torch.stack([good, bad, bad]))
    assert weights[0].mean() > 1 / 3


@pytest.mark.parametrize("rule", RULES)
def test_arrays_bring_a_head_back(rule):
    head = trained_gate(2, 3) if rule == "gate" else InfusionHead(2, Infusion(rule=rule), 3)
    head.load({**head.arrays(), "temperatures": np.array([0.7, 2.5])})
    again = InfusionHead(2, Infusion(rule=rule), 3)
    again.load(head.arrays())
    p = draw(2, 3)
    for one, other in zip(head(p), again(p), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "temperatures",
    [np.ones(3), np.ones((2, 1)), np.array([1, 0]), np.array([1, np.nan]), np.array([1, 21.0])],
)
def test_temperatures_that_do_not_fit_are_refused(temperatures):
    head = InfusionHead(2, Infusion(), 2)
    with pytest.raises(ParameterError, match="each of the 2 branches"):
        head.load({"temperatures": temperatures})
    assert head.temperatures.tolist() == [1, 1]


def test_a_gate_that_does_not_fit_is_refused():
    head = InfusionHead(2, Infusion(rule="gate"), 2)
    spoilt = {n: a.copy() for n, a in head.arrays().items()}
    spoilt["gate/0.bias"][0] = np.nan
    for arrays in ({}, InfusionHead(2, Infusion(rule="gate"), 3).arrays(), spoilt):
        with pytest.raises(ParameterError, match="gate"):
            head.load(arrays)
    assert all(bool(torch.isfinite(w).all()) for w in head.parameters())


def test_a_lattice_is_spread_over_the_image():
    maps = torch.arange(64 * 64).view(1, 64, 64)
    chosen = lattice(maps, 16)
    assert chosen.shape == (1, 16, 16)
    assert len({int(v) % 64 for v in chosen.flatten()}) == 16
    assert torch.equal(lattice(maps, 64), maps)
