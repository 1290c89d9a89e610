"""All aggregation strategies by the names that a study gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sonofed_server.aggregation.fedadam import FedAdam
from sonofed_server.aggregation.feddg_ga import FedDGGA
from sonofed_server.aggregation.scaffold import Scaffold
from sonofed_server.aggregation.strategy import Averaging, Round, Strategy

STRATEGIES: Mapping[str, Callable[[Round], Strategy]] = {
    "fedavg": Averaging,
    "fedprox": Averaging,
    "fedadam": FedAdam,
    "feddg_ga": FedDGGA,
    "scaffold": Scaffold,
}
