"""Numbers of the segmentation track: stages, hospitals, their mean and the worst of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sonofed_common.contract.results import (
    LOWER_IS_BETTER,
    SEGMENTATION_METRICS,
    SEGMENTATION_STAGES,
    Estimate,
    Results,
    SegmentationStage,
    estimate,
    gain,
    over_sites,
)

STAGE_NAMES: dict[SegmentationStage, str] = {
    "source": "Source only",
    "bn_adapted": "Re-normalised",
    "target_informed": "Target-informed",
    "mean": "Plain mean",
    "infusion": "Infusion",
    "adapted": "Adapted",
    "ensemble": "Ensemble",
}

STAGE_WORDS: dict[SegmentationStage, str] = {
    "source": "the segmenter as the source trained it",
    "bn_adapted": "the same, with its normalisation statistics re-estimated on the hospital's "
    "own images; nothing is trained, so this is the control",
    "target_informed": "a second segmenter, trained on the source's masks from an encoder that had "
    "learnt from the hospitals' unlabelled images",
    "mean": "the plain mean of these segmenters",
    "infusion": "their mean, weighed at each pixel by how far each is to be trusted there",
    "adapted": "the source's segmenter, trained further at the hospitals on its own predictions",
    "ensemble": "all segmenters after that training, joined into one",
}

MEASURES = {
    "dice": "Dice",
    "nsd": "Surface Dice",
    "hd95": "Hausdorff 95%, px",
    "ece": "Calibration error",
}
MEAN = "Mean of the hospitals"
DIGITS = {"dice": 2, "nsd": 2, "hd95": 1, "ece": 2}


@dataclass(frozen=True)
class MaskComparison:
    """Dice of one row at the stages that the first table shows.

    Attributes
    ----------
    name : str
        Hospital, or what the row sums up.
    kind : str
        ``site``, ``mean`` or ``worst``.
    test_masks : int or None
        Test images with a mask.
    dice : dict of SegmentationStage to Estimate or None
        In the order of the stages; the last is the result.
    """

    name: str
    kind: str
    test_masks: int | None
    dice: dict[SegmentationStage, Estimate | None]

    @property
    def gain(self) -> Estimate | None:
        """Result over source."""
        return gain(self.dice.get("source"), list(self.dice.values())[-1])

    @property
    def gain_over_control(self) -> Estimate | None:
        """Result over re-estimated normalisation; None where that is the result."""
        if list(self.dice)[-1] == "bn_adapted":
            return None
        return gain(self.dice.get("bn_adapted"), list(self.dice.values())[-1])


def segments(results: Results) -> bool:
    """True where some hospital reports masks."""
    return any(site.segmentation for site in results.sites.values())


def classifies(results: Results) -> bool:
    """True where some hospital reports classifiers, or none reports masks either."""
    return any(site.classifiers for site in results.sites.values()) or not segments(results)


def mask_estimate(
    results: Results, name: str, stage: SegmentationStage, metric: str = "dice"
) -> Estimate | None:
    """One hospital's measure at a stage, or None where it is missing."""
    return estimate(results.sites[name].segmentation.get(stage), metric)


def reported_stages(results: Results) -> tuple[SegmentationStage, ...]:
    """Stages at which some hospital reports Dice, in their order."""
    return tuple(
        stage
        for stage in SEGMENTATION_STAGES
        if any(mask_estimate(results, name, stage) for name in results.sites)
    )


def key_stages(results: Results) -> tuple[SegmentationStage, ...]:
    """Source, control and result: the stages among them that are reported; the last is the result.

    Notes
    -----
    The result is the last stage that the study has, never the best: that would be chosen on the
    test masks.
    """
    reported = reported_stages(results)
    return tuple(s for s in reported if s in ("source", "bn_adapted", *reported[-1:]))


def compared_hospitals(results: Results) -> tuple[str, ...]:
    """Names of the hospitals with Dice at all `key_stages`; mean and worst are taken over these."""
    stages = key_stages(results)
    return tuple(
        name
        for name in results.sites
        if stages and all(mask_estimate(results, name, stage) for stage in stages)
    )


def mean_mask_estimate(
    results: Results, stage: SegmentationStage, metric: str = "dice"
) -> Estimate | None:
    """Mean over the compared hospitals, each counting the same."""
    return over_sites(
        mask_estimate(results, name, stage, metric) for name in compared_hospitals(results)
    )


def worst_hospital(
    results: Results, stage: SegmentationStage, metric: str = "dice"
) -> tuple[str, Estimate] | None:
    """The compared hospital where a stage does worst, or None where there is none."""
    found = {n: mask_estimate(results, n, stage, metric) for n in compared_hospitals(results)}
    known = {name: e for name, e in found.items() if e is not None}
    if not known:
        return None
    sign = -1 if metric in LOWER_IS_BETTER else 1
    name = min(known, key=lambda n: sign * known[n].value)
    return name, known[name]


def mask_comparisons(results: Results) -> Iterator[MaskComparison]:
    """Rows of the first table: hospitals, then their mean and the worst of them."""
    stages = key_stages(results)
    if not stages:
        return
    for name, site in results.sites.items():
        if site.segmentation:
            dice = {stage: mask_estimate(results, name, stage) for stage in stages}
            yield MaskComparison(name, "site", site.test_masks, dice)
    if len(compared_hospitals(results)) > 1:
        means = {stage: mean_mask_estimate(results, stage) for stage in stages}
        yield MaskComparison(MEAN, "mean", None, means)
        worst = {stage: worst_hospital(results, stage) for stage in stages}
        dice = {stage: None if found is None else found[1] for stage, found in worst.items()}
        yield MaskComparison("Worst hospital at each step", "worst", None, dice)


def mask_rows(
    results: Results,
) -> Iterator[tuple[str, SegmentationStage, list[tuple[Estimate | None, int]]]]:
    """Hospital, stage and every measure with its digits; the mean over the hospitals last."""
    stages = reported_stages(results)
    for name in results.sites:
        for stage in stages:
            found = [mask_estimate(results, name, stage, m) for m in SEGMENTATION_METRICS]
            if any(found):
                yield name, stage, _with_digits(found)
    if len(compared_hospitals(results)) > 1:
        for stage in stages:
            found = [mean_mask_estimate(results, stage, m) for m in SEGMENTATION_METRICS]
            if any(found):
                yield MEAN, stage, _with_digits(found)


def _with_digits(found: list[Estimate | None]) -> list[tuple[Estimate | None, int]]:
    return [(item, DIGITS[m]) for item, m in zip(found, SEGMENTATION_METRICS, strict=True)]
