"""The study: one TOML file that says which sites do what, in which order, with which settings."""

from __future__ import annotations

import hashlib
import json
import re
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from sonofed_common.contract.configuration import Model, read_toml, validate, with_preset
from sonofed_common.contract.study_segmentation import (
    Infusion,
    Pretraining,
    PseudoLabels,
    SiteNorm,
    Supervision,
)
from sonofed_common.contract.study_synthesis import PAPER_WGAN, Synthesis, WganTraining

Phase = Literal[
    "enrol",
    "ship",
    "reconstruct",
    "embed",
    "cluster",
    "select",
    "annotate",
    "synthesise",
    "classifier",
    "pretrain",
    "supervise",
    "pseudo_label",
    "ensemble",
    "evaluate",
    "publish",
]

ACTIVE_LEARNING: tuple[Phase, ...] = (
    "enrol",
    "ship",
    "reconstruct",
    "embed",
    "cluster",
    "select",
    "annotate",
    "classifier",
    "publish",
)
"""Classification: few labels, well chosen."""

SEGMENTATION: tuple[Phase, ...] = (
    "enrol",
    "ship",
    "pretrain",
    "supervise",
    "pseudo_label",
    "ensemble",
    "evaluate",
    "publish",
)
"""Segmentation: no labels at all at the sites."""

NEEDS_GIVES: dict[Phase, tuple[frozenset[str], frozenset[str]]] = {
    "enrol": (frozenset(), frozenset({"cohort"})),
    "ship": (frozenset({"cohort"}), frozenset({"source weights"})),
    "reconstruct": (frozenset({"source weights"}), frozenset({"reconstructions"})),
    "embed": (frozenset({"source weights"}), frozenset({"embeddings"})),
    "cluster": (frozenset({"embeddings"}), frozenset({"centroids"})),
    "select": (frozenset({"source weights"}), frozenset({"selection"})),
    "annotate": (frozenset({"selection"}), frozenset({"labels"})),
    "synthesise": (frozenset({"labels"}), frozenset({"synthetic images"})),
    "classifier": (frozenset({"labels"}), frozenset({"adapted models"})),
    "pretrain": (frozenset({"source weights"}), frozenset({"target-informed encoder"})),
    "supervise": (frozenset({"target-informed encoder"}), frozenset({"branches"})),
    "pseudo_label": (frozenset({"source weights"}), frozenset({"adapted models"})),
    "ensemble": (frozenset({"source weights"}), frozenset({"adapted models"})),
    "evaluate": (frozenset({"source weights"}), frozenset()),
    "publish": (frozenset({"adapted models"}), frozenset()),
}
"""What each phase needs from the phases before it, and what it gives."""

SEGMENTERS: tuple[Phase, ...] = ("supervise", "pseudo_label", "ensemble", "evaluate")
"""What a study does of these comes in this order: each works on what the one before it left, and
what is published is what was evaluated."""


ClassifierName = Literal[
    "resnet50",
    "mobilenet_v2",
    "densenet121",
    "shufflenet_v2",
    "efficientnet_b0",
    "efficientnet_lite0",
    "resnet18",
    "vit16",
    "cnn_transformer",
    "cnn_transformer_channel",
    "efficientnet_lite0_two_views",
    "shufflenet_v2_two_views",
]
"""Classifiers that sites can build."""


def check_site_name(name: str) -> str:
    """Return a site's name, which is also a folder's in a laboratory.

    Raises
    ------
    ValueError
        It is no plain name.
    """
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) or set(name) == {"."}:
        raise ValueError(
            f"{name[:64]!r} is no plain site name; use 1 to 64 of the characters A-Z a-z 0-9 _ . -"
        )
    return name


MAX_SITES = 500
"""Most hospitals of a study."""


