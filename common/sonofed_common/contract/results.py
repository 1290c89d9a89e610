"""Results: what a finished study reports, as one JSON file, and the numbers derived from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

from sonofed_common.contract.configuration import Model, validate
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.runtime import write_atomically

METRICS: tuple[str, ...] = (
    "auroc",
    "accuracy",
    "balanced_accuracy",
    "sensitivity",
    "specificity",
    "sensitivity_at_specificity_90",
    "ece",
    "brier",
)
"""Names of the measures; ``<name>_low`` and ``<name>_high`` bound the 95% interval by patient."""

SEGMENTATION_METRICS: tuple[str, ...] = ("dice", "nsd", "hd95", "ece")
"""Measures of masks, means over images: Dice and normalised surface Dice in [0, 1], 95%
Hausdorff distance in pixels, calibration error of the pixels' probabilities."""

MEASURES: tuple[str, ...] = tuple(dict.fromkeys(METRICS + SEGMENTATION_METRICS))
"""All measures."""

LOWER_IS_BETTER: frozenset[str] = frozenset({"ece", "brier", "hd95"})

SegmentationStage = Literal[
    "source", "bn_adapted", "target_informed", "mean", "infusion", "adapted", "ensemble"
]
SEGMENTATION_STAGES: tuple[SegmentationStage, ...] = (
    "source",
    "bn_adapted",
    "target_informed",
    "mean",
    "infusion",
    "adapted",
    "ensemble",
)
"""Source weights as shipped; normalisation statistics re-estimated on site; the site's
target-informed branch; plain mean and infusion of these branches; the source's branch after
pseudo-labelling; all branches after pseudo-labelling, infused, or without phase ensemble their
plain mean. The last that a study has is its result, and what it publishes."""

Stage = Literal["source", "bn_adapted", "adapted"]
STAGES: tuple[Stage, ...] = ("source", "bn_adapted", "adapted")
"""Source weights as shipped; normalisation statistics re-estimated without labels; fine-tuned."""


def _none_if_not_finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _known_measures(metrics: dict[str, float | None]) -> dict[str, float | None]:
    for key in metrics:
        if key.removesuffix("_low").removesuffix("_high") not in MEASURES:
            raise ValueError(f"unknown measure '{key}'; known: {', '.join(MEASURES)}")
    return metrics


Number = Annotated[float | None, BeforeValidator(_none_if_not_finite)]
"""A finite number; NaN and infinity, which JSON lacks, become None."""

Metrics = Annotated[dict[str, Number], AfterValidator(_known_measures)]
"""Measures by name, each with an optional ``_low`` and ``_high``."""


class Machine(Model):
    """Where the study ran."""

    python: str = ""
    torch: str = ""
    flwr: str = ""
    cpu: str = ""
    cores: int = Field(default=1, ge=1)
    device: str = "cpu"


class PhaseCost(Model):
    """What one phase took."""

    name: str
    seconds: float = Field(ge=0)
    saves: int = Field(default=0, ge=0, description="one after each round, and one at the end")
    bytes_to_sites: int = Field(default=0, ge=0)
    bytes_from_sites: int = Field(default=0, ge=0)
    peak_memory_bytes: int | None = Field(default=None, ge=0)


class CurvePoint(Model):
    """A classifier at one labelling budget."""

    budget: float = Field(gt=0, le=1, description="share of all pools that is labelled")
    labels: int = Field(ge=0, description="images at this site that were learnt from")
    metrics: Metrics


class ClassifierResults(Model):
    """One classifier on one site's own test images."""

    source: Metrics
    bn_adapted: Metrics | None = None
    adapted: Metrics | None = None
    curve: tuple[CurvePoint, ...] = ()


class ReconstructionQuality(Model):
    """Means over a set of images, reconstruction against original."""

    ssim: Number = None
    psnr: Number = Field(default=None, description="decibels")
    feature_distance: Number = Field(default=None, description="mean of one minus cosine")


class SiteResults(Model):
    """One hospital."""

    images: int = Field(default=0, ge=0, description="unlabelled images to choose from")
    test_images: int = Field(default=0, ge=0)
    selected: int = Field(default=0, ge=0, description="images chosen at the last budget")
    labelled: int = Field(default=0, ge=0, description="of these, images that were learnt from")
    selected_by_budget: tuple[int, ...] = ()
    synthetic: int | None = Field(
        default=None, ge=0, description="synthetic images of its own that the site shared"
    )
    classifiers: dict[str, ClassifierResults] = Field(default={})
    test_masks: int = Field(default=0, ge=0, description="test images with a mask")
    segmentation: dict[SegmentationStage, Metrics] = Field(default={})
    reconstruction: ReconstructionQuality | None = None
    missing_reason: str | None = Field(default=None, description="why the site is missing")


