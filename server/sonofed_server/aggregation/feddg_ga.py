"""FedDG-GA (Zhang et al., CVPR 2023): weights follow the sites' generalisation gaps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from tempfile import TemporaryFile

from sonofed_common.contract.errors import DeploymentError
from sonofed_common.contract.names import RECEIVED_LOSS, TRAINED_LOSS
from sonofed_common.contract.records import Records, from_bytes, grouped, to_bytes
from sonofed_server.aggregation.strategy import Averaging, Round, Weights

STEP = 0.2
"""Largest change of a weight in the first round; the paper's default."""


class FedDGGA(Averaging):
    """Weigh a site more in the mean, the more it loses by the federation's weights.

    Notes
    -----
    A site's gap ``G`` after a round is the loss of the averaged weights on its labelled images less
    that of the weights that it had sent. Of round r of R, with ``mu`` the mean gap::

        a_i <- a_i + (G_i - mu) / max_j |G_j - mu| * STEP (1 - r / R)

    then clipped to [0, 1] and divided by their sum. They start as `weight_of` says. A site whose
    losses did not come, or are no numbers, keeps its weight. What a round weighs is known with its
    last reply: replies wait in a temporary file until then, so memory is one reply, but the disk
    holds all of them. The state is ``shares`` and ``losses`` by site.
    """

    def __init__(self, round: Round) -> None:
        super().__init__(round)
        self._shares: dict[str, float] = dict(round.state.config.get("shares", {}))
        self._before: dict[str, float] = dict(round.state.config.get("losses", {}))
        self._losses: dict[str, float] = {}
        self._gaps: dict[str, float] = {}
        self._replies = _Spool()
        self._weights: dict[str, float] = {}

    def add(self, site: str, reply: Records, weight: float) -> None:
        """Keep a site's weights, and note its gap."""
        self._replies.put(Records(grouped("weights", reply.group("weights"))))
        self._weights[site] = weight
        received, trained = (reply.metrics.get(n, math.nan) for n in (RECEIVED_LOSS, TRAINED_LOSS))
        if site in self._before and math.isfinite(received):
            self._gaps[site] = received - self._before[site]
        if math.isfinite(trained):
            self._losses[site] = trained

    def finish(self) -> tuple[Weights, Records]:
        """Return the mean by the adjusted weights."""
        total = sum(self._weights.values())
        for site, weight in self._weights.items():
            self._shares.setdefault(site, weight / total)
        past = max(self.round.number - 1, 0) / self.round.total
        shares = adjusted(self._shares, self._gaps, STEP * (1 - past))
        for site, reply in zip(self._weights, self._replies.read(), strict=True):
            if shares[site] > 0:
                self.mean.add(reply.group("weights"), shares[site])
        return self.mean.mean(), Records(config={"shares": shares, "losses": self._losses})


def adjusted(
    shares: Mapping[str, float], gaps: Mapping[str, float], step: float
) -> dict[str, float]:
    """Return the next weights of all sites, which sum to 1.

    Parameters
    ----------
    shares : mapping of str to float
        Weights so far, not negative, one of them positive.
    gaps : mapping of str to float
        Generalisation gaps of some of these sites.
    step : float
        Change of the weight of the site whose gap is farthest from the mean.
    """
    mean = sum(gaps.values()) / len(gaps) if gaps else 0.0
    farthest = max((abs(gap - mean) for gap in gaps.values()), default=0.0)
    moved = {
        site: share + (step * (gaps[site] - mean) / farthest if farthest and site in gaps else 0.0)
        for site, share in shares.items()
    }
    clipped = {site: min(max(share, 0.0), 1.0) for site, share in moved.items()}
    total = sum(clipped.values())
    return {site: share / total for site, share in clipped.items()}


class _Spool:
    """Records on disk, in the order in which they came."""

    def __init__(self) -> None:
        # Without a name: it goes with this object, or with the process.
        self._file = TemporaryFile()  # noqa: SIM115
        self._sizes: list[int] = []

    def put(self, records: Records) -> None:
        data = to_bytes(records)
        try:
            self._file.write(data)
            self._file.flush()
        except OSError:
            raise DeploymentError(
                "the disk of the temporary folder (TMPDIR) is full; under feddg_ga it holds every "
                "site's update of a round; make room, then resume the study"
            ) from None
        self._sizes.append(len(data))

    def read(self) -> Iterator[Records]:
        self._file.seek(0)
        for size in self._sizes:
            yield from_bytes(self._file.read(size))
