"""What a table of arms says of the published effect, and claims nothing inside an interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sonofed_simulations.statistics import Interval, is_told
from sonofed_simulations.tables.arm_summary import ArmRow, ArmSummary

LEAST_SEEDS = 3
"""Fewer tell nothing of the chance of training."""
NAMES = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "auroc": "AUROC"}


@dataclass(frozen=True)
class Claim:
    """An effect that the work reports.

    Attributes
    ----------
    text : str
        One sentence with the published numbers, without the full stop.
    arms : tuple of str
        Rows that are to show it, each in its difference to `Arm.against` or in its gap.
    site : str
        Where; ignored for the gap.
    direction : {1, -1}
        Sign of the published effect.
    quantity : {"difference", "gap"}
        What shows it.
    metrics : tuple of str
        Of `METRICS`; the published one first.
    """

    text: str
    arms: tuple[str, ...]
    site: str
    direction: Literal[1, -1] = 1
    quantity: Literal["difference", "gap"] = "difference"
    metrics: tuple[str, ...] = ("accuracy", "auroc")


@dataclass(frozen=True)
class _Effect:
    arm: str
    found: Interval
    verdict: Literal["holds", "reversed", "open", "early"]


def findings(summary: ArmSummary, claims: Sequence[Claim]) -> str:
    """Return one paragraph: which claims hold here, and which effects exceed their intervals.

    Claims that no finished cell speaks to are left out.
    """
    said = [text for claim in claims if (text := _claim(summary, claim))]
    if said:
        said.append(
            "Differences are told from 0 where they are after Holm's correction, gaps by their own "
            "interval alone."
        )
    if summary.cells < summary.wanted:
        said.insert(
            0,
            f"**{summary.cells} of {summary.wanted} cells have run.** No interval here holds the "
            "chance of training.",
        )
    return " ".join(said)


def _claim(summary: ArmSummary, claim: Claim) -> str:
    rows = [row for row in summary.rows if row.arm in claim.arms]
    texts = [text for metric in claim.metrics if (text := _metric(rows, claim, metric))]
    return f"{claim.text}. Here: {'; '.join(texts)}." if texts else ""


def _metric(rows: Sequence[ArmRow], claim: Claim, metric: str) -> str:
    effects = [effect for row in rows if (effect := _effect(row, claim, metric)) is not None]
    where = "gap" if claim.quantity == "gap" else f"at {claim.site}"
    subject = f"**{NAMES[metric]}** {where}"
    if not effects:
        return ""
    parts = []
    for verdict, saying in (
        ("holds", "it has the published sign, beyond its interval, in"),
        ("reversed", "it is reversed, beyond its interval, in"),
    ):
        found = [effect for effect in effects if effect.verdict == verdict]
        if found:
            parts.append(f"{saying} {len(found)} of {len(effects)} ({_list(found)})")
    undecided = [effect for effect in effects if effect.verdict == "open"]
    if undecided:
        largest = max(undecided, key=lambda effect: abs(effect.found.value))
        parts.append(
            f"in {len(undecided)} of {len(effects)} it is not told from 0"
            f" (the largest such: {_list([largest])})"
        )
    early = [effect for effect in effects if effect.verdict == "early"]
    if early:
        parts.append(
            f"{len(early)} of {len(effects)} have run in fewer than {LEAST_SEEDS} seeds and tell "
            f"nothing yet ({_list(early)})"
        )
    return f"{subject}, {', '.join(parts)}"


def _effect(row: ArmRow, claim: Claim, metric: str) -> _Effect | None:
    found: Interval | None = row.gap.get(metric)
    sure, seeds = True, row.seeds
    if claim.quantity == "difference":
        difference = found = row.differences.get(claim.site, {}).get(metric)
        if difference is not None:
            sure, seeds = is_told(difference), difference.seeds
    if found is None:
        return None
    if seeds < LEAST_SEEDS:
        return _Effect(row.arm, found, "early")
    if not sure or found.low <= 0 <= found.high:
        return _Effect(row.arm, found, "open")
    return _Effect(row.arm, found, "holds" if found.value * claim.direction > 0 else "reversed")


def _list(effects: Sequence[_Effect]) -> str:
    return ", ".join(
        f"{e.arm} {e.found.value:+.3f} ({e.found.low:+.3f} to {e.found.high:+.3f})" for e in effects
    )
