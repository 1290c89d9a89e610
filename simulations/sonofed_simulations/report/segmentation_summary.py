"""The segmentation track in plain sentences, generated from the numbers."""

from __future__ import annotations

from sonofed_common.contract.results import Results, SegmentationStage, gain
from sonofed_simulations.report.format import count, decimal, signed
from sonofed_simulations.report.segmentation import (
    STAGE_NAMES,
    compared_hospitals,
    key_stages,
    mask_estimate,
    mean_mask_estimate,
    worst_hospital,
)
from sonofed_simulations.report.summary import beyond, chance, moved, names, who

WAYS: dict[SegmentationStage, str] = {
    "source": "with the source's weights only",
    "bn_adapted": "with the normalisation re-estimated on each hospital's own images",
}


def mask_headline(results: Results) -> str:
    """One sentence: what became of Dice at the worst hospital."""
    stages = key_stages(results)
    before = worst_hospital(results, stages[0]) if stages else None
    after = worst_hospital(results, stages[-1]) if stages else None
    if before is None or after is None:
        return "The study gave no masks that could be compared."
    several = len(compared_hospitals(results)) > 1
    where = "the worst hospital" if several else before[0]
    if len(stages) == 1:
        return f"Nothing was adapted; Dice at {where} is {decimal(before[1].value)}."
    sentence = f"Without a label from the hospitals, Dice at {where} "
    sentence += moved(before[1].value, after[1].value)
    return f"{sentence}{who(before[0], after[0]) if several else ''}."


def mask_explanation(results: Results) -> list[str]:
    """Sentences on the mean, the worst hospital, the control, and hospitals that lost."""
    stages, compared = key_stages(results), compared_hospitals(results)
    if not compared:
        return []
    sentences = [_values(results, stages, compared)]
    result = mean_mask_estimate(results, stages[-1])
    change = gain(mean_mask_estimate(results, "source"), result)
    if change is not None and len(stages) > 1:
        sentences.append(f"Over the source that is {signed(change.value)}{chance(change)}.")
    over_control = gain(mean_mask_estimate(results, "bn_adapted"), result)
    if over_control is not None and stages[-1] != "bn_adapted":
        sentences.append(
            "Re-estimating the normalisation trains nothing; what came after it "
            f"{beyond(over_control)}{chance(over_control)}."
        )
    if len(compared) > 1:
        sentences.append(_worst(results, stages))
    for stage in stages[:-1]:
        if lost := [name for name in compared if _fell(results, name, stage, stages[-1])]:
            sentences.append(f"The result is worse than {_way(stage)} at {names(lost)}.")
    return sentences


def _values(
    results: Results, stages: tuple[SegmentationStage, ...], compared: tuple[str, ...]
) -> str:
    parts = []
    for stage in stages:
        mean = mean_mask_estimate(results, stage)
        way = WAYS.get(stage, f"as the result (“{STAGE_NAMES[stage].lower()}”)")
        parts.append(f"{decimal(mean.value if mean else None)} {way}")
    several = f"Mean Dice over {count(len(compared), 'hospital')}"
    return f"{several if len(compared) > 1 else f'Dice at {compared[0]}'}: {', '.join(parts)}."


def _worst(results: Results, stages: tuple[SegmentationStage, ...]) -> str:
    found = [worst_hospital(results, stage) for stage in stages]
    parts = [f"{decimal(item[1].value)} ({item[0]})" for item in found if item is not None]
    return f"The worst hospital at each of these steps: {', '.join(parts)}."


def _way(stage: SegmentationStage) -> str:
    return "the source's weights" if stage == "source" else "re-estimating the normalisation"


def _fell(results: Results, name: str, before: SegmentationStage, after: SegmentationStage) -> bool:
    change = gain(mask_estimate(results, name, before), mask_estimate(results, name, after))
    return change is not None and change.value < 0
