"""Numbers as the tables' pages write them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sonofed_simulations.statistics import Contrast, Interval


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def interval_text(found: Interval, form: str = ".3f") -> str:
    """``value (low to high)``."""
    return f"{found.value:{form}} ({found.low:{form}} to {found.high:{form}})"


def contrast_text(found: Contrast | None) -> str:
    """``value (low to high), corrected p``; empty where there is none."""
    if found is None:
        return ""
    holm = "" if found.p_holm is None else f", {found.p_holm:.3f}"
    return f"{interval_text(found, '+.3f')}{holm}"


def number_text(value: float | None, form: str) -> str:
    """The number, or empty where there is none."""
    return "" if value is None else f"{value:{form}}"
