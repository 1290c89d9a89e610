import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from sonofed_client.enclave.forecast import MANY, _sample, asks, explain, questions, refusals
from sonofed_client.enclave.policy import Policy, read_policy
from sonofed_client.enclave.privacy import gaussian, privatise
from sonofed_client.enclave.release import release
from sonofed_client.enclave.rules import ActionRule, ArrayRule
from sonofed_client.enclave.scope import check_scope
from sonofed_common.contract import actions
from sonofed_common.contract.actions import ACTIONS
from sonofed_common.contract.errors import (
    ConfigurationError,
    DivergenceError,
    PolicyError,
    StudyDeniedError,
)
from sonofed_common.contract.records import Records
from sonofed_common.contract.study import ACTIVE_LEARNING, SEGMENTATION, Study

STANDARD = read_policy(None)
COMMON = {"study": "trial", "seed": 3}
LIMITS = {
    "name": "test",
    "received_bytes": 10**6,
    "message_bytes": 10**6,
    "study_bytes": 10**6,
    "day_bytes": 10**6,
}
WEIGHTS = {"key": "weights/*", "dtypes": ["float32", "int64"], "numbers": 10}
SMALL = {"key": "counts", "dtypes": ["int64"], "numbers": 9, "counts": True, "small": "zero"}
ROWS = {"key": "b", "dtypes": ["float64"], "numbers": 9}


def policy(action="train.classifier", limits=LIMITS, **rule):
    return Policy.model_validate({**limits, "actions": {action: rule}})


def let_out(rule, reply, action="train.classifier", start=None):
    return release(policy(action, **rule), action, reply, lambda: start or {})


def study(**values):
    values = {"phases": ACTIVE_LEARNING, "classifiers": (), **values}
    if "classifier" in values["phases"]:
        values["classifiers"] = ("shufflenet_v2",)
    return Study(name="trial", seed=3, cohort={"sites": ["north", "south"]}, **values)


def test_the_standard_policy_names_every_action():
    assert STANDARD.actions.keys() == ACTIONS.keys()
    assert len(STANDARD.digest()) == 64 and STANDARD.digest() == read_policy(None).digest()


RULE = {"arrays": [WEIGHTS], "config": {"examples": "count"}, "metrics": ["loss"]}


def test_a_small_pool_gives_no_moments_of_its_embeddings():
    rule = {
        "min_count": 5,
        "config": {"examples": "count"},
        "arrays": [{"key": key, "dtypes": ["float64"], "numbers": 9} for key in ("sum", "second")],
    }
    moments = {"sum": np.ones(3), "second": np.ones((3, 3))}
    with pytest.raises(PolicyError):
        let_out(rule, Records(moments, {"examples": 4}), "query.cluster")
    out = let_out(rule, Records(moments, {"examples": 5}), "query.cluster").records
    assert out.arrays.keys() == moments.keys()


names = st.one_of(
    st.sampled_from(["weights/a", "weights/", "weights", "loss", "examples", "seed", "weights/b"]),
    st.text(max_size=12),
)
numbers = st.one_of(
    st.integers(),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=3),
)
arrays = st.builds(
    lambda dtype, shape: np.ones(shape, dtype=dtype),
    st.sampled_from(["float32", "int64", "float64", "uint8", "bool", "float16"]),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
)


@settings(max_examples=400, deadline=None)
@given(
    st.dictionaries(names, arrays, max_size=3),
    st.dictionaries(names, numbers, max_size=3),
    st.dictionaries(names, numbers, max_size=3),
)
def test_nothing_that_is_not_named_ever_passes(held, config, metrics):
    reply = Records(held, config, metrics)
    named = all(n.startswith("weights/") for n in held)
    named &= set(config) <= {"examples"} and set(metrics) <= {"loss"}
    typed = all(a.dtype in (np.float32, np.int64) for a in held.values())
    typed &= sum(a.size for a in held.values()) <= WEIGHTS["numbers"]
    typed &= all(type(v) is int and 0 <= v < 2**63 for v in config.values())
    typed &= all(type(v) in (int, float) for v in metrics.values())
    typed &= all(abs(v) < 2**63 for v in metrics.values() if type(v) is int)
    if named and typed:
        out = let_out(RULE, reply).records
        assert out.arrays.keys() == held.keys() and out.config == config
        assert out.metrics == (metrics if config.get("examples", 0) >= 5 else {})
    else:
        with pytest.raises(PolicyError) as error:
            let_out(RULE, reply)
        # The sentence crosses the network: a name that nobody expected must not be in it.
        strangers = {*held, *config, *metrics} - {
            "examples",
            "loss",
            "weights",
            "weights/",
            "weights/a",
            "weights/b",
        }
        said = error.value.message
        words = set(re.findall(r"\w+", said))
        for name in strangers:
            # A short word of letters may well be part of one that the sentence has anyway.
            assert len(name) < 4 or name not in (words if name.isalpha() else said)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30), st.dictionaries(names, numbers, max_size=2))
