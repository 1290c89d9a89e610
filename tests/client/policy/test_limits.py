import re
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from policy_rules import COMMON, LIMITS, SMALL, WEIGHTS, policy, study

from sonofed_client.enclave.forecast import questions
from sonofed_client.enclave.policy import Policy, read_policy
from sonofed_client.enclave.rules import ActionRule, ArrayRule
from sonofed_common.contract import actions
from sonofed_common.contract.errors import ConfigurationError, PolicyError
from sonofed_common.contract.records import Records

ROWS = {"key": "b", "dtypes": ["float64"], "numbers": 9}


def test_parameters_are_limited():
    values = {
        **COMMON,
        "bundle": "0" * 64,
        "image_size": 32,
        "classifier": "shufflenet_v2",
        "round": 0,
        "budget": 0,
    }
    limits = {
        "settings.local_epochs": {"most": 3},
        "classifier": {"values": ["shufflenet_v2"]},
        "image_size": {"least": 32},
    }
    own = policy(parameters=limits)

    def ask(**changes):
        parameters = actions.TrainClassifier(**values | {"settings": {}} | changes)
        own.admit(parameters, "train.classifier", Records())

    ask()
    for changes in (
        {"settings": {"local_epochs": 4}},
        {"classifier": "densenet121"},
        {"image_size": 16},
    ):
        with pytest.raises(PolicyError, match="policy refuses the"):
            ask(**changes)


def test_a_limit_holds_for_each_entry_of_a_list():
    own = policy("train.score", parameters={"selection.budgets": {"most": 0.2}})
    for question in questions(study(selection={"budgets": [0.1, 0.3]})):
        if question.action == "train.score":
            with pytest.raises(PolicyError, match=r"selection\.budgets"):
                own.admit(question.parameters, "train.score", Records())


def test_secure_aggregation_and_size_are_required():
    asked = actions.Annotations(**COMMON)
    with pytest.raises(PolicyError, match="secure aggregation"):
        policy("query.annotations", secure_aggregation=True).admit(
            asked, "query.annotations", Records()
        )
    with pytest.raises(PolicyError, match="too large"):
        policy("query.annotations").admit(
            asked,
            "query.annotations",
            Records({"a": np.zeros(10**6, dtype=np.uint8) + 1, "b": np.ones(1)}),
        )


@pytest.mark.parametrize(
    ("spent", "budget"),
    [((101, 0, 0), "message"), ((100, 10**6, 0), "study"), ((100, 0, 10**6), "day")],
)
def test_budgets_hold(spent, budget):
    own = policy(message_bytes=100)
    own.check_bytes("train.classifier", 100, 10**6 - 100, 10**6 - 100)
    with pytest.raises(PolicyError, match=f"per {budget}") as error:
        own.check_bytes("train.classifier", *spent)
    assert error.value.rule == f"{budget}_bytes"


@pytest.mark.parametrize(
    ("rule", "hint"),
    [
        ({"parameters": {"settings.epochs": {"most": 3}}}, "settings.epochs"),
        ({"arrays": [{**WEIGHTS, "key": "*"}]}, "exact name"),
        ({"arrays": [{**WEIGHTS, "key": "w*ts"}]}, "exact name"),
        ({"arrays": [{**WEIGHTS, "noise": 1.0}]}, "noise needs a clip"),
        ({"arrays": [{**WEIGHTS, "clip": 1.0, "noise": 1.0}]}, "noise and releases"),
        ({"arrays": [WEIGHTS], "releases": 5}, "noise and releases"),
        ({"arrays": [WEIGHTS, WEIGHTS]}, "one rule for each key"),
        ({"arrays": [{**WEIGHTS, "small": "zero"}], "min_count": 5}, "counts = true"),
        ({"arrays": [{**WEIGHTS, "counts": True, "rows": ["b"]}]}, "small = 'zero'"),
        ({"arrays": [{**SMALL, "rows": ["c"]}, ROWS], "min_count": 5}, "'c'"),
        ({"arrays": [{**SMALL, "rows": ["counts"]}, ROWS], "min_count": 5}, "'counts'"),
        ({"arrays": [SMALL, ROWS], "min_count": 5}, "name what goes with them"),
        ({"arrays": [{**SMALL, "rows": ["b"]}, ROWS]}, "give the action a min_count"),
        ({"parameters": {"seed": {}}}, "limits nothing"),
        ({"parameters": {"seed": {"values": []}}}, "limits nothing"),
        ({"parameters": {"seed": {"least": 2, "most": 1}}}, "least is above most"),
        ({"metrics": ["loss"], "withheld": ["loss"]}, "once"),
        ({"metric": ["loss"]}, "metrics"),
    ],
)
def test_a_policy_is_read_strictly(tmp_path, rule, hint):
    path = tmp_path / "policy.toml"
    path.write_text(tomli_w.dumps({**LIMITS, "actions": {"train.classifier": rule}}))
    with pytest.raises(ConfigurationError, match=hint.replace(".", r"\.")):
        read_policy(path)
    path.write_text(tomli_w.dumps({**LIMITS, "actions": {"train.images": {}}}))
    with pytest.raises(ConfigurationError, match=r"train\.images.*no action"):
        read_policy(path)


def test_the_example_of_the_page_is_a_policy(tmp_path):
    page = Path(__file__).parents[3] / "docs" / "security.md"
    blocks = re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    (text,) = [block for block in blocks if block.startswith('name = "ours"')]
    path = tmp_path / "policy.toml"
    path.write_text(text, encoding="utf-8")
    rule = read_policy(path).actions["train.classifier"]
    assert rule.arrays[0].noise == 0.8 and rule.withheld == ("loss",)
    keys = {*ActionRule.model_fields, *ArrayRule.model_fields, *Policy.model_fields}
    described = page.read_text(encoding="utf-8")
    assert all(re.search(rf"\b{key}\b", described) for key in keys)
