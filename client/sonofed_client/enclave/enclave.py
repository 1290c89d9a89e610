"""The enclave: the only way to a site's images, by named and validated actions."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from sonofed_client.enclave.handlers import (
    bundles,
    classification,
    embedding,
    ensemble,
    pretraining,
    reconstruction,
    scoring,
    segmentation,
    selection,
    synthesis,
)
from sonofed_client.enclave.ledger import Ledger
from sonofed_client.enclave.policy import Policy
from sonofed_client.enclave.site import Site
from sonofed_client.enclave.starts import start_of
from sonofed_client.enclave.wall import Wall
from sonofed_client.settings import SiteSettings
from sonofed_common.contract.actions import (
    Embed,
    EvaluateClassifier,
    Parameters,
    TrainClassifier,
)
from sonofed_common.contract.records import Records
from sonofed_common.runtime import set_threads
from sonofed_common.security import sha256

Handler = Callable[[Site, Any, Records], Records]

HANDLERS: dict[str, Handler] = {
    "query.describe": bundles.describe,
    "query.missing": bundles.missing,
    "train.install": bundles.install,
    "train.reconstruct": reconstruction.reconstruct_pool,
    "train.embed": embedding.train_embedding,
    "query.cluster": embedding.cluster,
    "train.score": scoring.score,
    "query.histogram": selection.histogram,
    "train.select": selection.select,
    "query.annotations": selection.count_annotations,
    "train.synthesise": synthesis.synthesise_images,
    "train.classifier": classification.train_classifier,
    "evaluate.classifier": classification.evaluate_classifier,
    "train.pretrain": pretraining.pretrain,
    "train.segmenter": segmentation.train_segmenter,
    "train.ensemble": ensemble.train_ensemble,
    "evaluate.segmenter": ensemble.evaluate_segmenter,
}

JOBS = frozenset(
    {
        "train.embed",
        "train.classifier",
        "evaluate.classifier",
        "train.pretrain",
        "train.segmenter",
        "train.ensemble",
        "evaluate.segmenter",
    }
)
"""Actions whose result is kept and given again when the same request returns."""


class InProcessEnclave:
    """An enclave inside the calling process, for simulations and tests.

    Parameters
    ----------
    settings : SiteSettings
        The site's images are taken in at once.

    Raises
    ------
    DataMissingError, DataUnreadableError, SiteEmptyError, OneClassError
        The site's data cannot serve.
    ConfigurationError, PolicyError
        The site's policy does not validate, or does not take the site's coordinator.
    LedgerError
        The site's ledger cannot be used.
    """

    def __init__(self, settings: SiteSettings) -> None:
        set_threads(settings.threads)
        self._site = Site(settings)
        self._wall = Wall(settings, self._site.store, policy=self._site.policy)

    @property
    def site(self) -> Site:
        """What the handlers see."""
        return self._site

    @property
    def policy(self) -> Policy:
        """What may leave the site, as read when it was opened."""
        return self._wall.policy

    @property
    def ledger(self) -> Ledger:
        """What left the site and what was refused."""
        return self._wall.ledger

    def perform(self, action: str, request: Records) -> Records:
        """Do one action behind the wall; a repeated job gives its first result.

        Raises
        ------
        UnknownActionError, ParameterError
            The request is not one that a site answers.
        StudyWaitingError, StudyDeniedError, PolicyError
            The hospital has not approved the study, or its policy refuses.
        OrderError
            A phase before it is missing at this site.
        """
        return self._wall.perform(
            action,
            request,
            lambda parameters: self._work(action, parameters, request),
            lambda parameters, received: start_of(self._site, parameters, received),
        )

    def admit(self, action: str, request: Records) -> Callable[[], None]:
        """Refuse, before it is queued, a request that `perform` would refuse before any work.

        What it returns refuses the request once the hospital does not approve it any more.

        Raises
        ------
        UnknownActionError, ParameterError, StudyWaitingError, StudyDeniedError, PolicyError
            As `perform`; the refusal is in the ledger.
        """
        return self._wall.admit(action, request)

    def _work(self, action: str, parameters: Parameters, request: Records) -> Records:
        set_threads(self._site.settings.threads)
        handler = HANDLERS[action]
        if action not in JOBS:
            return handler(self._site, parameters, request)
        job = f"job/{self._job_id(action, parameters, request)}"
        kept = self._site.store.get(job)
        if kept is None:
            kept = handler(self._site, parameters, request)
            self._site.store.put(job, kept)
            self._site.store.trim("job/")
        return kept

    def _job_id(self, action: str, parameters: Parameters, request: Records) -> str:
        site = self._site
        parts: list[Any] = [
            version("sonofed"),
            action,
            parameters.model_dump(mode="json", exclude=None if _goes_on(parameters) else {"study"}),
            request.digest(),
            site.snapshot,
        ]
        if isinstance(parameters, TrainClassifier):
            parts.append(selection.labelled(site, parameters.study, parameters.budget))
        return sha256(json.dumps(parts, sort_keys=True).encode())


def _goes_on(parameters: Parameters) -> bool:
    """Whether a site goes on from what the same study kept there in an earlier round."""
    if isinstance(parameters, TrainClassifier):
        local = parameters.settings.batch_norm == "local"
        return local or parameters.aggregation.strategy == "scaffold"
    if isinstance(parameters, EvaluateClassifier):
        return parameters.batch_norm == "local"
    return isinstance(parameters, Embed) and parameters.settings.merge == "fedema"
