"""The interface of aggregation strategies, and FedAvg's, which the others build on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from sonofed_common.contract.records import Array, Records
from sonofed_common.contract.study import Aggregation
from sonofed_server.aggregation.fedavg import FedAvg

Weights = dict[str, Array]


@dataclass(frozen=True)
class Round:
    """What a strategy knows when a round begins.

    Attributes
    ----------
    settings : Aggregation
        The study's.
    number : int
        From 0.
    total : int
        Rounds of the study.
    start : callable
        Makes the weights that the sites start from; called only by who needs them.
    state : Records
        What the strategy returned after the round before; empty at first.
    """

    settings: Aggregation
    number: int
    total: int
    start: Callable[[], Weights]
    state: Records = field(default_factory=Records)


class Strategy(Protocol):
    """One round of an aggregation: made anew for each, so that all it keeps is its state."""

    def broadcast(self) -> dict[str, Weights]:
        """Return groups of arrays that travel to the sites beside the weights."""
        ...

    def add(self, site: str, reply: Records, weight: float) -> None:
        """Fold in a site's reply.

        Parameters
        ----------
        site : str
            Its name.
        reply : Records
            ``weights/...`` and what else the strategy asked for.
        weight : float
            See `weight_of`; positive.

        Raises
        ------
        ParameterError
            The reply lacks something or does not fit the others.
        DivergenceError
            A value is not finite.
        """
        ...

    def finish(self) -> tuple[Weights, Records]:
        """Return the next weights, empty without replies, and the state for the next round."""
        ...


class Averaging:
    """FedAvg (McMahan et al., 2017); of FedProx too, which differs at the sites only.

    Parameters
    ----------
    round : Round
        At hand.
    """

    def __init__(self, round: Round) -> None:
        self.round = round
        self.mean = FedAvg()

    def broadcast(self) -> dict[str, Weights]:
        """Return nothing."""
        return {}

    def add(self, site: str, reply: Records, weight: float) -> None:
        """Fold in a site's weights."""
        self.mean.add(reply.group("weights"), weight)

    def finish(self) -> tuple[Weights, Records]:
        """Return the weighted mean."""
        return self.mean.mean(), Records()
