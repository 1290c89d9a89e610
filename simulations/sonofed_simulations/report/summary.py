"""The summary in plain sentences, generated from the numbers, whichever way they went."""

from __future__ import annotations

from sonofed_common.contract.results import (
    Estimate,
    Results,
    Stage,
    compared_sites,
    gain,
    mean_over_sites,
    site_estimate,
    worst_site,
)
from sonofed_simulations.report.format import count, decimal, interval, signed

WAYS: dict[Stage, str] = {"source": "", "bn_adapted": "re-normalised without labels"}
MODELS: dict[Stage, str] = {
    "bn_adapted": "re-normalised without labels",
    "source": "the source model",
}


def labels_and_images(results: Results) -> tuple[int, int]:
    """Labels given and images to choose from, over the sites that were not lost."""
    present = [s for s in results.sites.values() if s.missing_reason is None]
    return sum(s.labelled for s in present), sum(s.images for s in present)


def baseline(results: Results) -> Stage:
    """Stage that a gain counts over: re-normalised without labels, where all sites tested that."""
    return "source" if mean_over_sites(results, "bn_adapted") is None else "bn_adapted"


def headline(results: Results) -> str:
    """One sentence: labels spent, and what they made of the AUROC at the worst hospital."""
    labels, images = labels_and_images(results)
    spent = f"With {count(labels, 'label')} of {count(images, 'image')}"
    stage = baseline(results)
    before, after = worst_site(results, stage), worst_site(results, "adapted")
    if before is None or after is None:
        return f"{spent}, the study gave no adapted model that could be tested."
    several = len(compared_sites(results)) > 1
    change = moved(before[1].value, after[1].value, WAYS[stage])
    where = "the worst hospital" if several else before[0]
    return f"{spent}, AUROC at {where} {change}{who(before[0], after[0]) if several else ''}."


def explanation(results: Results) -> list[str]:
    """Sentences below the headline: the mean, the source, sites that lost, who is missing."""
    sentences = []
    compared = compared_sites(results)
    stage = baseline(results)
    before, after = mean_over_sites(results, stage), mean_over_sites(results, "adapted")
    change = gain(before, after)
    if before and after and change and len(compared) > 1:
        sentences.append(
            f"On average over {count(len(compared), 'hospital')} it "
            f"{moved(before.value, after.value)}{chance(change)}."
        )
    elif change is not None:
        sentences.append(f"The change is {signed(change.value)}{chance(change)}.")
    shipped, worst = mean_over_sites(results, "source"), worst_site(results, "source")
    if stage == "bn_adapted" and shipped and worst:
        mean = f"{decimal(shipped.value)} on average, " if len(compared) > 1 else ""
        sentences.append(
            "Re-normalised means with the network's normalisation re-estimated on each hospital's "
            "own images, which needs no label at all. The source model as shipped has "
            f"{mean}{decimal(worst[1].value)} at {worst[0]}."
        )
    for other, way in MODELS.items():
        lost = [name for name in compared if _fell(results, name, other)]
        if lost and other in (stage, "source"):
            sentences.append(f"Adapted, the model did worse than {way} at {names(lost)}.")
    return sentences + missing(results)


def missing(results: Results) -> list[str]:
    """Name the hospitals whose numbers are not here; empty where none is missing."""
    if not results.missing_sites:
        return []
    return [f"Not in these numbers, because lost on the way: {names(results.missing_sites)}."]


def moved(before: float, after: float, way: str = "") -> str:
    """Say what became of a measure: ``rose from .71 to .84``; ``way`` tells of the first."""
    first, second = decimal(before), decimal(after)
    if first == second:
        return f"stayed at {second}{f', as {way}' if way else ''}"
    first += f" ({way})" if way else ""
    return f"{'rose' if after > before else 'fell'} from {first} to {second}"


def who(before: str, after: str) -> str:
    """Name the hospital that did worst before and the one that did worst after."""
    if before == after:
        return f" ({after}, the worst before and after)"
    return f" ({before} before, {after} after)"


def beyond(change: Estimate) -> str:
    """Say what came on top of a control: ``added .05 to that``."""
    text = signed(change.value)
    if float(text.replace("−", "-")) == 0:
        return "changed nothing beyond that"
    verb = "added" if change.value > 0 else "took away"
    return f"{verb} {decimal(abs(change.value))} {'to' if change.value > 0 else 'from'} that"


def chance(change: Estimate) -> str:
    """Give a difference's interval in brackets, and whether it may be chance."""
    if change.low is None or change.high is None:
        return " (no interval was computed)"
    text = f" (95% interval of the difference {interval(change, sign=True)}"
    return f"{text}: this may be chance)" if change.low <= 0 <= change.high else f"{text})"


def _fell(results: Results, name: str, stage: Stage) -> bool:
    site = results.sites[name]
    change = gain(site_estimate(site, stage), site_estimate(site, "adapted"))
    return change is not None and change.value < 0


def names(several: tuple[str, ...] | list[str]) -> str:
    """List names in words: ``North, East and West``."""
    return several[0] if len(several) == 1 else f"{', '.join(several[:-1])} and {several[-1]}"
