"""TypiClust and entropy, against the libraries that have them too."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy as shannon
from skactiveml.pool import TypiClust

from sonofed_client.adaptation.entropy import certainty, entropy
from sonofed_client.adaptation.typiclust import places, typicality, typiclust


def unit(images: int, seed: int, width: int = 16) -> np.ndarray:
    vectors = np.random.default_rng(seed).uniform(0, 1, (images, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(8))
def test_the_choices_are_those_of_scikit_activeml(seed: int) -> None:
    draws = np.random.default_rng(seed)
    features = unit(40 + seed, seed)
    labelled = np.sort(draws.permutation(len(features))[: 3 * (seed % 4)])
    marks = np.full(len(features), np.nan)
    marks[labelled] = 1
    count = 4 + 2 * seed
    expected = TypiClust(random_state=seed).query(features, marks, batch_size=count)
    assert typiclust(features, labelled, count, seed).tolist() == expected.tolist()


def test_copies_are_not_chosen_twice() -> None:
    # Three different images among twelve: k-means finds no more clusters than these.
    features = unit(3, 0)[np.arange(12) % 3]
    with pytest.warns(UserWarning, match="distinct clusters"):
        chosen = typiclust(features, np.array([4]), 8, 0)
    assert len(set(chosen.tolist())) == 8 and 4 not in chosen
    assert sorted((chosen[:2] % 3).tolist()) == [0, 2]


def test_typicality_is_the_inverse_mean_distance_to_the_nearest() -> None:
    line = np.array([[0.0], [1.0], [3.0], [7.0], [12.0], [20.0], [40.0]])
    expected = [5 / (1 + 3 + 7 + 12 + 20), 5 / (1 + 2 + 6 + 11 + 19), 5 / (2 + 3 + 4 + 9 + 17)]
    assert typicality(line)[:3] == pytest.approx(expected)
    assert typicality(line[:2]) == pytest.approx([1, 1]) and typicality(line[:1]).tolist() == [1]


@settings(max_examples=25)
@given(st.integers(1, 30), st.sets(st.integers(1, 30), min_size=1, max_size=3), st.integers(0, 9))
def test_places_nest_the_budgets_and_repeat(images: int, sizes: set[int], seed: int) -> None:
    features, budgets = unit(images, seed, 4), sorted({min(size, images) for size in sizes})
    found = places(features, budgets, seed)
    order = np.argsort(found, kind="stable")
    assert found[order[: budgets[-1]]].tolist() == list(range(budgets[-1]))
    assert (found[order[budgets[-1] :]] == images).all()
    assert np.array_equal(found, places(features, budgets, seed))
    # A larger budget changes nothing about what a smaller one chose.
    fewer = places(features, budgets[:1], seed)
    assert np.array_equal(fewer < budgets[0], found < budgets[0])


def test_entropy_is_shannons() -> None:
    logits = np.random.default_rng(0).normal(scale=3, size=(50, 3)).astype(np.float32)
    predictions = softmax(logits.astype(np.float64), axis=1)
    assert entropy(predictions) == pytest.approx(shannon(predictions, axis=1))
    assert certainty(logits) == pytest.approx(np.log(3) - shannon(predictions, axis=1))


def test_the_least_certain_image_is_the_undecided_one() -> None:
    found = certainty(np.array([[9.0, -9.0], [0.1, 0.1], [0.0, 1.0], [-900.0, 900.0]]))
    assert np.argsort(found).tolist() == [1, 2, 0, 3]
    assert found.min() == pytest.approx(0) and (found >= 0).all()
    assert found[3] == pytest.approx(np.log(2))