class Results(Model):
    """A study's results.

    Notes
    -----
    Holds hospital names, counts and measures only: never an image, a file name or a single score.
    """

    study: str
    study_digest: str
    seed: int
    engine: str
    machine: Machine = Machine()
    started: str = Field(description="ISO 8601")
    seconds: float = Field(ge=0)
    phases: tuple[PhaseCost, ...] = ()
    budgets: tuple[float, ...] = ()
    sites: dict[str, SiteResults]
    source_reconstruction: ReconstructionQuality | None = None
    clusters: tuple[int, ...] = Field(default=(), description="images of all sites in each cluster")
    converged: bool | None = Field(default=None, description="whether the clusters came to rest")
    missing_sites: tuple[str, ...] = ()
    settings: dict[str, JsonValue] = Field(default={}, description="the validated study")
    notes: tuple[str, ...] = ()


class Estimate(NamedTuple):
    """A number with its 95% interval; the bounds are None where no interval was computed."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def standard_error(self) -> float | None:
        """A quarter of the interval's width, by the normal approximation."""
        if self.low is None or self.high is None:
            return None
        return (self.high - self.low) / (2 * 1.96)


def write_results(results: Results, path: Path) -> None:
    """Write results as JSON: whole or not at all.

    Parameters
    ----------
    results : Results
        What to write.
    path : Path
        Target file; its folder is made.
    """
    values = results.model_dump(mode="json")
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def read_results(path: Path) -> Results:
    """Read what `write_results` wrote.

    Parameters
    ----------
    path : Path
        A results file.

    Raises
    ------
    ConfigurationError
        The file is unreadable, is not JSON or does not follow the schema.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        what = f"{path} cannot be read ({error.strerror}); check the path"
        raise ConfigurationError(what) from None
    except ValueError as error:
        raise ConfigurationError(f"{path} is not valid JSON: {error}") from None
    return validate(Results, values, path.name)


def estimate(metrics: dict[str, float | None] | None, metric: str = "auroc") -> Estimate | None:
    """Return one measure with its interval, or None where it is missing."""
    value = None if metrics is None else metrics.get(metric)
    if metrics is None or value is None:
        return None
    return Estimate(value, metrics.get(f"{metric}_low"), metrics.get(f"{metric}_high"))


def over_classifiers(estimates: Iterable[Estimate | None]) -> Estimate | None:
    """Average estimates that rest on the same patients; None where one is missing.

    Notes
    -----
    Bounds are averaged too, which is exact for perfectly correlated classifiers and too wide for
    all others.
    """
    known = list(estimates)
    present = [e for e in known if e is not None]
    if not present or len(present) < len(known):
        return None
    lows, highs = [e.low for e in present], [e.high for e in present]
    return Estimate(_mean(e.value for e in present), _mean_or_none(lows), _mean_or_none(highs))


def over_sites(estimates: Iterable[Estimate | None]) -> Estimate | None:
    """Average estimates that rest on different patients; None where one is missing.

    Notes
    -----
    Sites share no patients, so errors are independent and variances add (normal approximation).
    """
    known = list(estimates)
    present = [e for e in known if e is not None]
    if not present or len(present) < len(known):
        return None
    value = _mean(e.value for e in present)
    errors = [e.standard_error for e in present]
    if any(error is None for error in errors):
        return Estimate(value)
    half = 1.96 * math.sqrt(sum(error**2 for error in errors if error is not None)) / len(present)
    return Estimate(value, value - half, value + half)


def site_estimate(site: SiteResults, stage: Stage, metric: str = "auroc") -> Estimate | None:
    """Mean of a site's classifiers at a stage, or None where one lacks the measure."""
    return over_classifiers(estimate(getattr(c, stage), metric) for c in site.classifiers.values())


def compared_sites(results: Results, metric: str = "auroc") -> tuple[str, ...]:
    """Names of the sites with a measure both before and after adaptation.

    Notes
    -----
    Means and worst sites are taken over these only: before and after tell of the same sites.
    """
    return tuple(
        name
        for name, site in results.sites.items()
        if site_estimate(site, "source", metric) and site_estimate(site, "adapted", metric)
    )


def mean_over_sites(results: Results, stage: Stage, metric: str = "auroc") -> Estimate | None:
    """Mean over the compared sites, each counting the same."""
    names = compared_sites(results, metric)
    return over_sites(site_estimate(results.sites[name], stage, metric) for name in names)


def worst_site(
    results: Results, stage: Stage, metric: str = "auroc"
) -> tuple[str, Estimate] | None:
    """Return the compared site where a stage does worst; None where a measure is missing."""
    found = {
        name: site_estimate(results.sites[name], stage, metric)
        for name in compared_sites(results, metric)
    }
    known = {name: e for name, e in found.items() if e is not None}
    if not known or len(known) < len(found):
        return None
    sign = -1 if metric in LOWER_IS_BETTER else 1
    name = min(known, key=lambda n: sign * known[n].value)
    return name, known[name]


def gain(before: Estimate | None, after: Estimate | None) -> Estimate | None:
    """Difference after - before.

    Notes
    -----
    The interval adds both variances as if they were independent. Both models see the same test
    patients, so their errors mostly go together and the true interval is as a rule narrower.
    """
    if before is None or after is None:
        return None
    value = after.value - before.value
    first, second = before.standard_error, after.standard_error
    if first is None or second is None:
        return Estimate(value)
    half = 1.96 * math.hypot(first, second)
    return Estimate(value, value - half, value + half)


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)


def _mean_or_none(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return _mean(known) if len(known) == len(values) else None