class Cohort(Model):
    """Who takes part, and how long anything may take."""

    sites: tuple[str, ...] = Field(min_length=1, max_length=MAX_SITES, description="hospital names")
    quorum: int | None = Field(
        default=None, ge=1, description="fewest sites to go on with; default all"
    )
    deadline_seconds: float = Field(default=3600, gt=0, description="longest wait for one exchange")
    annotation_seconds: float = Field(
        default=604_800, gt=0, description="longest wait for the experts' labels; a week"
    )

    @field_validator("sites")
    @classmethod
    def _distinct(cls, sites: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(sites)) != len(sites):
            raise ValueError("name each site once")
        return tuple(check_site_name(name) for name in sites)

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.quorum is not None and self.quorum > len(self.sites):
            raise ValueError(f"quorum {self.quorum} exceeds the {len(self.sites)} sites")
        return self

    @property
    def smallest(self) -> int:
        """The quorum as a number of sites."""
        return len(self.sites) if self.quorum is None else self.quorum


class Reconstruction(Model):
    """Stage II of ADAptation: target images redrawn in the source's style."""

    init: Literal["noise", "sdedit", "ddim_inversion"] = "sdedit"
    strength: float = Field(
        default=0.5, gt=0, le=1, description="share of the noise schedule (sdedit)"
    )
    sampler: Literal["ddim", "dpmsolver++", "unipc"] = "dpmsolver++"
    steps: int = Field(default=10, ge=1, le=1000)
    guidance: float = Field(
        default=1.0, ge=0, le=100, description="classifier-free guidance; 1 switches it off"
    )
    batch_size: int = Field(default=16, ge=1)


class Embedding(Model):
    """Stage III of ADAptation: hypersphere contrastive learning."""

    pairs: Literal["reconstruction", "augmentation"] | None = Field(
        default=None, description="default: reconstruction where the study has that phase"
    )
    rounds: int = Field(default=2, ge=1, le=1000)
    local_epochs: int = Field(default=1, ge=1, le=1000)
    dimension: int = Field(default=256, ge=2, le=4096)
    margin: float = Field(default=4.0, gt=0, description="m of the loss; only scales it")
    learning_rate: float = Field(default=3e-4, gt=0, le=1)
    batch_size: int = Field(default=16, ge=2)
    teacher_momentum: float = Field(
        default=0.99, ge=0, le=1, description="start of the cosine to 1"
    )
    loss: Literal["matched", "all_pairs"] = "matched"
    merge: Literal["fedavg", "fedema"] = "fedavg"


MAX_CLUSTERS = 64
"""Most clusters: sums over few images are nearly the images' own vectors."""


class Clustering(Model):
    """Federated spherical k-means."""

    clusters: int = Field(default=4, ge=2, le=MAX_CLUSTERS)
    iterations: int = Field(default=50, ge=1)
    tolerance: float = Field(default=1e-4, ge=0, description="largest centroid move, radians")


Scope = Literal["global", "per_site", "global_with_site_floor"]
"""Whose images a budget is shared out among."""


def _usual_scope(values: dict[str, Any]) -> Scope:
    return "per_site" if values["strategy"] == "typiclust" else "global"


class Selection(Model):
    """Which images get a label, and how many."""

    strategy: Literal["dual_score", "entropy", "typiclust", "random"] = "dual_score"
    uncertainty: Literal["range", "margin", "min_pair"] = "margin"
    distance_order: Literal["near", "far", "both"] = "near"
    combine: Literal["rank", "radians"] = "rank"
    omega: float = Field(default=1.0, ge=0)
    budgets: tuple[float, ...] = Field(
        default=(0.2,),
        min_length=1,
        max_length=20,
        description="ascending shares of the pool; the last is the study's",
    )
    scope: Scope = Field(
        default_factory=_usual_scope, description="default: global; of typiclust per_site"
    )
    site_floor: float = Field(
        default=0.5, ge=0, le=1, description="share of a site's proportional budget"
    )
    draw: int = Field(default=0, ge=0, description="number of the random draw (random, typiclust)")

    @field_validator("budgets")
    @classmethod
    def _ascending(cls, budgets: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < b <= 1 for b in budgets) or list(budgets) != sorted(set(budgets)):
            raise ValueError("give ascending shares in (0, 1], for example [0.1, 0.2]")
        return budgets

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        if self.strategy == "typiclust" and self.scope != "per_site":
            raise ValueError(
                f"scope = '{self.scope}' compares images of several sites, which strategy "
                "'typiclust' cannot: it clusters each site's pool alone; leave scope out"
            )
        return self

    @property
    def looks_through_classifier(self) -> bool:
        """Whether the study's first classifier, as it is shipped, says which images to take."""
        return self.strategy in ("entropy", "typiclust")


