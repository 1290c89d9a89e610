import pytest
from pydantic import ValidationError

from sonofed_common.contract.study import ACTIVE_LEARNING, SEGMENTATION, Study

LOCAL = {"batch_norm": "local"}
SGD = {"optimizer": "sgd", "learning_rate": 0.05}


def study(strategy, phases=ACTIVE_LEARNING, quorum=None, finetuning=None, **settings):
    return Study(
        name="trial",
        cohort={"sites": ["north", "south"], "quorum": quorum},
        phases=phases,
        finetuning=finetuning or {},
        aggregation={"strategy": strategy, **settings},
    )


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedadam", "feddg_ga"])
def test_a_study_may_name_a_strategy(strategy):
    assert study(strategy).aggregation.strategy == strategy


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"strategy": "scaffold"}, "set finetuning.optimizer = 'sgd'"),
        ({"strategy": "scaffold", "finetuning": SGD, "quorum": 1}, "leave cohort.quorum out"),
        ({"strategy": "fedprox", "phases": SEGMENTATION}, "phase 'pretrain' averages segmenters"),
        ({"strategy": "fedadam", "phases": ("enrol", "ship")}, "would do nothing"),
        ({"strategy": "fedprox", "finetuning": LOCAL}, "is of whole networks"),
        ({"strategy": "fedavg", "mu": 0.1}, "mu would do nothing: it is of strategy 'fedprox'"),
        ({"strategy": "fedprox", "server_learning_rate": 0.1}, "is of strategy 'fedadam'"),
    ],
)
def test_what_a_strategy_cannot_work_with_is_refused(wanted, said):
    with pytest.raises(ValidationError, match=said):
        study(**wanted)


def test_scaffold_takes_plain_steps_of_all_sites():
    for quorum in (None, 2):
        assert study("scaffold", quorum=quorum, finetuning=SGD).aggregation.strategy == "scaffold"