def test_no_action_that_is_not_named_is_let_in_or_out(action, metrics):
    if action == "train.classifier":
        return
    with pytest.raises(PolicyError):
        release(policy(**RULE), action, Records(metrics=metrics), dict)
    with pytest.raises(PolicyError):
        policy(**RULE).admit(actions.Annotations(**COMMON), action, Records())


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("count", [0, 7], [-1, 1.0, "1", None, True, 2**63]),
        ("counts", [[], [1, 2]], [1, [0.5], "12", [[1]]]),
        ("digest", [None, "a" * 64], ["A" * 64, "a" * 63, 5, "a" * 64 + "\n"]),
        ("digests", [[], ["0" * 64]], ["0" * 64, ["x"]]),
        ("text", ["", "cpu", "NVIDIA H200 (SXM)"], ["a\nb", "x" * 129, 5, None, "é", "\x1b[1m"]),
        ("texts", [{}, {"torch": "2.13.0+cpu"}], [{"a": 1}, {"a": {"b": "c"}}, ["a"]]),
    ],
)
def test_facts_are_of_their_kind(kind, good, bad):
    rule = {"config": {"fact": kind}}
    for value in good:
        assert let_out(rule, Records(config={"fact": value})).records.config == {"fact": value}
    for value in bad:
        with pytest.raises(PolicyError, match="fact"):
            let_out(rule, Records(config={"fact": value}))


def test_small_counts_do_not_leave():
    rule = {
        "min_count": 5,
        "config": {"examples": "count", "selected": "counts"},
        "counted": ["images"],
        "arrays": [{"key": "counts", "dtypes": ["int64"], "numbers": 9, "counts": True}],
    }
    for reply in (
        Records(config={"examples": 4}),
        Records(config={"selected": [10, 1]}),
        Records(metrics={"images": 3.0}),
        Records({"counts": np.array([0, 4])}),
        Records({"counts": np.array([-1])}),
    ):
        with pytest.raises(PolicyError, match=r"small|count"):
            let_out(rule, reply)
    whole = Records({"counts": np.array([0, 5])}, {"examples": 0, "selected": [5]}, {"images": 9.0})
    assert let_out(rule, whole).records.metrics == {"images": 9.0}


def clusters(least):
    rows = {"key": "sums", "dtypes": ["float64"], "numbers": 1000}
    return {"min_count": least, "arrays": [rows, {**SMALL, "numbers": 99, "rows": ["sums"]}]}


def test_small_clusters_go_with_their_sums():
    reply = Records({"sums": np.ones((4, 2)), "counts": np.array([3, 2, 0, 1])})
    out = let_out(clusters(3), reply, "query.cluster").records.arrays
    assert out["counts"].tolist() == [3, 0, 0, 0]
    assert out["sums"].tolist() == [[1, 1], [0, 0], [1, 1], [0, 0]]
    assert reply.arrays["counts"].tolist() == [3, 2, 0, 1] and reply.arrays["sums"].all()


def test_counts_of_sums_that_do_not_come_are_held_back():
    with pytest.raises(PolicyError, match="sums"):
        let_out(clusters(3), Records({"counts": np.array([9, 1])}), "query.cluster")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(2, 7), st.integers(0, 9))
def test_the_rest_of_a_known_total_is_no_few_images(sizes, least, seed):
    # Whole numbers: a difference is exact, and 0 only of no image.
    vectors = [
        np.random.default_rng((seed, n)).integers(1, 99, (s, 3)) for n, s in enumerate(sizes)
    ]
    sums = np.array([v.sum(axis=0) for v in vectors], dtype=np.float64)
    counts = np.array(sizes)
    reply = Records({"sums": sums, "counts": counts})
    out = let_out(clusters(least), reply, "query.cluster").records.arrays
    hidden = sum(sizes) - out["counts"].sum()
    assert hidden == 0 or hidden >= least or not out["counts"].any()
    shown = out["counts"] > 0
    assert (out["counts"][shown] >= least).all() and (out["counts"] == counts)[shown].all()
    assert (out["sums"][shown] == sums[shown]).all() and not out["sums"][~shown].any()
    if (counts[counts > 0] >= least).all():
        assert np.array_equal(out["counts"], counts)


@pytest.mark.parametrize(
    ("config", "least", "leaves"),
    [
        ({"examples": 5}, 1, True),
        ({"examples": 4}, 1, False),
        ({}, 1, False),
        ({"examples": 40, "measured": 4}, 1, False),
        ({"examples": 40, "measured": 5}, 1, True),
        ({"examples": 40, "measured": 19}, 20, False),
        ({"examples": 40, "measured": 20}, 20, True),
        ({"examples": 40, "measured": 20.0}, 1, False),
    ],
)
def test_metrics_over_too_few_images_do_not_leave(config, least, leaves):
    rule = {"config": {"examples": "count"}, "metrics": ["auroc"], "counted": ["images"]}
    reply = Records(config=config, metrics={"auroc": 0.5, "images": 40})
    out = let_out({**rule, "min_count": least}, reply, "evaluate.classifier").records
    assert out.metrics == {"images": 40} | ({"auroc": 0.5} if leaves else {})
    assert out.config == {k: v for k, v in config.items() if k == "examples"}


