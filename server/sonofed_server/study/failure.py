"""Why a study failed: the file ``failure.json`` of its workspace."""

from __future__ import annotations

from pydantic import ValidationError

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.runtime import write_atomically
from sonofed_server.study.workspace import Workspace


class Failure(Model):
    """The error that ended a study.

    Attributes
    ----------
    error : str
        Its code in the catalogue.
    message : str
        Its sentence.
    """

    error: str
    message: str


def write_failure(workspace: Workspace, failure: Failure) -> None:
    """Keep why a study failed."""
    write_atomically(workspace.failure, failure.model_dump_json().encode())


def read_failure(workspace: Workspace) -> Failure | None:
    """Return why a study failed, or None if it did not; a damaged record is a failure in itself."""
    try:
        return Failure.model_validate_json(workspace.failure.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        return Failure(
            error=ConfigurationError.code,
            message=f"why it failed is not known, for {workspace.failure} is damaged; see "
            "serverapp.log, then resume the study",
        )
