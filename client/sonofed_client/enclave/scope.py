"""Scope: a request is held to the study that the hospital approved."""

from __future__ import annotations

from sonofed_client.enclave.questions import questions
from sonofed_common.contract.actions import Parameters
from sonofed_common.contract.errors import StudyDeniedError
from sonofed_common.contract.study import Study


def check_scope(study: Study, action: str, parameters: Parameters) -> None:
    """Refuse what the approved study does not ask: all that is not one of its `questions`.

    Parameters
    ----------
    study : Study
        What the hospital approved.
    action : str
        A named action.
    parameters : Parameters
        Validated parameters of it.

    Raises
    ------
    StudyDeniedError
        No phase of the study needs the action, or its parameters are not the study's.
    """
    asked = [question for question in questions(study) if question.action == action]
    if not asked:
        raise StudyDeniedError(f"the approved study has no phase that needs {action}")
    nearest = min((question.misfits(parameters) for question in asked), key=len)
    if nearest:
        raise StudyDeniedError(
            f"the {nearest[0]} of {action} is not that of the study that this hospital approved"
        )