def test_withheld_metrics_are_taken_out():
    out = let_out({"withheld": ["loss"]}, Records(metrics={"loss": 0.25})).records
    assert out.metrics == {}


START = {
    "weights/w": np.ones((2, 2), dtype=np.float32),
    "weights/n": np.array(7),
    "weights/running_var": np.zeros(2, dtype=np.float32),
}


def test_updates_are_clipped_by_their_common_change():
    rule = {"arrays": [{**WEIGHTS, "clip": 0.5}]}
    new = {
        "weights/w": START["weights/w"] + np.float32(3),
        "weights/n": np.array(9),
        "weights/running_var": np.full(2, 4, dtype=np.float32),
    }
    released = let_out(rule, Records(new), start=START)
    out = released.records.arrays
    change = [out[n].astype(float) - START[n] for n in ("weights/w", "weights/running_var")]
    assert math.isclose(sum((c**2).sum() for c in change), 0.25, rel_tol=1e-5)
    assert np.allclose(change[1] / change[0][0], 4 / 3, rtol=1e-4)
    assert out["weights/n"] == 7 and out["weights/w"].dtype == np.float32
    assert released.privacy == {"weights/* clip": 0.5, "weights/* noise": 0.0}
    assert new["weights/n"] == 9
    small = {**START, "weights/w": START["weights/w"] + np.float32(0.1)}
    out = let_out(rule, Records(small), start=START).records.arrays
    assert np.array_equal(out["weights/w"], small["weights/w"])


def test_what_cannot_be_clipped_does_not_leave():
    rule = {"arrays": [{**WEIGHTS, "clip": 0.5}]}
    for start in ({}, {"weights/w": START["weights/w"]}, {**START, "weights/n": np.zeros(2)}):
        with pytest.raises(PolicyError, match="start"):
            let_out(rule, Records(START), start=start)
    broken = {**START, "weights/w": np.full((2, 2), np.nan, dtype=np.float32)}
    with pytest.raises(DivergenceError):
        let_out(rule, Records(broken), start=START)


def test_noise_is_gaussian_and_never_the_same():
    drawn = gaussian(200_001)
    assert len(drawn) == 200_001 and np.isfinite(drawn).all()
    assert abs(drawn.mean()) < 0.02 and abs(drawn.std() - 1) < 0.01
    assert abs((np.abs(drawn) < 1).mean() - 0.6827) < 0.01
    assert abs((drawn**4).mean() - 3) < 0.15
    start = {"w": np.zeros(20_000, dtype=np.float32), "running_var": np.zeros(500)}
    first, second = (privatise(start, start, 2.0, 0.5) for _ in range(2))
    assert abs(first["w"].std() - 1.0) < 0.03
    assert (first["running_var"] >= 0).all()
    assert not np.array_equal(first["w"], second["w"])


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
    assert words.endswith("refused: train.embed")


def test_a_sample_holds_all_that_the_standard_policy_names():
    asked = study(phases=SEGMENTATION)
    for question in questions(asked):
        rule = STANDARD.actions[question.action]
        reply = _sample(question.action)
        assert reply.config.keys() == rule.config.keys()
        assert reply.metrics.keys() == {*rule.metrics, *rule.counted}
        assert all(reply.metrics[n] == MANY for n in rule.counted)


@pytest.mark.parametrize(
    ("action", "changes", "what"),
    [
        ("train.reconstruct", {"settings": {"steps": 77}}, "settings"),
        ("train.reconstruct", {"image_size": 512}, "image_size"),
        ("train.reconstruct", {"seed": 4}, "seed"),
        ("train.score", {"selection": {"budgets": [1.0]}}, "selection"),
        ("train.classifier", {"classifier": "densenet121"}, "classifier"),
        ("train.classifier", {"budget": 1}, "budget"),
        ("train.classifier", {"settings": {"local_epochs": 50}}, "settings"),
        ("train.embed", {"pairs": "augmentation"}, "pairs"),
    ],
)
def test_a_request_beyond_the_approved_study_is_refused(action, changes, what):
    asked = study()
    (question, *_) = [q for q in questions(asked) if q.action == action]
    values = question.parameters.model_dump() | changes
    with pytest.raises(StudyDeniedError, match=what):
        check_scope(asked, action, ACTIONS[action].model_validate(values))


def test_an_action_of_another_phase_is_refused():
    asked = study(phases=SEGMENTATION)
    for question in questions(study()):
        if question.action not in {q.action for q in questions(asked)}:
            with pytest.raises(StudyDeniedError, match="no phase"):
                check_scope(asked, question.action, question.parameters)


def test_the_example_of_the_page_is_a_policy(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "security.md"
    blocks = re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    (text,) = [block for block in blocks if "[actions." in block]
    path = tmp_path / "policy.toml"
    path.write_text(text, encoding="utf-8")
    rule = read_policy(path).actions["train.classifier"]
    assert rule.arrays[0].noise == 0.8 and rule.withheld == ("loss",)
    keys = {*ActionRule.model_fields, *ArrayRule.model_fields, *Policy.model_fields}
    described = page.read_text(encoding="utf-8")
    assert all(re.search(rf"\b{key}\b", described) for key in keys)
