"""What every phase works with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from structlog.contextvars import bind_contextvars, unbind_contextvars

from sonofed_common.contract.bundle import Bundle, BundleWriter
from sonofed_common.contract.manifest import Kind
from sonofed_common.contract.results import PhaseCost
from sonofed_common.contract.study import Study
from sonofed_common.runtime import Events
from sonofed_server.study.cost import PhaseMeter
from sonofed_server.study.exchange import Exchange
from sonofed_server.study.source import StudySource, read_study_source
from sonofed_server.study.workspace import StudyState, Workspace, identity_of


@dataclass
class StudyRun:
    """One run of a study: its settings, sites, state and place on disk.

    Attributes
    ----------
    meter : PhaseMeter or None
        Of the phase at hand; what it reads is saved with the state.
    """

    study: Study
    workspace: Workspace
    bundle: Bundle
    exchange: Exchange
    state: StudyState
    events: Events
    meter: PhaseMeter | None = None
    _source: StudySource | None = field(default=None, init=False, repr=False)

    @property
    def common(self) -> dict[str, Any]:
        """Parameters that every action carries."""
        return {"study": self.study.name, "seed": self.study.seed}

    @property
    def pooled(self) -> dict[str, Any]:
        """Parameters of actions on a site's images."""
        return {**self.common, "bundle": self.bundle.id, "image_size": self.study.image_size}

    @property
    def encode(self) -> dict[str, Any]:
        """Parameters of actions on the embedding."""
        study = self.study
        return {
            **self.pooled,
            "classifier": study.classifiers[0],
            "pairs": study.pairs,
            "settings": study.embedding,
            "reconstruction": study.reconstruction,
        }

    def source(self) -> StudySource:
        """Labelled source data, loaded on first use (see `read_study_source`)."""
        if self._source is None:
            digest = self.bundle.manifest.provenance.settings
            self._source = read_study_source(self.workspace, digest, self.events)
        return self._source

    def bundle_writer(self, folder: Path, kind: Kind) -> BundleWriter:
        """Return a writer of a bundle that comes of this study."""
        provenance = self.bundle.manifest.provenance
        return BundleWriter(
            folder,
            name=self.study.name,
            kind=kind,
            provenance=provenance.model_copy(update={"settings": self.study.digest()}),
            created=datetime.fromisoformat(self.state.facts["started"]),
        )

    def rounds(self, numbers: Iterable[int]) -> Iterator[int]:
        """Yield the numbers of rounds; what is logged meanwhile names the one at hand."""
        try:
            for number in numbers:
                bind_contextvars(round=number)
                yield number
        finally:
            unbind_contextvars("round")

    def site_facts(self, site: str) -> dict[str, Any]:
        """Facts of one site for the results; made on first use."""
        facts: dict[str, Any] = self.state.facts.setdefault("sites", {}).setdefault(site, {})
        return facts

    def save(self) -> None:
        """Save the state: called after every round."""
        if self.meter is not None:
            self.meter.saved()
            self._keep_cost(self.meter.read())
        self.state.missing = dict(self.exchange.missing)
        self.state.forgiven = dict(self.exchange.forgiven)
        self.state.save(self.workspace.checkpoint, self._identity)

    def forget_missing(self) -> None:
        """Have a study that failed ask every site again when it is resumed.

        What this process did since the last save is not saved with that.
        """
        saved = StudyState.load(self.workspace.checkpoint, self._identity)
        if saved.missing:
            saved.missing = {}
            saved.save(self.workspace.checkpoint, self._identity)

    @property
    def _identity(self) -> str:
        return identity_of(self.study, self.bundle.id)

    def _keep_cost(self, cost: PhaseCost) -> None:
        costs = {kept["name"]: kept for kept in self.state.facts["phases"]}
        costs[cost.name] = cost.model_dump()
        self.state.facts["phases"] = [costs[name] for name in self.study.phases if name in costs]
