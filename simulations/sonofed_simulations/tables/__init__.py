"""Tables of the literature, each made anew side by side with ours."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from sonofed_simulations.tables.request import Made, Request

TABLES = {
    "adaptation-ablation": "adaptation_ablation",
    "adaptation-homogenisation": "adaptation_homogenisation",
    "adaptation-reconstruction": "adaptation_reconstruction",
    "adaptation-selection": "adaptation_selection",
    "selection-from-rio": "selection_from_rio",
    "aggregation": "aggregation",
    "synthetic-domains": "synthetic_domains",
    "synthetic-ratios": "synthetic_ratios",
    "synthetic-all": "synthetic_all",
    "synthetic-federated": "synthetic_federated",
    "pseudo-labels": "pseudo_labels",
    "target-informed": "target_informed",
}
"""What ``sonofed-lab table`` knows: a name, and the module here whose ``make`` makes the table."""


def maker(name: str) -> Callable[[Request], Made]:
    """Return the function that makes a table; only its own module is loaded."""
    module = import_module(f"{__name__}.{TABLES[name]}")
    return cast("Callable[[Request], Made]", module.make)
