"""Hypersphere contrastive learning: the loss, the check for collapse, a round, FedEMA."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from sonofed_client.adaptation.embedding import (
    angular_loss,
    check_collapse,
    collapse_statistics,
    embed,
    fedema_merge,
    teacher_momentum,
    train_round,
)
from sonofed_common.contract.errors import CollapseError, SiteEmptyError
from sonofed_common.contract.study import Embedding
from sonofed_common.models.classifiers import Classifier
from sonofed_common.models.encoder import HypersphereEncoder, Predictor
from sonofed_common.runtime import Events

torch.set_num_threads(1)


def unit(count: int, dimension: int, seed: int, dtype=torch.float64) -> torch.Tensor:
    z = torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return nn.functional.normalize(z, dim=1)


def networks(dimension: int = 16) -> tuple[HypersphereEncoder, Predictor]:
    torch.manual_seed(0)
    small = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3))
    return HypersphereEncoder(Classifier(small, 16), dimension), Predictor(dimension)


def pictures(count: int = 48) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(count, 1, 4, 4, generator=generator)
    return nn.functional.interpolate(coarse, size=32, mode="bilinear").clamp(0, 1)


def test_loss_matches_arccos() -> None:
    a, b = unit(50, 24, 0), unit(50, 24, 1)
    theta = torch.arccos((a @ b.T).clamp(-1, 1))
    for pairs, expected in (("matched", theta.diagonal()), ("all_pairs", theta)):
        loss = angular_loss(a, b, 4.0, pairs)
        assert loss.item() == pytest.approx((4.0 * expected).square().mean().item(), abs=1e-6)
    single = angular_loss(a.float(), b.float())
    assert single.item() == pytest.approx(angular_loss(a, b).item(), rel=1e-5)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_equal_and_opposite_vectors(sign: float, dtype) -> None:
    a = unit(6, 8, 0, dtype)
    b = (sign * a).clone().requires_grad_()
    loss = angular_loss(a, b)
    loss.backward()
    assert torch.isfinite(b.grad).all()
    assert loss.item() == pytest.approx(0.0 if sign > 0 else (4 * math.pi) ** 2, abs=1e-3)


def test_gradient_is_that_of_the_squared_angle() -> None:
    a, b = unit(5, 4, 2), unit(5, 4, 3).requires_grad_()
    angular_loss(a, nn.functional.normalize(b, dim=1)).backward()
    found, b.grad = b.grad.clone(), None
    cosine = (a * nn.functional.normalize(b, dim=1)).sum(dim=1)
    (4 * torch.arccos(cosine)).square().mean().backward()
    assert torch.allclose(found, b.grad, atol=1e-9)


def test_statistics_tell_a_sphere_from_a_constant_and_a_cone() -> None:
    sphere = unit(2000, 32, 0)
    found = check_collapse(sphere)
    assert found["spread"] == pytest.approx(1, abs=0.02)
    assert found["cosine"] == pytest.approx(0, abs=0.02)
    direction = unit(1, 32, 1)
    cone = nn.functional.normalize(direction + 0.3 * sphere, dim=1)
    assert check_collapse(cone)["cosine"] > 0.85
    pairs = cone[:20] @ cone[:20].T
    mean = (pairs.sum() - pairs.trace()).item() / (20 * 19)
    assert collapse_statistics(cone[:20])["cosine"] == pytest.approx(mean, abs=1e-9)
    with pytest.raises(CollapseError, match="20 images"):
        check_collapse(nn.functional.normalize(direction + 0.01 * sphere[:20], dim=1))
    assert check_collapse(direction) == {"spread": 1.0, "cosine": 0.0}


@pytest.mark.parametrize("partners", ["augmentation", "reconstruction"])
def test_matched_pairs_learn_without_collapse(partners: str) -> None:
    student, predictor = networks()
    images = pictures()
    redrawn = None if partners == "augmentation" else images.square() * 0.8
    options = Embedding(rounds=2, local_epochs=8, dimension=16, batch_size=16, learning_rate=1e-2)
    heard = []
    before = copy.deepcopy(predictor.state_dict())
    reports = [
        train_round(
            student, predictor, images, redrawn, options, r, 5, Events(None, [heard.append])
        )
        for r in range(2)
    ]
    assert 0 < reports[1]["loss"] < reports[0]["loss"]
    assert reports[1]["predicted_cosine"] < 0.95
    assert reports[1]["images"] == 48
    assert reports[1]["cosine"] < 0.95
    told = [e for e in heard if e["event"] == "embedding"]
    assert [e["epoch"] for e in told] == list(range(1, 17))
    assert told[-1]["spread"] == reports[1]["spread"]
    assert any(not torch.equal(before[k], v) for k, v in predictor.state_dict().items())
    z = embed(student, images)
    assert z.shape == (48, 16)
    assert torch.allclose(z.norm(dim=1), torch.ones(48), atol=1e-5)
    check_collapse(z)


def test_all_pairs_collapse_and_the_check_says_so() -> None:
    student, predictor = networks()
    options = Embedding(
        rounds=1, local_epochs=40, dimension=16, batch_size=16, learning_rate=1e-2, loss="all_pairs"
    )
    with pytest.raises(CollapseError, match="collapsed"):
        train_round(student, predictor, pictures(), pictures() * 0.8, options, 0, 5)


def test_a_round_whose_epochs_are_all_kept_reports_the_same(tmp_path: Path) -> None:
    options = Embedding(rounds=1, local_epochs=2, dimension=16, batch_size=8)
    checkpoint = tmp_path / "round"
    ends = []
    for _ in range(2):
        student, predictor = networks()
        images = pictures(17)
        report = train_round(student, predictor, images, None, options, 0, 3, checkpoint=checkpoint)
        ends.append((report, embed(student, images)))
    assert ends[0][0] == ends[1][0] and torch.equal(ends[0][1], ends[1][1])
    with safe_open(checkpoint, framework="pt") as file:
        assert not [n for n in file.keys() if 17 in file.get_tensor(n).shape]  # noqa: SIM118


def test_same_seed_same_bits_and_sites_of_one_or_no_image() -> None:
    options = Embedding(rounds=1, dimension=16, batch_size=8)
    results = []
    for _ in range(2):
        student, predictor = networks()
        train_round(student, predictor, pictures(17), None, options, 0, seed=3)
        results.append(embed(student, pictures(17)))
    assert torch.equal(*results)
    student, predictor = networks()
    start = copy.deepcopy(student.state_dict())
    assert train_round(student, predictor, pictures(1), None, options, 0, 3) == {"images": 1.0}
    assert all(torch.equal(start[k], v) for k, v in student.state_dict().items())
    with pytest.raises(SiteEmptyError):
        train_round(student, predictor, torch.empty(0, 1, 32, 32), None, options, 0, 3)


def test_embedding_does_not_depend_on_the_batch_and_restores_the_mode() -> None:
    student, _ = networks()
    images = pictures(10)
    assert torch.allclose(embed(student, images, 3), embed(student, images, 64), atol=1e-6)
    assert student.training
    assert embed(student, images[:0]).shape == (0, 16)
    assert embed(student, images).requires_grad is False


def test_teacher_momentum_runs_from_start_to_one() -> None:
    shares = [teacher_momentum(0.99, s / 10) for s in range(11)]
    assert shares[0] == pytest.approx(0.99)
    assert shares[-1] == 1
    assert shares == sorted(shares)


def test_fedema_keeps_more_of_a_site_that_diverged_more() -> None:
    incoming = {"w": torch.zeros(4), "steps": torch.tensor(9)}
    local = {"w": torch.full((4,), 2.0), "steps": torch.tensor(5)}
    merged, scale = fedema_merge(local, incoming)
    assert scale == pytest.approx(0.7 / 4)
    assert torch.allclose(merged["w"], torch.full((4,), 1.4))
    assert merged["steps"] == 9
    near, same = fedema_merge({**local, "w": torch.full((4,), 1.0)}, incoming, scale)
    assert same == scale
    assert torch.allclose(near["w"], torch.full((4,), 0.35))
    far, _ = fedema_merge({**local, "w": torch.full((4,), 50.0)}, incoming, scale)
    assert torch.allclose(far["w"], torch.full((4,), 50.0))
    assert torch.equal(fedema_merge(incoming, incoming)[0]["w"], incoming["w"])
