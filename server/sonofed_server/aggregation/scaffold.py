"""SCAFFOLD (Karimireddy et al., ICML 2020, algorithm 1): control variates against drift."""

from __future__ import annotations

from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.names import BUFFERS
from sonofed_common.contract.records import Records, grouped
from sonofed_server.aggregation.fedavg import FedAvg
from sonofed_server.aggregation.strategy import Averaging, Round, Weights


class Scaffold(Averaging):
    """Average weights, and changes of control variates, of all sites.

    Notes
    -----
    ``c <- c + sum_i p_i (c_i' - c_i)`` with ``p_i`` the sites' shares of the weights' mean, so that
    ``c`` stays ``sum_i p_i c_i``, the gradient of the pooled loss (the paper takes equal shares).
    That needs every site in every round, which the study demands, and shares that stay: labels that
    come while rounds go on leave ``c`` a little off. The step at the coordinator is 1. The state is
    ``control/...``.
    """

    def __init__(self, round: Round) -> None:
        super().__init__(round)
        self.change = FedAvg()

    def broadcast(self) -> dict[str, Weights]:
        """Return the mean of the sites' control variates; nothing where it is 0."""
        control = self.round.state.group("control")
        return {"control": control} if control else {}

    def add(self, site: str, reply: Records, weight: float) -> None:
        """Fold in a site's weights, and the change of its control variate."""
        change, weights = reply.group("control"), reply.group("weights")
        wanted = {n: a.shape for n, a in weights.items() if not n.endswith(BUFFERS)}
        if {n: a.shape for n, a in change.items()} != wanted:
            raise ParameterError(
                f"site {site} sent no control variate of its weights; check its version"
            )
        super().add(site, reply, weight)
        self.change.add(change, weight)

    def finish(self) -> tuple[Weights, Records]:
        """Return the weighted mean of weights, and the next mean of control variates."""
        after, change = self.mean.mean(), self.change.mean()
        control = self.round.state.group("control")
        for name, array in change.items():
            if name in control:
                array += control[name]
        return after, Records(grouped("control", change)) if change else self.round.state