ClassifierNorm = Literal["site", "global", "local"]
"""A site's own normalisation statistics, averaged ones, or whole layers that stay at each site."""


class Finetuning(Model):
    """Fine-tuning of the classifiers on the labelled selection."""

    rounds: int = Field(default=4, ge=1, le=1000)
    local_epochs: int = Field(default=2, ge=1, le=1000)
    optimizer: Literal["adam", "sgd"] = Field(
        default="adam", description="sgd: plain, without momentum; it wants a larger learning_rate"
    )
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    batch_size: int = Field(default=8, ge=2)
    batch_norm: ClassifierNorm = Field(
        default="site", description="site: statistics re-estimated on each site's own images"
    )
    balanced: bool = Field(default=True, description="weigh classes inversely to their frequency")
    replay: float = Field(
        default=0.0,
        ge=0,
        le=10,
        description="synthetic images (of the source, or shared) per labelled one",
    )

    @property
    def start_statistics(self) -> Literal["site", "global"]:
        """Whose normalisation statistics the classifier has before anybody trained it."""
        return "site" if self.batch_norm == "site" else "global"


class Aggregation(Model):
    """How updates become one model.

    Notes
    -----
    ``strategy`` is of the classifiers' fine-tuning; all other means over sites are FedAvg's.
    """

    strategy: Literal["fedavg", "fedprox", "fedadam", "feddg_ga", "scaffold"] = "fedavg"
    weighting: Literal["examples", "uniform"] = "examples"
    mu: float | None = Field(
        default=None, ge=0, le=10, description="FedProx's proximal weight; default 0.01"
    )
    server_learning_rate: float | None = Field(
        default=None, gt=0, le=1, description="FedAdam's step at the coordinator; default 0.01"
    )

    @model_validator(mode="after")
    def _heeded(self) -> Self:
        owners = {"mu": "fedprox", "server_learning_rate": "fedadam"}
        for name, owner in owners.items():
            if getattr(self, name) is not None and self.strategy != owner:
                raise ValueError(
                    f"{name} would do nothing: it is of strategy '{owner}'; leave it out"
                )
        return self

    @property
    def proximal_weight(self) -> float:
        """``mu``, or a value of those that FedProx's authors tried."""
        return 0.01 if self.mu is None else self.mu

    @property
    def server_step(self) -> float:
        """``server_learning_rate``, or what FedAdam's authors mostly found best for images."""
        return 0.01 if self.server_learning_rate is None else self.server_learning_rate


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "sonofed": {
        "classifiers": ["efficientnet_lite0_two_views"],
        "phases": ["enrol", "ship", "select", "annotate", "classifier", "publish"],
        "selection": {"strategy": "typiclust"},
    },
    "paper": {
        "reconstruction": {"init": "noise", "sampler": "ddim", "steps": 50, "guidance": 9.0},
        "embedding": {"loss": "matched", "margin": 4.0, "teacher_momentum": 0.99},
        "clustering": {"clusters": 4},
        "selection": {
            "uncertainty": "range",
            "distance_order": "near",
            "combine": "radians",
            "omega": 1.0,
        },
        "finetuning": {
            "rounds": 14,
            "local_epochs": 10,
            "learning_rate": 1e-3,
            "batch_size": 8,
            "batch_norm": "global",
            "balanced": False,
        },
        "wgan": PAPER_WGAN,
        "pretraining": {"patch_size": 32, "temperature": 0.1},
        "pseudo_labels": {
            "consistency": True,
            "relevance": "count",
            "disagreement": 0.0,
            "class_mean_confidence": False,
            "class_prior": 0.0,
        },
    },
}
"""Settings that a preset changes; what the study file says itself wins."""


