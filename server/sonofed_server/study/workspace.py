"""The workspace of a study: its file, bundle, checkpoint, events and results in one folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sonofed_common.contract.errors import ConfigurationError, DeploymentError, ParameterError
from sonofed_common.contract.records import Array, Records, from_bytes, to_bytes
from sonofed_common.contract.study import Study
from sonofed_common.runtime import write_atomically
from sonofed_common.security import sha256
from sonofed_common.supervision.family import Identity


@dataclass(frozen=True)
class Workspace:
    """Paths of a study.

    Attributes
    ----------
    root : Path
        Holds ``study.toml``, ``bundle/``, ``coordinator.pem``, ``source.toml`` for segmentation,
        and what the study writes.
    """

    root: Path

    @property
    def study(self) -> Path:
        """The study file."""
        return self.root / "study.toml"

    @property
    def bundle(self) -> Path:
        """The signed bundle of source-trained weights."""
        return self.root / "bundle"

    @property
    def source(self) -> Path:
        """Where the labelled source data is, and the settings of its training."""
        return self.root / "source.toml"

    @property
    def cache(self) -> Path:
        """Trained branches by content digest; may be a link to a folder that studies share."""
        return self.root / "cache"

    @property
    def branches(self) -> Path:
        """The signed bundle of the source's and the target-informed segmenters."""
        return self.root / "branches"

    @property
    def adapted(self) -> Path:
        """The signed bundle of the same segmenters after pseudo-labelling."""
        return self.root / "adapted"

    @property
    def synthetic(self) -> Path:
        """The signed bundle of the synthetic images that the sites share."""
        return self.root / "synthetic"

    @property
    def model_card(self) -> Path:
        """The model card, Markdown."""
        return self.root / "MODEL_CARD.md"

    @property
    def final_bundle(self) -> Path:
        """The signed bundle of adapted weights."""
        return self.root / "final"

    @property
    def key(self) -> Path:
        """The coordinator's signing key."""
        return self.root / "coordinator.pem"

    @property
    def events(self) -> Path:
        """Progress events, JSON lines."""
        return self.root / "events.jsonl"

    @property
    def checkpoint(self) -> Path:
        """State after the last finished round."""
        return self.root / "checkpoint.safetensors"

    @property
    def results(self) -> Path:
        """The results, JSON."""
        return self.root / "results.json"

    @property
    def failure(self) -> Path:
        """The error that ended the study, JSON; absent unless it failed."""
        return self.root / "failure.json"

    @property
    def process(self) -> Path:
        """The process that works on the study, or that last did, JSON."""
        return self.root / "process.json"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the study for this process; the system lets go of it when the process ends.

        Raises
        ------
        DeploymentError
            Another process works on it.
        """
        with (self.root / "process.lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DeploymentError(f"another process works on {self.root}") from None
            own = Identity.of(os.getpid())
            assert own is not None
            write_atomically(self.process, own.model_dump_json().encode())
            yield


def identity_of(study: Study, bundle: str) -> str:
    """Return what a state belongs to: SHA-256 of the study's digest and the source bundle's id."""
    return sha256(f"{study.digest()} {bundle}".encode())


@dataclass
class StudyState:
    """What a study knows so far; saved after every round.

    Attributes
    ----------
    done : list of str
        Finished phases.
    position : dict of str to int
        Where the phase in progress stands, for example ``{"round": 2}``.
    arrays : dict of str to ndarray
        Global weights and centroids by group.
    facts : dict of str to JSON value
        Everything the results are made of.
    missing, forgiven : dict of str to str
        Sites that failed in the phase in progress, as the exchange has them.
    """

    done: list[str] = field(default_factory=list)
    position: dict[str, int] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    forgiven: dict[str, str] = field(default_factory=dict)

    def group(self, name: str) -> dict[str, Array]:
        """Return the arrays under ``name/``, without that prefix."""
        return Records(self.arrays).group(name)

    def set_group(self, name: str, arrays: dict[str, Array]) -> None:
        """Replace the arrays under ``name/``."""
        self.arrays = {k: v for k, v in self.arrays.items() if not k.startswith(f"{name}/")}
        self.arrays.update({f"{name}/{k}": v for k, v in arrays.items()})

    def aggregation(self, name: str) -> Records:
        """Return what the aggregation of the weights under ``name/`` goes on from."""
        config = self.facts.get("aggregation", {}).get(name, {})
        return Records(self.group(f"aggregation/{name}"), config)

    def set_aggregation(self, name: str, kept: Records) -> None:
        """Replace what the aggregation of the weights under ``name/`` goes on from."""
        self.set_group(f"aggregation/{name}", kept.arrays)
        known = self.facts.get("aggregation", {}) | {name: kept.config}
        self.facts["aggregation"] = {n: config for n, config in known.items() if config}

    def clear(self) -> None:
        """Forget everything but when the study started and what runs its nodes."""
        kept = {k: v for k, v in self.facts.items() if k in ("started", "engine")}
        self.done, self.position, self.arrays = [], {}, {}
        self.facts = {**kept, "phases": []}
        self.missing, self.forgiven = {}, {}

    def save(self, path: Path, identity: str) -> None:
        """Write the state atomically."""
        config = {
            "identity": identity,
            "done": self.done,
            "position": self.position,
            "facts": self.facts,
            "missing": self.missing,
            "forgiven": self.forgiven,
        }
        write_atomically(path, to_bytes(Records(self.arrays, config)))

    @classmethod
    def load(cls, path: Path, identity: str) -> StudyState:
        """Read a saved state; a missing one, or one of another `identity_of`, gives an empty state.

        Raises
        ------
        ConfigurationError
            The checkpoint is damaged.
        """
        if not path.exists():
            return cls()
        try:
            records = from_bytes(path.read_bytes())
            config = records.config
            if config.get("identity") != identity:
                return cls()
            return cls(
                config["done"],
                config["position"],
                records.arrays,
                config["facts"],
                # Checkpoints of before these were kept go on, asking everyone.
                config.get("missing", {}),
                config.get("forgiven", {}),
            )
        except (ParameterError, KeyError):
            raise ConfigurationError(
                f"the checkpoint {path} is damaged; delete it to start the study anew"
            ) from None
