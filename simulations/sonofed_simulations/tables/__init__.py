"""Tables of the literature, each made anew side by side with ours."""

from __future__ import annotations

NAMES = ("adaptation-selection",)
"""What ``sonofed-lab table`` knows."""
