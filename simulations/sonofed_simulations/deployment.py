"""What a deployment on one machine starts from: a scenario as its people would have written it."""

from __future__ import annotations

import tomli_w

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.runtime import write_atomically
from sonofed_server.provisioning.project import Project
from sonofed_simulations.laboratory import Laboratory

ADDRESS = "localhost:8443"


def prepare(laboratory: Laboratory) -> None:
    """Write ``project.toml``, ``source.toml``, ``study.toml``, and the images in ``phantoms/``.

    Parameters
    ----------
    laboratory : Laboratory
        Its root gets the files; all of its data are phantoms.

    Raises
    ------
    ConfigurationError
        The scenario uses real data sets: those are where they are.
    """
    scenario = laboratory.scenario
    if scenario.needs_data:
        raise ConfigurationError(
            f"scenario '{scenario.name}' uses real data sets; choose one of phantoms"
        )
    laboratory.write_phantoms()
    project = Project(
        name=scenario.name,
        address=ADDRESS,
        sites=tuple(scenario.hospitals),
        contact="whoever sits at this machine",
        listen="127.0.0.1",
    )
    settings: dict[str, Model] = {
        "project": project,
        "source": scenario.source,
        "study": scenario.study,
    }
    for name, model in settings.items():
        values = model.model_dump(mode="json", exclude_none=True)
        write_atomically(laboratory.root / f"{name}.toml", tomli_w.dumps(values).encode())
