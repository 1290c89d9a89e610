import numpy as np
import pytest
import torch
from enclave_talk import COMMON, NO_CUTS, RADIANS, encode, evaluation, fine_tuning, talk

from sonofed_client.adaptation.evaluation import evaluate
from sonofed_client.adaptation.ranking import keys
from sonofed_client.enclave.enclave import InProcessEnclave
from sonofed_client.enclave.site import load_weights, weights_of
from sonofed_client.enclave.store import Store
from sonofed_common.contract import actions
from sonofed_common.contract.actions import request
from sonofed_common.contract.errors import ConfigurationError, DivergenceError, ParameterError
from sonofed_common.contract.selection import WHOLE
from sonofed_common.contract.study import Selection


@pytest.mark.parametrize(
    ("action", "make"),
    [
        ("train.classifier", lambda b: request(fine_tuning(b), weights={"w": np.ones(2)})),
        ("train.classifier", lambda b: request(fine_tuning(b, budget=1))),
        ("evaluate.classifier", lambda b: request(evaluation(b, classifier="densenet121"))),
        ("query.cluster", lambda b: request(actions.Cluster(**encode(b)))),
        ("query.cluster", lambda b: request(actions.Cluster(**encode(b)), centroids=np.eye(2, 9))),
        (
            "train.score",
            lambda b: request(
                actions.Score(**encode(b), selection=RADIANS), centroids=np.eye(2, 9)
            ),
        ),
        ("train.score", lambda b: request(actions.Score(**encode(b), selection=RADIANS))),
        ("train.select", lambda b: request(actions.Select(**COMMON, stage="mark"))),
        ("train.select", lambda b: request(actions.Select(**COMMON, stage="mark"), cuts=NO_CUTS)),
        (
            "query.histogram",
            lambda b: request(actions.Histogram(**COMMON, column="identity", split=2)),
        ),
        (
            "query.histogram",
            lambda b: request(
                actions.Histogram(**COMMON, column="identity", split=2),
                edges=WHOLE["identity"],
                cuts=NO_CUTS,
            ),
        ),
        (
            "train.select",
            lambda b: request(actions.Select(**COMMON, stage="mark"), cuts=np.array(np.uint64(1))),
        ),
        (
            "query.cluster",
            lambda b: request(actions.Cluster(**encode(b)), centroids=2 * np.eye(2, 8)),
        ),
        (
            "query.cluster",
            lambda b: request(
                actions.Cluster(**encode(b)), centroids=np.tile(np.eye(1, 8), (65, 1))
            ),
        ),
    ],
)
def test_records_that_do_not_fit_are_refused(talked, bundle, action, make):
    with pytest.raises(ParameterError):
        talked.perform(action, make(bundle))


def test_an_unknown_classifier_is_refused(talked, bundle):
    with pytest.raises((ParameterError, ConfigurationError), match="shufflenet_v2"):
        talked.perform(
            "evaluate.classifier", request(evaluation(bundle, classifier="shufflenetv2"))
        )


def test_pooled_ranks_that_do_not_fit_are_refused_and_not_kept(site, bundle):
    enclave = InProcessEnclave(site)
    talk(enclave, bundle)
    ranked = Selection(budgets=(1.0,))
    scoring = actions.Score(**encode(bundle), selection=ranked)
    enclave.perform("train.score", request(scoring, centroids=np.eye(2, 8)))
    one = {"starts": np.zeros(1, dtype=np.uint64), "cumulative": np.array([0, 12])}
    bad = [
        {},
        {"uncertainty/starts": one["starts"]},
        {
            f"{c}/{k}": v.astype(float)
            for c in ("uncertainty", "representativeness")
            for k, v in one.items()
        },
    ]
    for ranks in bad:
        with pytest.raises(ParameterError):
            enclave.perform(
                "train.select", request(actions.Select(**COMMON, stage="rank"), ranks=ranks)
            )
    question = actions.Histogram(**COMMON, column="uncertainty", split=2)
    reply = enclave.perform(
        "query.histogram", request(question, edges=WHOLE["uncertainty"], cuts=NO_CUTS)
    )
    assert reply.arrays["counts"].sum() == len(Store(site.store).images("pool"))


def test_the_ranks_of_a_selection_come_once(site, bundle):
    enclave = InProcessEnclave(site)
    talk(enclave, bundle)
    settings = Selection(combine="rank", budgets=(1.0,))
    scoring = request(actions.Score(**encode(bundle), selection=settings), centroids=np.eye(2, 8))

    def send(change):
        arrays = {}
        for column, scores in Store(site.store).get("study/trial/scores").arrays.items():
            starts, sizes = np.unique(keys(scores), return_counts=True)
            sizes[-1] += change
            cumulative = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
            arrays |= {f"{column}/starts": starts, f"{column}/cumulative": cumulative}
        message = request(actions.Select(**COMMON, stage="rank"), ranks=arrays)
        return enclave.perform("train.select", message)

    enclave.perform("train.score", scoring)
    for _ in range(2):
        send(0)
    with pytest.raises(ParameterError, match="score again"):
        send(1)
    enclave.perform("train.score", scoring)
    send(1)


def test_weights_of_another_type_or_with_a_negative_variance_are_refused():
    model = torch.nn.BatchNorm1d(2)
    good = weights_of(model)
    load_weights(model, good)
    bad = {
        "weight": good["weight"].astype(np.float64),
        "running_var": np.array([1, -1], dtype=np.float32),
    }
    for name, array in bad.items():
        with pytest.raises(ParameterError):
            load_weights(model, {**good, name: array})


def test_predictions_that_are_no_numbers_are_a_divergence():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    torch.nn.init.constant_(model[1].bias, float("nan"))
    with pytest.raises(DivergenceError):
        evaluate(model, torch.zeros(2, 1, 2, 2), [0, 1], ["a", "b"], None, 0, 0)
