"""Actions: everything a coordinator can ask of a site, with the parameters each one takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from sonofed_common.contract.configuration import Model, validate
from sonofed_common.contract.errors import ConfigurationError, ParameterError, UnknownActionError
from sonofed_common.contract.records import Array, Records, grouped, is_named
from sonofed_common.contract.selection import MAX_PARTS, Column
from sonofed_common.contract.study import (
    Aggregation,
    ClassifierNorm,
    Embedding,
    Finetuning,
    Reconstruction,
    Selection,
    Study,
)
from sonofed_common.contract.study_segmentation import Infusion, Pretraining, PseudoLabels, SiteNorm
from sonofed_common.contract.study_synthesis import Synthesis, WganTraining


class Parameters(Model):
    """What every action carries.

    Attributes
    ----------
    arrays : tuple of str
        Arrays that requests of the action may bring: exact names, or ``group/*``.
    """

    arrays: ClassVar[tuple[str, ...]] = ()

    study: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    seed: int = Field(ge=0, description="study seed")

    def reads(self, names: Collection[str]) -> tuple[str, ...]:
        """Return which of `arrays` a request with these parameters and array names has read."""
        return self.arrays


class Describe(Parameters):
    """Name, versions, device and rounded counts of a site.

    ``content`` is what the hospital reads before it approves; the later actions are held to it.
    """

    study_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    content: Study | None = Field(default=None, description="the study itself")

    @model_validator(mode="after")
    def _same_study(self) -> Self:
        content = self.content
        if content is None:
            return self
        named = (content.name, content.seed, content.digest())
        if named != (self.study, self.seed, self.study_digest):
            raise ValueError("the study's content is not of this name, seed and digest")
        return self


class Missing(Parameters):
    """Which blobs of a bundle a site lacks. Arrays: ``manifest``, ``signature`` (uint8)."""

    arrays = ("manifest", "signature")


class Install(Parameters):
    """Install a signed bundle. Arrays: ``manifest``, ``signature``, ``blobs/<sha256>`` (uint8)."""

    arrays = ("manifest", "signature", "blobs/*")


class Pooled(Parameters):
    """Actions that work on the site's pool with the models of an installed bundle."""

    bundle: str = Field(pattern=r"^[0-9a-f]{64}$")
    image_size: int = Field(ge=16, le=1024)


class Reconstruct(Pooled):
    """Go on with the reconstruction for a slice of time; ask again until ``state`` is ``done``."""

    settings: Reconstruction
    slice_seconds: float = Field(default=10.0, gt=0, le=3600)


class Encode(Pooled):
    """Actions on the embedding: which classifier is its backbone, and what an image pairs with."""

    classifier: str
    pairs: Literal["reconstruction", "augmentation"]
    settings: Embedding
    reconstruction: Reconstruction


class Embed(Encode):
    """One round of hypersphere contrastive learning.

    Arrays: ``student/...`` and ``predictor/...``; absent at round 0, where each site makes the same
    start from the bundle's classifier and the study seed.
    """

    arrays = ("student/*", "predictor/*")

    round: int = Field(ge=0)

    def reads(self, names: Collection[str]) -> tuple[str, ...]:
        """Return both, or nothing where no student came."""
        return self.arrays if any(is_named(name, "student/*") for name in names) else ()

    @model_validator(mode="after")
    def _round_of_the_study(self) -> Self:
        _check_round(self.round, self.settings.rounds)
        return self


class Cluster(Encode):
    """Moments of the embedding (with ``student/...``), or per-cluster sums (with ``centroids``)."""

    arrays = ("student/*", "centroids")

    def reads(self, names: Collection[str]) -> tuple[str, ...]:
        """Return the centroids where they came, else the student."""
        return ("centroids",) if "centroids" in names else ("student/*",)


class Score(Encode):
    """Score the pool, ``dual_score`` against the final centroids. Arrays: ``centroids`` for that.

    ``batch_norm`` is whose statistics ``entropy`` and ``typiclust`` give the classifier.
    """

    arrays = ("centroids",)

    selection: Selection
    batch_norm: Literal["site", "global"] = "site"

    def reads(self, names: Collection[str]) -> tuple[str, ...]:
        """Return the centroids where there is something to score."""
        return self.arrays if self.selection.strategy == "dual_score" else ()


class Histogram(Parameters):
    """Count scores of the pool in the equal parts of intervals.

    Arrays: ``edges`` (m, 2) and ``cuts`` (c, 2), uint64.
    """

    arrays = ("edges", "cuts")

    column: Column
    split: int = Field(ge=1, le=MAX_PARTS)
    tied: int | None = Field(default=None, ge=0, lt=2**64)


class Select(Parameters):
    """Take pooled ranks, or mark what the final cuts select.

    Arrays: ``ranks/<column>/starts`` and ``ranks/<column>/cumulative``, or ``cuts`` (c, 2).
    """

    arrays = ("ranks/*", "cuts")

    stage: Literal["rank", "mark"]

    def reads(self, names: Collection[str]) -> tuple[str, ...]:
        """Return the arrays of the stage."""
        return ("ranks/*",) if self.stage == "rank" else ("cuts",)


class Annotations(Parameters):
    """How many of the selected images are labelled."""


class Synthesise(Parameters):
    """Draw synthetic images by GANs of the site's own, trained on what is labelled so far."""

    settings: Synthesis
    wgan: WganTraining


class TrainClassifier(Pooled):
    """One round of fine-tuning. Arrays: ``weights/...``; absent for the source's weights.

    With scaffold ``control/...`` too, the sites' mean control variate; absent where it is 0.
    """

    arrays = ("weights/*", "control/*")

    classifier: str
    round: int = Field(ge=0)
    budget: int = Field(ge=0, description="index into the study's budgets")
    settings: Finetuning
    aggregation: Aggregation = Aggregation()
    synthetic_bundle: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="of the sites' synthetic images, to replay in place of the source's",
    )

    def reads(self, names: Collection[str]) -> tuple[str, ...]:
        """Return the control variates only where the strategy has them."""
        return self.arrays if self.aggregation.strategy == "scaffold" else ("weights/*",)

    @model_validator(mode="after")
    def _round_of_the_study(self) -> Self:
        _check_round(self.round, self.settings.rounds)
        return self


class EvaluateClassifier(Pooled):
    """Test a classifier on the site's own test images. Arrays: ``weights/...`` or none (source).

    ``budget`` says which of the site's normalisation layers to take, where they are its own.
    """

    arrays = ("weights/*",)

    classifier: str
    batch_norm: ClassifierNorm
    budget: int | None = Field(default=None, ge=0, description="with batch_norm 'local' only")
    replicates: int = Field(default=2000, ge=0, le=20000)

    @model_validator(mode="after")
    def _budget_of_local_layers(self) -> Self:
        if (self.batch_norm == "local") != (self.budget is not None):
            raise ValueError("a budget goes with batch_norm 'local', and only with it")
        return self


Branch = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,80}$")]
"""Name of a segmenter in a bundle: ``segmenters/<branch>.safetensors``."""


class Pretrain(Pooled):
    """One round of target-informed pretraining.

    Arrays: ``weights/...``; absent at round 0, where each site makes the same start.
    """

    arrays = ("weights/*",)

    round: int = Field(ge=0)
    settings: Pretraining

    @model_validator(mode="after")
    def _round_of_the_study(self) -> Self:
        _check_round(self.round, self.settings.rounds)
        return self


class TrainSegmenter(Pooled):
    """One round of source-free adaptation. Arrays: ``weights/...``; absent for the bundle's.

    ``earlier_rounds`` are those of the strategies before this one in the study's chain.
    """

    arrays = ("weights/*",)

    branch: Branch
    round: int = Field(ge=0)
    earlier_rounds: int = Field(default=0, ge=0)
    settings: PseudoLabels
    batch_norm: SiteNorm = "site"

    @model_validator(mode="after")
    def _round_of_the_study(self) -> Self:
        _check_round(self.round, self.settings.rounds)
        return self


class TrainEnsemble(Pooled):
    """Find each branch's temperature from the branches' consensus on the pool."""

    branches: tuple[Branch, ...] = Field(min_length=1, max_length=64)
    batch_norm: SiteNorm = "site"


class EvaluateSegmenter(Pooled):
    """Test the infusion of branches on the site's own test masks.

    Arrays: ``temperatures`` (K,) float64, or none for 1; ``gate/...`` for that rule.
    """

    arrays = ("temperatures", "gate/*")

    branches: tuple[Branch, ...] = Field(min_length=1, max_length=64)
    infusion: Infusion
    batch_norm: SiteNorm | Literal["global"] = "site"
    replicates: int = Field(default=2000, ge=0, le=20000)

    def reads(self, names: Collection[str]) -> tuple[str, ...]:
        """Return the gate only where the rule has one."""
        return self.arrays if self.infusion.rule == "gate" else ("temperatures",)


def _check_round(number: int, rounds: int) -> None:
    if number >= rounds:
        raise ValueError(f"round {number} is not one of the study's {rounds}, counted from 0")


ACTIONS: dict[str, type[Parameters]] = {
    "query.describe": Describe,
    "query.missing": Missing,
    "train.install": Install,
    "train.reconstruct": Reconstruct,
    "train.embed": Embed,
    "query.cluster": Cluster,
    "train.score": Score,
    "query.histogram": Histogram,
    "train.select": Select,
    "query.annotations": Annotations,
    "train.synthesise": Synthesise,
    "train.classifier": TrainClassifier,
    "evaluate.classifier": EvaluateClassifier,
    "train.pretrain": Pretrain,
    "train.segmenter": TrainSegmenter,
    "train.ensemble": TrainEnsemble,
    "evaluate.segmenter": EvaluateSegmenter,
}
"""The named actions; a site does nothing else."""


def parse(action: str, request: Records) -> Parameters:
    """Validate the parameters of a request.

    Raises
    ------
    UnknownActionError
        The action is not in `ACTIONS`.
    ParameterError
        The parameters do not validate, or an array came that the action does not take with them.
    """
    model = ACTIONS.get(action)
    if model is None:
        raise UnknownActionError(
            f"{action[:64]!r} is not an action of this site; known: {', '.join(ACTIONS)}"
        )
    # Else one that nobody reads would make a new question of an old one.
    _check_arrays(action, request, model.arrays)
    try:
        parameters = validate(model, request.config, action)
    except ConfigurationError as error:
        raise ParameterError(error.message) from None
    _check_arrays(action, request, parameters.reads(request.arrays))
    return parameters


def _check_arrays(action: str, request: Records, taken: tuple[str, ...]) -> None:
    if not all(any(is_named(name, key) for key in taken) for name in request.arrays):
        raise ParameterError(
            f"the request of {action} holds an array that it does not take; it takes "
            f"{', '.join(taken) or 'none'}"
        )


def request(parameters: Parameters, **arrays: Array | Mapping[str, Array]) -> Records:
    """Make the records of a request.

    Parameters
    ----------
    parameters : Parameters
        Validated parameters; they travel as the config part.
    **arrays : mapping of str to dict of arrays
        Array groups: ``weights={...}`` becomes ``weights/...``; a bare array keeps its name.
    """
    flat: dict[str, Array] = {}
    for name, value in arrays.items():
        if isinstance(value, Mapping):
            flat.update(grouped(name, value))
        else:
            flat[name] = value
    return Records(flat, parameters.model_dump(mode="json"))
