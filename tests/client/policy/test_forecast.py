import json

import pytest
from policy_rules import STANDARD, study

from sonofed_client.enclave.forecast import (
    MANY,
    _sample,
    asks,
    declines,
    explain,
    questions,
    refusals,
)
from sonofed_client.enclave.policy import Policy, policy_of_all
from sonofed_client.enclave.scope import check_scope
from sonofed_common.contract.records import Records
from sonofed_common.contract.study import ACTIVE_LEARNING, SEGMENTATION


@pytest.mark.parametrize("phases", [ACTIVE_LEARNING, SEGMENTATION])
def test_the_standard_policy_takes_every_question_of_a_study(phases):
    asked = study(phases=phases)
    for question in questions(asked):
        check_scope(asked, question.action, question.parameters)
        STANDARD.admit(question.parameters, question.action, Records())
    words = "\n".join(asks(study(phases=SEGMENTATION), STANDARD, 20))
    assert "weights/*" in words and "refuse" not in words


def test_the_forecast_names_what_is_refused():
    values = json.loads(STANDARD.model_dump_json())
    del values["actions"]["train.pretrain"]
    values["actions"]["evaluate.segmenter"]["metrics"].remove("dice")
    values["actions"]["train.segmenter"]["parameters"] = {"settings.rounds": {"most": 1}}
    found = refusals(study(phases=SEGMENTATION), Policy.model_validate(values))
    assert [line.partition(":")[0] for line in found] == [
        "train.pretrain",
        "train.segmenter",
        "evaluate.segmenter",
    ]
    assert "metric" in found[2] and "settings.rounds" in found[1]


def test_the_forecast_knows_that_the_exact_selection_needs_single_counts():
    values = json.loads(STANDARD.model_dump_json())
    values["actions"]["query.histogram"]["min_count"] = 2
    phases = ("enrol", "ship", "select", "annotate")
    asked = study(phases=phases, selection={"strategy": "random"})
    (line,) = refusals(asked, Policy.model_validate(values))
    assert "query.histogram" in line and "too small" in line
    assert refusals(asked, STANDARD) == []


def test_a_site_that_lets_out_no_single_count_can_take_part_with_typiclust():
    values = json.loads(STANDARD.model_dump_json())
    values["actions"]["query.histogram"]["min_count"] = 20
    asked = study(
        phases=("enrol", "ship", "select", "annotate"),
        classifiers=("shufflenet_v2",),
        selection={"strategy": "typiclust", "budgets": (0.25,)},
    )
    assert refusals(asked, Policy.model_validate(values)) == []
    words = "\n".join(asks(asked, STANDARD, 44))
    assert "whatever the coordinator asks: 11 of this site's 44" in words
    assert "query.histogram" not in words


def test_the_forecast_counts_noised_replies():
    values = json.loads(STANDARD.model_dump_json())
    rule = values["actions"]["train.pretrain"]
    rule["arrays"][0] |= {"clip": 1.0, "noise": 0.8}
    asked = study(phases=("enrol", "ship", "pretrain"), pretraining={"rounds": 7})
    for releases, said in ((7, []), (6, ["train.pretrain: asked 7 times, above releases = 6"])):
        rule["releases"] = releases
        assert refusals(asked, Policy.model_validate(values)) == said


def narrower(changes, **limits):
    values = json.loads(STANDARD.model_dump_json()) | limits
    for action, rule in changes.items():
        values["actions"][action] |= rule
    return Policy.model_validate(values)


@pytest.mark.parametrize(
    ("action", "limit", "asked"),
    [
        ("train.segmenter", {"branch": {"values": ["source"]}}, {"phases": SEGMENTATION}),
        ("train.ensemble", {"branches": {"values": ["source"]}}, {"phases": SEGMENTATION}),
        ("train.pretrain", {"round": {"most": 0}}, {"phases": SEGMENTATION}),
        ("train.embed", {"round": {"least": 1}}, {}),
        ("train.embed", {"round": {"most": 0}}, {}),
    ],
)
def test_the_forecast_tries_each_choice_and_the_first_and_last_round(action, limit, asked):
    asked = study(**asked, infusion={"calibration": "consensus"})
    found = refusals(asked, narrower({action: {"parameters": limit}}))
    assert {line.partition(":")[0] for line in found} == {action}
    assert next(iter(limit)) in found[0]