class Study(Model):
    """A federated study.

    Notes
    -----
    Read one with `read_study`. ``phases`` may hold any sub-list of the phases, in an order in which
    each finds what it needs.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    seed: int = Field(default=0, ge=0)
    preset: Literal["default", "paper", "sonofed"] = "default"
    image_size: int = Field(default=128, ge=16, le=1024, multiple_of=8)
    classifiers: tuple[ClassifierName, ...] = Field(
        default=("efficientnet_lite0",), max_length=len(get_args(ClassifierName))
    )
    phases: tuple[Phase, ...] = Field(default=ACTIVE_LEARNING, max_length=len(get_args(Phase)))
    cohort: Cohort
    reconstruction: Reconstruction = Reconstruction()
    embedding: Embedding = Embedding()
    clustering: Clustering = Clustering()
    selection: Selection = Selection()
    synthesis: Synthesis = Synthesis()
    wgan: WganTraining = WganTraining()
    finetuning: Finetuning = Finetuning()
    pretraining: Pretraining = Pretraining()
    supervision: Supervision = Supervision()
    pseudo_labels: PseudoLabels = PseudoLabels()
    further_pseudo_labels: tuple[PseudoLabels, ...] = Field(
        default=(),
        max_length=4,
        description="strategies that follow, each on the last one's weights",
    )
    infusion: Infusion = Infusion()
    segmenter_batch_norm: SiteNorm = Field(
        default="site",
        description="segmenters' normalisation statistics: the site's, or mixed with the weights'",
    )
    aggregation: Aggregation = Aggregation()

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        values = with_preset(values, PRESETS)
        if isinstance(values, dict) and isinstance(values.get("further_pseudo_labels"), list):
            settings = PRESETS.get(str(values.get("preset")), {}).get("pseudo_labels", {})
            values["further_pseudo_labels"] = [
                {**settings, **given} if isinstance(given, dict) else given
                for given in values["further_pseudo_labels"]
            ]
        return values

    @model_validator(mode="after")
    def _classifiers(self) -> Self:
        if self.classifying and not self.classifiers:
            raise ValueError(
                f"phase '{self.classifying[0]}' needs a classifier; name one in 'classifiers'"
            )
        if len(set(self.classifiers)) != len(self.classifiers):
            raise ValueError("name each classifier once")
        seeing = [name for name in self.classifiers if name.endswith("_two_views")]
        if seeing and self.finetuning.replay:
            raise ValueError(
                f"classifier '{seeing[0]}' sees lesions, which synthetic images have no masks of; "
                "set finetuning.replay to 0"
            )
        return self

    @model_validator(mode="after")
    def _synthetic_images_serve(self) -> Self:
        if "synthesise" not in self.phases:
            filled = WganTraining(**PRESETS[self.preset].get("wgan", {}))
            for name, idle in (("synthesis", Synthesis()), ("wgan", filled)):
                if getattr(self, name) != idle:
                    raise ValueError(
                        f"section '{name}' would do nothing without the phase 'synthesise'; name "
                        "that phase, or leave the section out"
                    )
            return self
        later = self.phases[self.phases.index("synthesise") :]
        if "classifier" not in later or not self.finetuning.replay:
            raise ValueError(
                "phase 'synthesise' would do nothing: what the sites share is replayed in a phase "
                "'classifier' after it; name that phase and set finetuning.replay, or leave "
                "'synthesise' out"
            )
        if len(self.selection.budgets) > 1:
            raise ValueError(
                "phase 'synthesise' learns from all labels, which results at smaller budgets must "
                "not; give one budget in selection.budgets"
            )
        return self

    @model_validator(mode="after")
    def _starts(self) -> Self:
        most = 2 * self.embedding.dimension
        if "cluster" in self.phases and self.clustering.clusters > most:
            raise ValueError(
                f"clustering.clusters = {self.clustering.clusters} exceeds twice "
                f"embedding.dimension, {most}: each dimension starts two clusters at most"
            )
        return self

    @model_validator(mode="after")
    def _heeded(self) -> Self:
        # A preset sets what the strategy of its paper reads; a study may still name another one.
        filled = PRESETS[self.preset].get("pseudo_labels", {})
        chain = [("pseudo_labels", self.pseudo_labels)]
        chain += [("further_pseudo_labels", settings) for settings in self.further_pseudo_labels]
        for section, settings in chain:
            losses = settings.consistency or settings.self_training
            if settings.strategy == "apl" and not losses:
                raise ValueError(
                    f"{section} would train nothing: consistency and self_training are both off; "
                    "switch one on, or name strategy 'batch_norm'"
                )
            for name, reason in settings.idle.items():
                if getattr(settings, name) != filled.get(name):
                    raise ValueError(f"{section}.{name} would do nothing: {reason}; leave it out")
        return self

    @model_validator(mode="after")
    def _strategy(self) -> Self:
        name = self.aggregation.strategy
        if self.finetuning.batch_norm == "local" and name != "fedavg":
            raise ValueError(
                "finetuning.batch_norm = 'local' keeps normalisation layers from the average, "
                f"and aggregation.strategy = '{name}' is of whole networks; leave one of them out"
            )
        if name == "fedavg":
            return self
        if others := [p for p in self.phases if p in ("pretrain", "pseudo_label")]:
            raise ValueError(
                f"aggregation.strategy = '{name}' is for classifiers and phase '{others[0]}' "
                "averages segmenters; run two studies, or leave the strategy out"
            )
        if "classifier" not in self.phases:
            raise ValueError(
                f"aggregation.strategy = '{name}' would do nothing: it is of the phase "
                "'classifier'; leave it out"
            )
        if name == "scaffold" and self.finetuning.optimizer != "sgd":
            raise ValueError(
                "aggregation.strategy = 'scaffold' corrects plain gradient steps, which Adam's are "
                "not; set finetuning.optimizer = 'sgd' and a learning_rate for it"
            )
        if name == "scaffold" and self.cohort.smallest < len(self.cohort.sites):
            raise ValueError(
                "aggregation.strategy = 'scaffold' needs each site's control variate in every "
                "round; leave cohort.quorum out"
            )
        return self

    @model_validator(mode="after")
    def _order(self) -> Self:
        given: set[str] = set()
        for phase in self.phases:
            needs, gives = NEEDS_GIVES[phase]
            if missing := sorted(self._needs(phase, needs) - given):
                raise ValueError(
                    f"phase '{phase}' needs {', '.join(missing)} from a phase before it"
                )
            given |= gives
        placed = [phase for phase in self.phases if phase in SEGMENTERS]
        for phase, after in pairwise(placed):
            if SEGMENTERS.index(after) < SEGMENTERS.index(phase):
                raise ValueError(f"phase '{after}' must come before '{phase}'")
        if len(set(self.phases)) != len(self.phases):
            raise ValueError("name each phase once")
        return self

    def _needs(self, phase: Phase, needs: frozenset[str]) -> frozenset[str]:
        if phase == "embed" and self.embedding.pairs == "reconstruction":
            return needs | {"reconstructions"}
        if phase == "select" and self.selection.strategy == "dual_score":
            return needs | {"embeddings", "centroids"}
        return needs

    @property
    def classifying(self) -> list[Phase]:
        """Phases that work with a classifier of the bundle."""
        looking = ("select",) if self.selection.looks_through_classifier else ()
        return [p for p in self.phases if p in ("reconstruct", "embed", "classifier", *looking)]

    @property
    def pairs(self) -> Literal["reconstruction", "augmentation"]:
        """What the contrastive stage pairs an image with."""
        if self.embedding.pairs is not None:
            return self.embedding.pairs
        return "reconstruction" if "reconstruct" in self.phases else "augmentation"

    @property
    def adaptations(self) -> list[tuple[int, PseudoLabels]]:
        """What `pseudo_label` runs, in this order, each with the number of rounds before it."""
        chain = (self.pseudo_labels, *self.further_pseudo_labels)
        before = accumulate((settings.rounds for settings in chain), initial=0)
        return list(zip(before, chain, strict=False))

    def digest(self) -> str:
        """SHA-256 of the validated study: what a hospital approves."""
        return hashlib.sha256(
            json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()
        ).hexdigest()


def read_study(path: Path) -> Study:
    """Read and validate a study file.

    Parameters
    ----------
    path : Path
        TOML file.

    Raises
    ------
    ConfigurationError
        Unreadable file, unknown key (the nearest known key is named), or a value out of range.
    """
    return validate(Study, read_toml(path), path.name)
