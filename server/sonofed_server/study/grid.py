"""Flower's Grid, asking sooner for the parts of a reply that are still on their way.

A reply can be seen before its parts are there. Flower then waits for a second, for two, up to ten
before it asks for a part again; a part takes much less. Nothing else is changed.
"""

from __future__ import annotations

from functools import partial

from flwr.supercore.inflatable.inflatable_utils import pull_objects
from flwr.superlink.grid import http_grid

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0
"""Seconds."""


def hasten() -> None:
    """Have this process's grid ask sooner."""
    hasty = partial(pull_objects, initial_backoff=FIRST_PAUSE, backoff_cap=LONGEST_PAUSE)
    vars(http_grid)["pull_objects"] = hasty
