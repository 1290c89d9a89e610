"""Angles and dual scores against plain definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from sonofed_client.adaptation.scoring import (
    angles,
    distance_to_centroids,
    representativeness,
    uncertainty,
)


def unit(count: int, dimension: int, seed: int) -> torch.Tensor:
    z = torch.randn(count, dimension, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(z, dim=1)


def reference(z: torch.Tensor, centroids: torch.Tensor) -> list[list[float]]:
    exact = [torch.nn.functional.normalize(v.double(), dim=1) for v in (z, centroids)]
    return torch.arccos((exact[0] @ exact[1].T).clamp(-1, 1)).tolist()


def test_scores_match_their_definitions() -> None:
    z, centroids = unit(40, 16, 0), unit(4, 16, 1)
    expected = reference(z, centroids)
    scores = {
        "range": [max(row) - min(row) for row in expected],
        "margin": [sorted(row)[1] - min(row) for row in expected],
        "min_pair": [min(abs(a - b) for a, b in itertools.combinations(r, 2)) for r in expected],
    }
    for kind, values in scores.items():
        found = uncertainty(z, centroids, kind)
        assert found.dtype == torch.float32
        assert torch.allclose(found, torch.tensor(values), atol=1e-6), kind
    assert torch.allclose(angles(z, centroids), torch.tensor(expected), atol=1e-6)
    nearest = torch.tensor([min(row) for row in expected])
    assert torch.allclose(distance_to_centroids(z, centroids), nearest, atol=1e-6)
    partner = unit(40, 16, 2)
    matched = torch.tensor(reference(z, partner)).diagonal()
    assert torch.allclose(representativeness(z, partner), matched, atol=1e-6)


def test_a_boundary_point_is_more_uncertain_than_a_central_one() -> None:
    centroids = torch.eye(4)
    boundary = torch.tensor([[1.0, 1.0, 0.0, 0.0]]) / math.sqrt(2)
    for kind in ("range", "margin"):
        assert uncertainty(boundary, centroids, kind) < uncertainty(centroids[:1], centroids, kind)


def test_small_angles_keep_their_digits_and_ends_stay_in_range() -> None:
    a = torch.tensor([[1.0, 0.0]])
    b = torch.tensor([[1.0, 1e-5]])
    assert representativeness(a, b).item() == pytest.approx(1e-5, rel=1e-4)
    ends = angles(a, torch.cat([a, -a]))
    assert ends[0, 0] == 0
    assert ends[0, 1].item() == pytest.approx(math.pi, abs=1e-6)
    assert ends[0, 1].double() <= math.pi


def test_scores_do_not_depend_on_the_other_images() -> None:
    z, centroids = unit(30, 32, 4), unit(4, 32, 5)
    together = uncertainty(z, centroids)
    alone = torch.cat([uncertainty(z[i : i + 1], centroids) for i in range(30)])
    assert torch.equal(together, alone)


def test_empty_pool_gives_empty_scores() -> None:
    z, centroids = torch.empty(0, 8), unit(3, 8, 0)
    assert uncertainty(z, centroids).shape == (0,)
    assert representativeness(z, z).shape == (0,)
    assert distance_to_centroids(z, centroids).shape == (0,)
