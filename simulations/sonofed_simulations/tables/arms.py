"""Tables of arms: the same training with one thing changed, over paired seeds, cell by cell."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sonofed_common.contract.records import Records, to_bytes
from sonofed_common.runtime import Events, write_atomically
from sonofed_common.synthesis.memorisation import RefusedError
from sonofed_simulations.tables.records import read_records
from sonofed_simulations.tables.request import part_of

Array = NDArray[Any]
Prediction = tuple[Array, Array, Array]
"""Labels (M,), P(malignant) (M,) and patients (M,) of one site's test images.

Where an arm draws at random, P(malignant) may be (D, M), a row a draw; the table shows their mean.
"""


REFUSED = "refused"
"""Key of a cell's configuration that tells why there is no outcome."""


@dataclass(frozen=True)
class Arm:
    """A row of the table.

    Attributes
    ----------
    name : str
        As the page shows it, and the cell's folder: letters, digits, blanks and ``+-.,()``.
    against : str or None
        The arm that differs from it in what the table asks about.
    published : str
        What the work printed for it; empty where it has no such row.
    home : str or None
        The test site whose training images it saw, where the table tells the gap to the others.
    """

    name: str
    against: str | None = None
    published: str = ""
    home: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What one arm came to under one seed.

    Attributes
    ----------
    predictions : dict of str to Prediction
        By test site.
    facts : dict of str to float
        What else the page tells of the cell, for example a rate of duplicates.
    """

    predictions: dict[str, Prediction]
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ArmCell:
    """A finished cell; ``seconds`` is what its training and prediction took."""

    arm: Arm
    seed: int
    outcome: Outcome
    seconds: float

    @property
    def draws(self) -> list[Outcome]:
        """Each draw by itself, without facts; one where the arm does not draw."""
        predictions = self.outcome.predictions
        count = max(np.atleast_2d(found).shape[0] for _, found, _ in predictions.values())
        return [
            Outcome(
                {
                    site: (labels, np.atleast_2d(found)[n], patients)
                    for site, (labels, found, patients) in predictions.items()
                }
            )
            for n in range(count)
        ]


class Experiment(Protocol):
    """What a table file gives to have its cells run and its page written."""

    @property
    def arms(self) -> Sequence[Arm]:
        """The rows, in the page's order."""
        ...

    @property
    def seeds(self) -> Sequence[int]:
        """Each makes its own split, start weights and order, the same for all arms."""
        ...

    def origin(self, arm: Arm, seed: int) -> Mapping[str, Any]:
        """What a cell is made of, as JSON values: it is made anew when any of it changes."""
        ...

    def run(self, arm: Arm, seed: int) -> Outcome:
        """Train and predict one cell.

        Raises
        ------
        RefusedError
            Its synthetic images do not pass the gate: the cell is kept as refused.
        """
        ...


def run_arms(
    experiment: Experiment, folder: Path, shard: tuple[int, int], events: Events
) -> list[ArmCell]:
    """Run one shard's cells that are not there yet, and return all finished ones.

    Parameters
    ----------
    experiment : Experiment
        Arms and seeds.
    folder : Path
        Each cell is one file of it.
    shard : tuple of int
        Number of the shard, from 1, and how many there are.
    events : Events
        Gets the progress.

    Raises
    ------
    ConfigurationError
        The shard is out of range.
    """
    # Seed by seed: the first one alone shows every row.
    wanted = [(arm, seed) for seed in experiment.seeds for arm in experiment.arms]
    own = part_of(wanted, shard)
    for done, (arm, seed) in enumerate(own, start=1):
        path = _path(folder, arm, seed)
        origin = experiment.origin(arm, seed)
        if read_records(path, origin) is None:
            began = time.perf_counter()
            try:
                outcome = experiment.run(arm, seed)
                records = _encode(outcome, origin, time.perf_counter() - began)
            except RefusedError as error:
                records = Records(config={"origin": dict(origin), REFUSED: error.message})
            write_atomically(path, to_bytes(records))
        events.progress("cells", done, len(own), arm=arm.name, seed=seed)
    return list(finished_arms(experiment, folder))


def finished_arms(experiment: Experiment, folder: Path) -> Iterator[ArmCell]:
    """Finished cells, of all shards, that still are what the table asks for."""
    for seed in experiment.seeds:
        for arm in experiment.arms:
            records = read_records(_path(folder, arm, seed), experiment.origin(arm, seed))
            if records is not None and REFUSED not in records.config:
                seconds = float(records.metrics["seconds"])
                yield ArmCell(arm, seed, _decode(records), seconds)


def refused_arms(experiment: Experiment, folder: Path) -> Iterator[str]:
    """Arm, seed and reason of each cell whose synthetic images the gate refused."""
    for seed in experiment.seeds:
        for arm in experiment.arms:
            records = read_records(_path(folder, arm, seed), experiment.origin(arm, seed))
            if records is not None and REFUSED in records.config:
                yield f"{arm.name}, seed {seed}: {records.config[REFUSED]}"


def _path(folder: Path, arm: Arm, seed: int) -> Path:
    return folder / f"seed-{seed}" / f"{arm.name}.safetensors"


def _encode(outcome: Outcome, origin: Mapping[str, Any], seconds: float) -> Records:
    arrays, patients = {}, {}
    for site, (labels, probabilities, groups) in outcome.predictions.items():
        arrays[f"labels/{site}"] = labels
        arrays[f"probabilities/{site}"] = probabilities
        patients[site] = [str(group) for group in groups]
    config = {"origin": dict(origin), "patients": patients, "facts": outcome.facts}
    return Records(arrays, config, {"seconds": seconds})


def _decode(records: Records) -> Outcome:
    predictions = {
        site: (
            records.arrays[f"labels/{site}"],
            records.arrays[f"probabilities/{site}"],
            np.array(patients),
        )
        for site, patients in records.config["patients"].items()
    }
    return Outcome(predictions, dict(records.config["facts"]))
