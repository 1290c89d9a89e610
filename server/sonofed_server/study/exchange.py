"""Exchanges with the sites: push, then pull in the cohort's order, with a quorum and a deadline."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import httpx
from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from sonofed_common.contract.errors import (
    OrderError,
    ParameterError,
    PolicyError,
    QuorumError,
    SonoFedError,
    error_from_code,
)
from sonofed_common.contract.names import DECLINABLE
from sonofed_common.contract.recorddict import from_recorddict, packed_bytes, to_recorddict
from sonofed_common.contract.records import Records
from sonofed_common.contract.study import Cohort
from sonofed_common.runtime import Events

POLL_SECONDS = 0.05
LONGEST_POLL_SECONDS = 0.5
WAITED_SHARE = 0.1
"""Pause between two questions for a reply, as a share of how long it was waited for."""

PATIENCE_SECONDS = 120.0
"""How long the SuperLink may answer that it cannot: on a slow disk its database is locked at times,
which it does not wait out; and what it took already from a call whose answer did not come, it does
not take again in the same push."""

AWAY_SECONDS = 240.0
"""How long a site may be away before an exchange goes on without it. Flower takes about a minute to
see that a node died, and does not let it back in before."""

LARGE = 2**23
"""Bytes of a message that is not left to Python to find, which may take several of them."""

LOOK_SECONDS = 2.0
"""Pause between two looks at when the nodes came."""

RETRY_SECONDS = 1.0
AWAY = frozenset(
    {
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    }
)
"""What Flower answers for a node that is gone, or for a message that went with it."""

NEED_SELECTION = frozenset({"query.annotations", "train.synthesise", "train.classifier"})
T = TypeVar("T")
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
    forgiven : dict of str to str
        Sites that failed in the phase at hand and were asked again in it, and why they failed.
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
    forgiven: dict[str, str] = field(default_factory=dict)
    unselected: frozenset[str] = frozenset()
    _away: dict[str, float] = field(default_factory=dict, repr=False)
    _came: dict[int, str] = field(default_factory=dict, repr=False)
    _looked: float = field(default=0.0, repr=False)

    def sites(self) -> list[str]:
        """Sites that take part in the phase at hand, in the cohort's order."""
        return [s for s in self.cohort.sites if s in self.nodes and s not in self.missing]

    def connected(self) -> set[int]:
        """Flower's ids of the nodes that are there now."""
        return set(_patiently(lambda: list(self.grid.get_node_ids())))

    def new_phase(self) -> None:
        """Ask every enrolled site again."""
        self.missing, self.forgiven = {}, {}

    def go_on(self, missing: Mapping[str, str], forgiven: Mapping[str, str]) -> None:
        """Go on with an interrupted phase: without whom it had lost, if the quorum allows that."""
        self.missing, self.forgiven = dict(missing), dict(forgiven)
        if len(self.sites()) < self.cohort.smallest:
            # Another site did not come back, so those that were lost are needed.
            self.missing = {}
        # The enrolment that came before told of them that they answer.
        for site, reason in self.missing.items():
            self.events.emit("site-failed", site=site, reason=reason)

    def forgive(self) -> None:
        """Ask again whoever answered with an error; who was silent would cost a deadline more."""
        silent = f"[{QuorumError.code}]"
        self.forgiven |= {s: r for s, r in self.missing.items() if not r.endswith(silent)}
        self.missing = {s: r for s, r in self.missing.items() if r.endswith(silent)}

    def failed(self) -> dict[str, str]:
        """Sites that failed in the phase at hand, forgiven or not, and why they last did."""
        return self.forgiven | self.missing

    def lose(self, site: str, action: str, reason: str) -> None:
        """Go on without a site until the next phase."""
        self.missing[site] = reason
        self.events.emit("site-failed", site=site, action=action, reason=reason)

    def ask(
        self,
        action: str,
        request: Request,
        sites: list[str] | None = None,
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

        Notes
        -----
        A site whose policy refuses one of `DECLINABLE` takes part all the same; it yields nothing.
        """
        asked = self.sites() if sites is None else sites
        barred = self.unselected if action in NEED_SELECTION else frozenset()
        self._look()
        before = self.traffic.to_sites
        nodes = {site: self.nodes[site] for site in asked if site not in barred}
        pushed = self._push(action, request, nodes)
        sent = self.traffic.to_sites - before
        self.events.emit("asked", action=action, sites=list(pushed), bytes=sent)
        until = time.monotonic() + self.cohort.deadline_seconds
        failures: dict[str, SonoFedError] = {}
        for site in asked:
            reply = self._pull(site, pushed[site], until) if site in pushed else _unselected(site)
            if action in DECLINABLE and isinstance(reply, PolicyError):
                self.events.emit("declined", site=site, action=action)
                continue
            if isinstance(reply, SonoFedError):
                failures[site] = reply
                self.lose(site, action, str(reply))
                if len(self.sites()) < self.cohort.smallest:
                    raise _broken(action, failures, self.sites(), self.cohort)
                continue
            yield site, reply
            del reply

    def ask_nodes(
        self, action: str, request: Records, nodes: list[int], until: float
    ) -> Iterator[tuple[int, Records | SonoFedError]]:
        """Ask nodes by Flower's ids: only enrolment does, before sites have names."""
        self._look()
        pushed = self._push(action, request, {f"node {node}": node for node in nodes})
        for name, sent in pushed.items():
            yield sent.node, self._pull(name, sent, until)

    def _push(self, action: str, request: Request, nodes: dict[str, int]) -> dict[str, _Sent]:
        def sender(site: str, node: int) -> Callable[[], str]:
            def send() -> str:
                records = request if isinstance(request, Records) else request(site)
                return self._send(action, to_recorddict(records), [node])[0]

            return send

        senders = {site: sender(site, node) for site, node in nodes.items()}
        if isinstance(request, Records):
            # Encoded, hashed and sent to the SuperLink once for all of them.
            sent = self._send(action, to_recorddict(request), list(nodes.values()))
        else:
            sent = [send() for send in senders.values()]
        return {
            site: _Sent(node, senders[site], message, self._came.get(node, ""))
            for (site, node), message in zip(nodes.items(), sent, strict=True)
        }

    def _look(self) -> None:
        """See when each node came: one that came anew has lost what was sent to it before."""
        # A node that is away is not listed; when it last came is kept.
        nodes = _patiently(lambda: list(self.grid.get_nodes()))
        self._came |= {node.node_id: node.last_activated_at for node in nodes}
        self._looked = time.monotonic()

    def _send(self, action: str, content: RecordDict, nodes: list[int]) -> list[str]:
        self.traffic.to_sites += len(nodes) * packed_bytes(content)
        ttl = self.cohort.deadline_seconds
        messages = [Message(content, node, action, ttl=ttl) for node in nodes]
        # What arrived twice is done once: the sites know a request that they have met.
        sent = _patiently(lambda: list(self.grid.push_messages(messages)))
        size = packed_bytes(content)
        messages.clear()
        del content
        _tidy(size)
        return sent

    def _pull(self, site: str, sent: _Sent, until: float) -> Records | SonoFedError:
        began, told = time.monotonic(), False
        while True:
            try:
                found = _patiently(lambda: list(self.grid.pull_messages([sent.message])))
            except (ValueError, LookupError, TypeError):
                return ParameterError(f"the reply of site {site} cannot be put together")
            for message in found:
                if message.has_error() and message.error.code in AWAY:
                    if self._gone(site):
                        return QuorumError(f"site {site} is not connected")
                    time.sleep(RETRY_SECONDS)
                    sent.again(self._came.get(sent.node, ""))
                    break
                self._away.pop(site, None)
                if not message.has_content():
                    return QuorumError(f"site {site} could not do the work; see its own log")
                try:
                    reply = from_recorddict(message.content)
                except ParameterError as error:
                    return error
                size = packed_bytes(message.content)
                self.traffic.from_sites += size
                del message
                _tidy(size)
                if "error" in reply.config:
                    return error_from_code(
                        str(reply.config["error"]), str(reply.config.get("message", ""))
                    )
                return reply
            if time.monotonic() - self._looked > LOOK_SECONDS:
                self._look()
                if not told:
                    self.events.emit("awaited", site=site)
                    told = True
                # The site's enclave knows the request, and goes on with the work that it began.
                if (came := self._came.get(sent.node, "")) != sent.came:
                    sent.again(came)
            if time.monotonic() > until:
                return QuorumError(f"site {site} did not answer within the deadline")
            waited = time.monotonic() - began
            time.sleep(min(max(POLL_SECONDS, WAITED_SHARE * waited), LONGEST_POLL_SECONDS))

    def _gone(self, site: str) -> bool:
        since = self._away.setdefault(site, time.monotonic())
        return time.monotonic() - since > AWAY_SECONDS


@dataclass
class _Sent:
    node: int
    send: Callable[[], str]
    message: str
    came: str

    def again(self, came: str) -> None:
        """Send it anew; a reply to what was sent before is never asked for."""
        self.message, self.came = self.send(), came


def _tidy(size: int) -> None:
    """Let go of a message: Flower's records refer to themselves, and would stay for a while."""
    if size > LARGE:
        gc.collect()


def _patiently(call: Callable[[], list[T]]) -> list[T]:
    failed: float | None = None
    while True:
        try:
            return call()
        except (httpx.HTTPStatusError, ObjectPushError) as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
                raise
            # A call that fails may itself have waited for minutes.
            failed = time.monotonic() if failed is None else failed
            if time.monotonic() - failed > PATIENCE_SECONDS:
                raise
        time.sleep(RETRY_SECONDS)


def _unselected(site: str) -> OrderError:
    return OrderError(f"site {site} took no part in the selection; it joins the next study")


def _broken(
    action: str, failures: dict[str, SonoFedError], left: list[str], cohort: Cohort
) -> SonoFedError:
    site, error = next(iter(failures.items()))
    sentence = (
        f"'{action}' ended with {len(left)} of {len(cohort.sites)} sites, below the quorum of "
        f"{cohort.smallest}; {site}: {error.message}"
    )
    if others := [s for s in cohort.sites if s not in left and s != site]:
        sentence += f"; also missing: {', '.join(others)}"
    return error_from_code(error.code, sentence)
