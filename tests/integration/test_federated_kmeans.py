"""Federated spherical k-means equals the pooled one, and that one a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sonofed_client.adaptation.clustering import cluster_sums, moments
from sonofed_common.contract.errors import ParameterError, SiteEmptyError
from sonofed_server.phases.clustering_math import (
    initial_centroids,
    largest_move,
    update_centroids,
)


def points(count: int, dimension: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, dimension, generator=generator) * 2
    chosen = torch.randint(5, (count,), generator=generator)
    noise = torch.randn(count, dimension, generator=generator)
    return torch.nn.functional.normalize(centres[chosen] + noise, dim=1)


def federated(sites, clusters: int, iterations: int = 20) -> np.ndarray:
    parts = [(total.numpy(), second.numpy(), count) for total, second, count in map(moments, sites)]
    total, second = sum(p[0] for p in parts), sum(p[1] for p in parts)
    centroids = initial_centroids(total, second, sum(p[2] for p in parts), clusters)
    for _ in range(iterations):
        answers = [cluster_sums(z, torch.from_numpy(centroids)) for z in sites]
        new = update_centroids(
            sum(a[0].numpy() for a in answers), sum(a[1].numpy() for a in answers), centroids
        )
        moved, centroids = largest_move(centroids, new), new
        if moved < 1e-9:
            break
    return centroids


def plain(z: np.ndarray, centroids: np.ndarray, iterations: int) -> np.ndarray:
    centroids = centroids.copy()
    for _ in range(iterations):
        members = [[] for _ in centroids]
        for point in z:
            cosines = [float(point @ centroid) for centroid in centroids]
            members[cosines.index(max(cosines))].append(point)
        for j, member in enumerate(members):
            if member:
                total = np.sum(member, axis=0)
                centroids[j] = total / np.sqrt((total**2).sum())
    return centroids


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([0, 0, 1, 2, 30]), min_size=1, max_size=6).filter(any),
    st.integers(2, 5),
    st.integers(0, 10**6),
)
def test_federated_equals_pooled(sizes, clusters, seed) -> None:
    z = points(sum(sizes), 8, seed)
    sites = z.split(sizes)
    together = federated([z], clusters)
    assert np.allclose(federated(sites, clusters), together, atol=1e-6)
    assert np.allclose(federated(sites[::-1], clusters), together, atol=1e-6)
    assert np.allclose(np.linalg.norm(together, axis=1), 1)


def test_pooled_agrees_with_a_plain_loop() -> None:
    z = points(120, 6, 3)
    total, second, count = moments(z)
    start = initial_centroids(total.numpy(), second.numpy(), count, 4)
    expected = plain(z.double().numpy(), start, 20)
    assert np.allclose(federated([z], 4), expected, atol=1e-9)


def test_initial_centroids_lie_on_the_principal_directions() -> None:
    z = points(200, 5, 1).double()
    total, second, count = moments(z)
    start = initial_centroids(total.numpy(), second.numpy(), count, 3)
    mean = z.mean(dim=0)
    _, deviations, directions = torch.linalg.svd(z - mean, full_matrices=False)
    for j, (row, axis) in enumerate([(0, 0), (1, 0), (2, 1)]):
        shift = directions[axis] * deviations[axis] / np.sqrt(count)
        candidates = [torch.nn.functional.normalize(mean + s * shift, dim=0) for s in (1, -1)]
        best = min(float((torch.from_numpy(start[row]) - c).norm()) for c in candidates)
        assert best < 1e-6, j
    assert largest_move(start[:1], start[1:2]) > 0.1


def test_equal_principal_directions_do_not_depend_on_the_sites() -> None:
    z = torch.eye(4)[[0, 1, 2, 3, 0, 1, 2, 3]].float()
    turned = z @ torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    for cloud in (z, turned):
        assert np.allclose(
            federated(cloud.split([3, 0, 1, 4]), 4), federated([cloud], 4), atol=1e-6
        )


def test_empty_cluster_keeps_its_centroid() -> None:
    old = np.eye(3)
    sums = np.array([[0.0, 2.0, 0.0], [9.0, 9.0, 9.0], [0.0, 0.0, 0.0]])
    new = update_centroids(sums, np.array([2, 0, 2]), old)
    assert new.tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert largest_move(old, new) == pytest.approx(np.pi / 2)


def test_antipodal_points_give_unit_centroids() -> None:
    z = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]])
    total, second, count = moments(z)
    start = initial_centroids(total.numpy(), second.numpy(), count, 4)
    assert np.allclose(np.linalg.norm(start, axis=1), 1)
    assert sorted(start[:2, 0].tolist()) == [-1, 1]


def test_no_images_and_too_many_clusters_are_refused() -> None:
    with pytest.raises(SiteEmptyError):
        initial_centroids(np.zeros(3), np.zeros((3, 3)), 0, 2)
    with pytest.raises(ParameterError):
        initial_centroids(np.zeros(3), np.zeros((3, 3)), 5, 7)
