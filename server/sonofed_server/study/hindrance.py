"""Why a study that is wanted does not run yet: the supervisor's word, or the conductor's last."""

from __future__ import annotations

from pydantic import ValidationError

from sonofed_common.contract.configuration import Model
from sonofed_common.runtime import write_atomically
from sonofed_common.supervision.supervisor import read_status
from sonofed_server.provisioning.project import Coordinator

EVERY = ""
"""In the place of a study's name: what holds up all of them."""

FILE = "hindrances.json"


class Hindrances(Model):
    """What the conductor could not do the last time, by the study's name."""

    reasons: dict[str, str]


def note(coordinator: Coordinator, reasons: dict[str, str]) -> None:
    """Write down what the conductor could not do."""
    said = Hindrances(reasons=reasons).model_dump_json()
    write_atomically(coordinator.run / FILE, said.encode(), mode=0o600)


def hindrance(coordinator: Coordinator, study: str) -> str:
    """Return why a waiting study does not run.

    Parameters
    ----------
    coordinator : Coordinator
        Of the project.
    study : str
        Its name.
    """
    status = read_status(coordinator.run)
    if status is None:
        return "the coordinator is not up"
    for name, program in status.programs.items():
        if program.state != "running":
            why = f" ({program.reason})" if program.reason else ""
            return f"{name} is {program.state}{why}; see {coordinator.run / name}.log"
    try:
        noted = Hindrances.model_validate_json((coordinator.run / FILE).read_bytes()).reasons
    except (OSError, ValidationError):
        noted = {}
    begins = f"its process is yet to begin; see {coordinator.run / 'serverapp.log'}"
    return noted.get(study) or noted.get(EVERY) or begins
