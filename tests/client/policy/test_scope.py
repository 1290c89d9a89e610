import pytest
from policy_rules import study

from sonofed_client.enclave.forecast import questions
from sonofed_client.enclave.scope import check_scope
from sonofed_common.contract.actions import ACTIONS
from sonofed_common.contract.errors import StudyDeniedError
from sonofed_common.contract.study import SEGMENTATION


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
