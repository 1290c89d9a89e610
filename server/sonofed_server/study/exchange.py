"""Exchanges with the sites: push, then pull in the cohort's order, with a quorum and a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from flwr.app import Message
from flwr.serverapp import Grid

from sonofed_common.contract.errors import (
    OrderError,
    ParameterError,
    QuorumError,
    SonoFedError,
    error_from_code,
)
from sonofed_common.contract.recorddict import from_recorddict, packed_bytes, to_recorddict
from sonofed_common.contract.records import Records
from sonofed_common.contract.study import Cohort
from sonofed_common.runtime import Events

POLL_SECONDS = 0.05
NEED_SELECTION = frozenset({"query.annotations", "train.classifier"})
Request = Records | Callable[[str], Records]


@dataclass
class Traffic:
    """Bytes that crossed, as encoded records."""

    to_sites: int = 0
    from_sites: int = 0


@dataclass
class Exchange:
    """The server's only way to the sites.

    Attributes
    ----------
    grid : Grid
        Flower's.
    cohort : Cohort
        Who takes part, the quorum and the deadline.
    nodes : dict of str to int
        Flower's node id of each enrolled site.
    traffic : Traffic
        Running totals.
    missing : dict of str to str
        Sites that failed in the phase at hand, and why; they are asked again in the next phase.
    unselected : frozenset of str
        Sites that missed the selection. They fail where an action rests on it, without being asked:
        what they may still hold as selected is of a selection that this study did not complete.
    """

    grid: Grid
    cohort: Cohort
    events: Events
    nodes: dict[str, int] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    missing: dict[str, str] = field(default_factory=dict)
    unselected: frozenset[str] = frozenset()

    def sites(self) -> list[str]:
        """Sites that take part in the phase at hand, in the cohort's order."""
        return [s for s in self.cohort.sites if s in self.nodes and s not in self.missing]

    def new_phase(self) -> None:
        """Ask every enrolled site again."""
        self.missing = {}

    def forgive(self) -> None:
        """Ask again whoever answered with an error; who was silent would cost a deadline more."""
        silent = f"[{QuorumError.code}]"
        self.missing = {s: reason for s, reason in self.missing.items() if reason.endswith(silent)}

    def lose(self, site: str, action: str, reason: str) -> None:
        """Go on without a site until the next phase."""
        self.missing[site] = reason
        self.events.emit("site-failed", site=site, action=action, reason=reason)

    def ask(
        self, action: str, request: Request, sites: list[str] | None = None
    ) -> Iterator[tuple[str, Records]]:
        """Ask sites for an action and yield (site, reply) in the cohort's order.

        Parameters
        ----------
        action : str
            Named action, for example ``"train.embed"``.
        request : Records or callable
            The same for all sites, or made for each.
        sites : list of str, optional
            Default: all that take part.

        Raises
        ------
        QuorumError
            Fewer sites than the quorum answered before the deadline. A site's own error is raised
            in its place when that is what broke the quorum.
        """
        asked = self.sites() if sites is None else sites
        barred = self.unselected if action in NEED_SELECTION else frozenset()
        pushed = {site: self._push(action, request, site) for site in asked if site not in barred}
        until = time.monotonic() + self.cohort.deadline_seconds
        failures: dict[str, SonoFedError] = {}
        for site in asked:
            reply = self._pull(site, pushed[site], until) if site in pushed else _unselected(site)
            if isinstance(reply, SonoFedError):
                failures[site] = reply
                self.lose(site, action, str(reply))
                if len(self.sites()) < self.cohort.smallest:
                    raise _broken(action, failures, len(self.sites()), self.cohort)
                continue
            yield site, reply

    def ask_nodes(
        self, action: str, request: Records, nodes: list[int], until: float
    ) -> Iterator[tuple[int, Records | SonoFedError]]:
        """Ask nodes by Flower's ids: only enrolment does, before sites have names."""
        pushed = {node: self._send(action, request, node) for node in nodes}
        for node, message in pushed.items():
            yield node, self._pull(f"node {node}", message, until)

    def _push(self, action: str, request: Request, site: str) -> str:
        records = request if isinstance(request, Records) else request(site)
        return self._send(action, records, self.nodes[site])

    def _send(self, action: str, records: Records, node: int) -> str:
        content = to_recorddict(records)
        self.traffic.to_sites += packed_bytes(content)
        message = Message(content, node, action, ttl=self.cohort.deadline_seconds)
        (message_id,) = self.grid.push_messages([message])
        return message_id

    def _pull(self, site: str, message_id: str, until: float) -> Records | SonoFedError:
        while True:
            for message in self.grid.pull_messages([message_id]):
                if not message.has_content():
                    return QuorumError(f"site {site} could not do the work; see its own log")
                try:
                    reply = from_recorddict(message.content)
                except ParameterError as error:
                    return error
                self.traffic.from_sites += packed_bytes(message.content)
                if "error" in reply.config:
                    return error_from_code(str(reply.config["error"]), str(reply.config["message"]))
                return reply
            if time.monotonic() > until:
                return QuorumError(f"site {site} did not answer within the deadline")
            time.sleep(POLL_SECONDS)


def _unselected(site: str) -> OrderError:
    return OrderError(f"site {site} took no part in the selection; it joins the next study")


def _broken(
    action: str, failures: dict[str, SonoFedError], left: int, cohort: Cohort
) -> SonoFedError:
    site, error = next(iter(failures.items()))
    sentence = (
        f"'{action}' ended with {left} of {len(cohort.sites)} sites, below the quorum of "
        f"{cohort.smallest}; {site}: {error.message}"
    )
    return error_from_code(error.code, sentence)
