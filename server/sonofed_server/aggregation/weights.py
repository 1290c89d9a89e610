"""How much a site's reply counts."""

from __future__ import annotations

from sonofed_common.contract.records import Records
from sonofed_common.contract.study import Aggregation


def weight_of(reply: Records, settings: Aggregation) -> float:
    """Number of examples behind a reply, or 1 under uniform weighting; 0 without examples."""
    examples = float(reply.config["examples"])
    return min(examples, 1.0) if settings.weighting == "uniform" else examples
