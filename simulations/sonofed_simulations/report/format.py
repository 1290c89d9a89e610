"""Numbers as a reader wants them: the template's filters and the terminal's cells."""

from __future__ import annotations

from sonofed_common.contract.results import Estimate

ABSENT = "–"


def decimal(value: float | None, digits: int = 2) -> str:
    """Format a share as medical journals do, without its leading zero: ``.84``, ``−.03``."""
    if value is None:
        return ABSENT
    text = f"{abs(value):.{digits}f}"
    negative = value < 0 and float(text) != 0
    return ("−" if negative else "") + (text[1:] if text.startswith("0.") else text)


def signed(value: float | None, digits: int = 2) -> str:
    """Format a difference with its sign: ``+.13``, ``−.02``, ``.00``."""
    if value is None:
        return ABSENT
    text = decimal(value, digits)
    return text if text.startswith("−") or float(text) == 0 else f"+{text}"


def interval(estimate: Estimate | None, digits: int = 2, sign: bool = False) -> str:
    """Format an interval: ``.71 to .90``; empty where there is none."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    show = signed if sign else decimal
    return f"{show(estimate.low, digits)} to {show(estimate.high, digits)}"


def with_interval(estimate: Estimate | None) -> str:
    """Format a number and its interval on one line: ``.84 (.78 to .90)``."""
    if estimate is None:
        return ABSENT
    bounds = interval(estimate)
    return decimal(estimate.value) + (f" ({bounds})" if bounds else "")


def size(count: float | None) -> str:
    """Format bytes in decimal units: ``48.2 MB``."""
    if count is None:
        return ABSENT
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return (
                f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
            )
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Format seconds: ``0.4 s``, ``38 s``, ``4 min 05 s``, ``2 h 10 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def thousands(number: int) -> str:
    """Format a count with thin spaces: ``1 160``."""
    return f"{number:,}".replace(",", "\u202f")


def count(number: int, noun: str) -> str:
    """Format a count with its noun: ``1 site``, ``4 sites``."""
    return f"{thousands(number)} {noun if number == 1 else f'{noun}s'}"
