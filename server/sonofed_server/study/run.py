"""What every phase works with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.study import Study
from sonofed_common.runtime import Events
from sonofed_server.study.exchange import Exchange
from sonofed_server.study.source import StudySource, read_study_source
from sonofed_server.study.workspace import StudyState, Workspace, identity_of


@dataclass
class StudyRun:
    """One run of a study: its settings, sites, state and place on disk."""

    study: Study
    workspace: Workspace
    bundle: Bundle
    exchange: Exchange
    state: StudyState
    events: Events
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

    def site_facts(self, site: str) -> dict[str, Any]:
        """Facts of one site for the results; made on first use."""
        facts: dict[str, Any] = self.state.facts.setdefault("sites", {}).setdefault(site, {})
        return facts

    def save(self) -> None:
        """Save the state: called after every round."""
        self.state.save(self.workspace.checkpoint, identity_of(self.study, self.bundle.id))
