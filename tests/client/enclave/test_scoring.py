"""Scores of the start model: what an enclave chooses by them, keeps and lets out."""

import numpy as np
import pytest
import torch
from enclave_talk import COMMON, NETWORK, NO_CUTS, encode, install
from scipy.special import softmax
from scipy.stats import entropy

from sonofed_client.adaptation.typiclust import places
from sonofed_client.enclave.enclave import InProcessEnclave
from sonofed_client.enclave.handlers.selection import selected
from sonofed_client.enclave.store import Store
from sonofed_common.batch_norm import adapt_batch_norm
from sonofed_common.contract import actions
from sonofed_common.contract.actions import request
from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.records import to_bytes
from sonofed_common.contract.selection import WHOLE
from sonofed_common.contract.study import Selection
from sonofed_common.runtime import derive_seed

TYPICAL = Selection(strategy="typiclust", budgets=(0.2, 0.6))
UNDECIDED = Selection(strategy="entropy", budgets=(0.5,))


@pytest.fixture
def enclave(site, bundle):
    opened = InProcessEnclave(site.model_copy(update={"image_key": "0" * 64}))
    install(opened, bundle)
    return opened


def score(enclave, bundle, selection, batch_norm="site"):
    scoring = actions.Score(**encode(bundle), selection=selection, batch_norm=batch_norm)
    return enclave.perform("train.score", request(scoring))


def mark(enclave):
    message = request(actions.Select(**COMMON, stage="mark"), cuts=NO_CUTS)
    return enclave.perform("train.select", message)


def kept(enclave):
    return enclave.site.store.get("study/trial/scores").arrays["informativeness"]


def start_model(site, bundle, batch_norm):
    """The bundle's network on the pool, by torch alone: features and logits."""
    _, images = site.images("pool", 32)
    model = site.classifier(bundle.id, NETWORK).eval()
    if batch_norm == "site":
        adapt_batch_norm(model, images)
    with torch.no_grad():
        return model.features(images).numpy(), model(images).numpy().astype(np.float64)


def test_entropy_is_of_what_the_start_model_predicts_with_the_studys_statistics(enclave, bundle):
    found = {}
    for batch_norm in ("site", "global"):
        reply = score(enclave, bundle, UNDECIDED, batch_norm)
        _, logits = start_model(enclave.site, bundle, batch_norm)
        expected = np.log(2) - entropy(softmax(logits, axis=1), axis=1)
        assert kept(enclave) == pytest.approx(expected, abs=1e-5)
        assert reply.config == {"examples": len(expected)}
        found[batch_norm] = kept(enclave)
    assert not np.allclose(found["site"], found["global"])


def test_typiclust_takes_its_share_of_each_budget_by_the_start_models_features(enclave, bundle):
    score(enclave, bundle, TYPICAL)
    small, large = mark(enclave).config["selected"]
    ids = [row.id for row in enclave.site.store.images("pool")]
    assert (small, large) == (round(0.2 * len(ids)), round(0.6 * len(ids)))
    features, _ = start_model(enclave.site, bundle, "site")
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    order = np.argsort(places(unit, (small, large), derive_seed(3, 0, "north", "typiclust")))
    first, both = selected(enclave.site, "trial")
    assert both == [ids[n] for n in order[:large]] and first == both[:small]


@pytest.mark.parametrize("selection", [TYPICAL, UNDECIDED])
def test_an_enclave_that_was_killed_chooses_the_same(enclave, bundle, site, tmp_path, selection):
    score(enclave, bundle, selection)
    scores = to_bytes(enclave.site.store.get("study/trial/scores"))
    same = enclave.site.settings
    again = InProcessEnclave(same)
    assert to_bytes(again.site.store.get("study/trial/scores")) == scores
    # As one that was killed before it had kept them, and one that starts with nothing.
    score(again, bundle, selection)
    other = InProcessEnclave(same.model_copy(update={"store": tmp_path / "other"}))
    install(other, bundle)
    score(other, bundle, selection)
    for restarted in (again, other):
        assert to_bytes(restarted.site.store.get("study/trial/scores")) == scores


def test_nothing_of_it_leaves_but_numbers_of_images(enclave, bundle):
    pool = len(enclave.site.store.images("pool"))
    chance = Selection(strategy="random", scope="per_site", budgets=(0.2, 0.6))
    sent = []
    for selection in (chance, TYPICAL):
        replies = [score(enclave, bundle, selection), mark(enclave)]
        assert replies[0].config == {"examples": pool}
        assert replies[1].config.keys() == {"selected"}
        assert not any(reply.arrays or reply.metrics for reply in replies)
        sent.append([to_bytes(reply) for reply in replies])
    # To the byte what a random draw of the same sizes answers.
    assert sent[0] == sent[1]


def test_the_order_of_a_site_cannot_be_asked_for(enclave, bundle):
    score(enclave, bundle, TYPICAL)
    for column in WHOLE:
        question = actions.Histogram(**COMMON, column=column, split=2, tied=0)
        with pytest.raises(ParameterError):
            enclave.perform("query.histogram", request(question, edges=WHOLE[column], cuts=NO_CUTS))


def test_counts_of_the_entropy_are_of_the_pool(enclave, bundle):
    score(enclave, bundle, UNDECIDED)
    question = actions.Histogram(**COMMON, column="informativeness", split=2**10)
    message = request(question, edges=WHOLE["informativeness"], cuts=NO_CUTS)
    counts = enclave.perform("query.histogram", message).arrays["counts"]
    assert counts.sum() == len(Store(enclave.site.settings.store).images("pool"))
    for column in ("uncertainty", "representativeness"):
        question = actions.Histogram(**COMMON, column=column, split=2)
        with pytest.raises(ParameterError, match="does not score"):
            enclave.perform("query.histogram", request(question, edges=WHOLE[column], cuts=NO_CUTS))