def test_the_forecast_knows_how_large_clusters_are():
    asked = study(embedding={"dimension": 64}, clustering={"clusters": 5})
    rule = json.loads(STANDARD.model_dump_json())["actions"]["query.cluster"]
    for number, key, size in ((0, "sum", 64), (1, "second", 64**2), (2, "sums", 320)):
        arrays = [dict(own) for own in rule["arrays"]]
        for numbers, refused in ((size, False), (size - 1, True)):
            arrays[number]["numbers"] = numbers
            found = refusals(asked, narrower({"query.cluster": {"arrays": arrays}}))
            assert [f"query.cluster.arrays.{key})" in line for line in found] == [True] * refused


def test_the_forecast_knows_how_large_requests_are():
    asked = study(finetuning={"rounds": 2})
    found = refusals(asked, narrower({}, received_bytes=10**6))
    refused = {line.partition(":")[0] for line in found}
    assert refused == {"train.embed", "query.cluster", "train.classifier", "evaluate.classifier"}
    # A single round starts from what the site has.
    found = refusals(study(embedding={"rounds": 1}), narrower({}, received_bytes=10**6))
    assert "train.embed" not in {line.partition(":")[0] for line in found}


@pytest.mark.parametrize(
    ("strategy", "key", "left"),
    [("scaffold", "arrays", slice(1)), ("feddg_ga", "metrics", slice(2))],
)
def test_the_forecast_knows_what_a_strategy_lets_leave(strategy, key, left):
    plain = {"finetuning": {"optimizer": "sgd"}}
    asked = study(**plain, aggregation={"strategy": strategy})
    assert refusals(asked, STANDARD) == []
    rule = json.loads(STANDARD.model_dump_json())["actions"]["train.classifier"]
    own = narrower({"train.classifier": {key: rule[key][left]}})
    (line,) = refusals(asked, own)
    assert line.startswith("train.classifier: ") and "the policy does not name" in line
    assert refusals(study(**plain), own) == []


def test_the_forecast_adds_up_what_leaves_in_a_day():
    (line,) = refusals(study(), narrower({}, day_bytes=10**7))
    assert "day_bytes = 10000000" in line and "within a day" in line


def test_a_policy_is_explained():
    values = json.loads(STANDARD.model_dump_json())
    del values["actions"]["train.embed"]
    values["actions"]["train.classifier"]["arrays"][0] |= {"clip": 1.0, "noise": 0.8}
    values["actions"]["train.classifier"]["releases"] = 40
    values["actions"]["train.classifier"]["parameters"] = {"settings.local_epochs": {"most": 5}}
    words = "\n".join(explain(Policy.model_validate(values)))
    assert "clipped to 1, noise 0.8" in words and "at most 40 replies with noise" in words
    assert "settings.local_epochs at most 5" in words
    assert words.endswith("refused: train.embed, train.synthesise")


def test_a_sample_holds_all_that_the_standard_policy_names():
    asked = study(phases=SEGMENTATION)
    for question in questions(asked):
        rule = STANDARD.actions[question.action]
        reply = _sample(question.action)
        assert reply.config.keys() == rule.config.keys()
        assert reply.metrics.keys() == {*rule.metrics, *rule.counted}
        assert all(reply.metrics[n] == MANY for n in rule.counted)


def test_synthetic_images_are_told_before_they_are_asked():
    phases = ("enrol", "ship", "select", "annotate", "synthesise", "classifier")
    selection, shared = {"strategy": "random"}, {"replay": 1.0}
    asked = study(phases=phases, selection=selection, finetuning=shared)
    (line,) = declines(asked, STANDARD)
    assert line.startswith("train.synthesise: this site's policy does not allow")
    assert "- train.synthesise (1 time): refused" in "\n".join(asks(asked, STANDARD, 20))
    # A study goes on without them.
    assert refusals(asked, STANDARD) == [] == declines(asked, policy_of_all())
    words = "\n".join(asks(asked, policy_of_all(), 20))
    assert "images (uint8, at most 10000000 numbers)" in words
    more = study(
        phases=phases, selection=selection, finetuning=shared, synthesis={"per_class": 1001}
    )
    (line,) = declines(more, policy_of_all())
    assert "settings.per_class" in line
    values = json.loads(policy_of_all().model_dump_json())
    values["actions"]["train.synthesise"]["message_bytes"] = 2 * 50 * 64 * 64
    (line,) = declines(asked, Policy.model_validate(values))
    assert "exceeds what this site's policy lets leave per message" in line
