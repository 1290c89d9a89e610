"""What a study asks: shown to the hospital, and exactly that is answered."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sonofed_client.enclave.forecast import asks
from sonofed_client.enclave.policy import read_policy
from sonofed_client.enclave.questions import questions
from sonofed_client.enclave.scope import check_scope
from sonofed_common.contract import actions
from sonofed_common.contract.errors import StudyDeniedError
from sonofed_common.contract.study import ACTIVE_LEARNING, SEGMENTATION, Study
from sonofed_common.contract.study_segmentation import PLAIN_MEAN, Infusion

COMMON = {"study": "trial", "seed": 3}
POOLED = {**COMMON, "bundle": "1" * 64, "image_size": 128}
STANDARD = read_policy(None)


def a_study(phases=ACTIVE_LEARNING, **values):
    cohort = {"sites": ["north", "south"]}
    return Study(name="trial", seed=3, cohort=cohort, phases=phases, **values)


studies = st.one_of(
    st.builds(
        lambda selection, finetuning, classifiers: a_study(
            selection=selection, finetuning=finetuning, classifiers=classifiers
        ),
        st.fixed_dictionaries(
            {
                "strategy": st.sampled_from(["dual_score", "entropy", "random"]),
                "combine": st.sampled_from(["rank", "radians"]),
                "scope": st.sampled_from(["global", "per_site", "global_with_site_floor"]),
                "budgets": st.sampled_from([(0.2,), (0.1, 0.2)]),
                "omega": st.sampled_from([0.0, 1.0]),
            }
        ),
        st.fixed_dictionaries({"batch_norm": st.sampled_from(["site", "global", "local"])}),
        st.sampled_from([("resnet18",), ("resnet18", "mobilenet_v2")]),
    ),
    st.builds(
        lambda per_class, strategy: a_study(
            ("enrol", "ship", "select", "annotate", "synthesise", "classifier", "publish"),
            selection={"strategy": strategy},
            synthesis={"per_class": per_class},
            finetuning={"replay": 1.0},
            classifiers=("resnet18",),
        ),
        st.sampled_from([1, 50]),
        st.sampled_from(["random", "typiclust"]),
    ),
    st.builds(
        lambda left_out, calibration, branches, norm: a_study(
            [phase for phase in SEGMENTATION if phase not in left_out],
            infusion={"calibration": calibration},
            supervision={"branches": branches},
            segmenter_batch_norm=norm,
        ),
        st.sampled_from([(), ("pretrain", "supervise"), ("ensemble",), ("evaluate",)]),
        st.sampled_from(["source", "consensus", "none"]),
        st.sampled_from(["shared", "per_site"]),
        st.sampled_from(["site", "mixed"]),
    ),
)


@settings(max_examples=30, deadline=None)
@given(studies)
def test_what_is_asked_is_answered_and_what_differs_is_not(study):
    asked = list(questions(study))
    for question in asked:
        check_scope(study, question.action, question.parameters)
        for name in type(question.parameters).model_fields:
            chosen = question.choices.get(name, ())
            changed = question.parameters.model_copy(update={name: object()})
            if chosen is not None:
                with pytest.raises(StudyDeniedError):
                    check_scope(study, question.action, changed)
    for action, model in actions.ACTIONS.items():
        if action not in {question.action for question in asked}:
            with pytest.raises(StudyDeniedError, match="no phase"):
                check_scope(study, action, model.model_construct(**COMMON))


@settings(max_examples=10, deadline=None)
@given(studies)
def test_every_action_that_is_answered_is_shown(study):
    shown = "\n".join(asks(study, STANDARD, 20))
    for action in actions.ACTIONS:
        is_asked = any(question.action == action for question in questions(study))
        assert is_asked == (f"- {action}" in shown)


def counting(column):
    return actions.Histogram(**COMMON, column=column, split=8)


@pytest.mark.parametrize(
    ("selection", "columns"),
    [
        ({"scope": "per_site", "combine": "radians"}, set()),
        ({"scope": "per_site"}, {"uncertainty", "representativeness"}),
        ({"scope": "per_site", "omega": 0.0}, {"uncertainty"}),
        ({"combine": "radians"}, {"informativeness", "identity"}),
        ({"strategy": "random"}, {"informativeness", "identity"}),
        ({"strategy": "entropy"}, {"informativeness", "identity"}),
        ({"strategy": "entropy", "scope": "per_site"}, set()),
        ({"strategy": "typiclust"}, set()),
    ],
)
def test_scores_are_counted_only_where_the_selection_needs_it(selection, columns):
    study = a_study(selection=selection)
    for column in ("uncertainty", "representativeness", "informativeness", "identity"):
        if column in columns:
            check_scope(study, "query.histogram", counting(column))
        else:
            with pytest.raises(StudyDeniedError):
                check_scope(study, "query.histogram", counting(column))
    ranks = actions.Select(**COMMON, stage="rank")
    if "uncertainty" in columns:
        check_scope(study, "train.select", ranks)
    else:
        with pytest.raises(StudyDeniedError, match="stage"):
            check_scope(study, "train.select", ranks)
    assert ("query.histogram" in "\n".join(asks(study, STANDARD, 20))) == bool(columns)


def evaluating(branches, infusion=PLAIN_MEAN, **values):
    return actions.EvaluateSegmenter(**POOLED, branches=branches, infusion=infusion, **values)


def test_tests_of_segmenters_are_those_of_the_study():
    study = a_study(SEGMENTATION)
    own = study.infusion
    for fits in (
        evaluating(("source",), batch_norm="global"),
        evaluating(("source",)),
        evaluating(("target",)),
        evaluating(("source", "target")),
        evaluating(("source", "target"), own),
    ):
        check_scope(study, "evaluate.segmenter", fits)
    for other, what in (
        (evaluating(("source", "target"), own, batch_norm="global"), "batch_norm"),
        (evaluating(("target",), batch_norm="global"), "branches"),
        (evaluating(("source",), replicates=20_000), "replicates"),
        (evaluating(("source", "source")), "branches"),
        (evaluating(("another",)), "branches"),
        (evaluating(("source",), Infusion(tau=0.5)), "infusion"),
    ):
        with pytest.raises(StudyDeniedError, match=what):
            check_scope(study, "evaluate.segmenter", other)


def test_tests_of_classifiers_are_those_of_the_study():
    study = a_study(classifiers=("resnet18", "mobilenet_v2"))

    def test(**values):
        return actions.EvaluateClassifier(**POOLED | values)

    for batch_norm in ("site", "global"):
        fits = test(classifier="resnet18", batch_norm=batch_norm)
        check_scope(study, "evaluate.classifier", fits)
        many = fits.model_copy(update={"replicates": 20_000})
        with pytest.raises(StudyDeniedError, match="replicates"):
            check_scope(study, "evaluate.classifier", many)


def test_branches_are_calibrated_at_the_sites_only_by_consensus():
    asked = actions.TrainEnsemble(**POOLED, branches=("source", "target"))
    check_scope(
        a_study(SEGMENTATION, infusion={"calibration": "consensus"}), "train.ensemble", asked
    )
    with pytest.raises(StudyDeniedError, match="no phase"):
        check_scope(a_study(SEGMENTATION), "train.ensemble", asked)


def test_a_description_is_of_the_approved_content_and_name():
    study = a_study()
    facts = {**COMMON, "study_digest": study.digest()}
    check_scope(study, "query.describe", actions.Describe(**facts))
    check_scope(study, "query.describe", actions.Describe(**facts, content=study))
    for change in ({"study": "other"}, {"study_digest": "0" * 64}):
        with pytest.raises(StudyDeniedError):
            check_scope(study, "query.describe", actions.Describe(**facts | change))
