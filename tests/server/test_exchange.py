"""What an exchange does when nodes and SuperLink fail, in the ways in which Flower tells it."""

import threading
import time

import httpx
import pytest
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from sonofed_common.contract.errors import ParameterError, PolicyError, QuorumError
from sonofed_common.contract.recorddict import from_recorddict, to_recorddict
from sonofed_common.contract.records import Records
from sonofed_common.contract.study import Cohort
from sonofed_common.runtime import SILENT, Events
from sonofed_server.study import exchange as module
from sonofed_server.study.exchange import AWAY_SECONDS, PATIENCE_SECONDS, Exchange
from sonofed_simulations.engines.inline import InlineGrid

SITES = ("north", "south")


class Failing(InlineGrid):
    """Nodes that answer with their number; subclasses fail first."""

    def __init__(self):
        super().__init__(len(SITES))
        self.sent = []
        self.came = dict.fromkeys((1, 2), "first")

    def get_nodes(self):
        return [NodeInfo(node_id=n, last_activated_at=t) for n, t in self.came.items()]

    def push_messages(self, messages):
        messages = list(messages)
        self.sent += [m.metadata.dst_node_id for m in messages]
        return super().push_messages(messages)

    def _handle(self, message):
        asked = from_recorddict(message.content).config["number"]
        node = message.metadata.dst_node_id
        reply = Records(config={"node": node, "number": asked})
        return Message(to_recorddict(reply), reply_to=message)


class Away(Failing):
    """The first node is away for a while: what is sent to it comes back as an error."""

    def __init__(self, times, code=ErrorCode.NODE_UNAVAILABLE):
        super().__init__()
        self._times, self._code = times, code

    def _handle(self, message):
        if message.metadata.dst_node_id == 1 and self._times > 0:
            self._times -= 1
            return Message(Error(self._code, "gone"), reply_to=message)
        return super()._handle(message)


class Restarted(Failing):
    """The first node takes a message, dies, and comes back without it."""

    def pull_messages(self, ids):
        if self.came[1] == "first":
            self._waiting = {i: m for i, m in self._waiting.items() if i not in ids}
            self.came[1] = "again"
        return super().pull_messages(ids)


class Slow(Failing):
    """The first node's reply is not there for some questions."""

    def __init__(self, times):
        super().__init__()
        self._times = times

    def pull_messages(self, ids):
        if self._times > 0:
            self._times -= 1
            return []
        return super().pull_messages(ids)


class Locked(Failing):
    """The SuperLink cannot, for some calls."""

    def __init__(self, times, code=500):
        super().__init__()
        self._times, self._code = times, code

    def pull_messages(self, ids):
        if self._times > 0:
            self._times -= 1
            request = httpx.Request("POST", "https://localhost")
            response = httpx.Response(self._code, request=request)
            raise httpx.HTTPStatusError("locked", request=request, response=response)
        return super().pull_messages(ids)


class Unwanted(Failing):
    """The SuperLink hangs for a while, and then does not want what it got and could not confirm."""

    def __init__(self, times, clock):
        super().__init__()
        self._times, self._clock = times, clock

    def push_messages(self, messages):
        messages = list(messages)
        if self._times > 0:
            self._times -= 1
            self._clock[0] += 2 * PATIENCE_SECONDS
            raise ObjectPushError("0", 1, "")
        return super().push_messages(messages)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Time that passes only when the test sleeps; other threads have their own."""
    now, here = [0.0], threading.get_ident()
    monotonic, sleep = time.monotonic, time.sleep

    def pass_by(seconds):
        if threading.get_ident() != here:
            return sleep(seconds)
        now[0] += seconds

    monkeypatch.setattr(
        time, "monotonic", lambda: now[0] if threading.get_ident() == here else monotonic()
    )
    monkeypatch.setattr(time, "sleep", pass_by)
    return now


def exchange(grid, quorum=None):
    cohort = Cohort(sites=SITES, quorum=quorum, deadline_seconds=10_000)
    return Exchange(grid, cohort, SILENT, nodes=dict(zip(SITES, (1, 2), strict=True)))


def ask(exchange, number=7):
    request = Records(config={"number": number})
    return [
        (s, r.config["node"], r.config["number"]) for s, r in exchange.ask("query.missing", request)
    ]


BOTH = [("north", 1, 7), ("south", 2, 7)]


@pytest.mark.parametrize(
    "code",
    [
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ],
)
def test_a_node_that_comes_back_is_asked_again_and_counts_once(code):
    grid = Away(30, code)
    assert ask(exchange(grid)) == BOTH
    assert grid.sent.count(1) == 31 and grid.sent.count(2) == 1


def test_a_node_that_lost_its_message_is_asked_again_and_counts_once():
    grid = Restarted()
    assert ask(exchange(grid)) == BOTH
    assert sorted(grid.sent) == [1, 1, 2]


def test_a_node_that_stays_away_is_left_out_long_before_the_deadline(clock):
    tried = exchange(Away(10**6), quorum=1)
    assert ask(tried) == BOTH[1:]
    assert "not connected" in tried.missing["north"]
    assert AWAY_SECONDS <= clock[0] < AWAY_SECONDS + 60
    # The next phase tries it once and waits no more.
    before = clock[0]
    tried.new_phase()
    assert ask(tried) == BOTH[1:] and clock[0] - before < 10
    with pytest.raises(QuorumError, match=r"below the quorum of 2.*north"):
        ask(exchange(Away(10**6)))


def test_an_interrupted_phase_goes_on_without_whom_it_had_lost_while_the_quorum_holds():
    told, lost = [], {"north": "its training collapsed [collapse]"}
    tried = exchange(Failing(), quorum=1)
    tried.events = Events(listeners=[told.append])
    tried.go_on(lost, {})
    assert ask(tried) == BOTH[1:] and tried.missing == tried.failed() == lost
    assert [e["site"] for e in told if e["event"] == "site-failed"] == ["north"]
    tried.forgive()
    assert ask(tried) == BOTH and tried.failed() == tried.forgiven == lost
    tried.new_phase()
    assert not tried.failed()
    # The other one did not come back with the coordinator.
    del tried.nodes["south"]
    tried.go_on(lost, {})
    assert ask(tried) == BOTH[:1] and not tried.failed()


def test_who_was_silent_before_an_interruption_is_not_forgiven_after_it():
    tried = exchange(Away(10**6), quorum=1)
    assert ask(tried) == BOTH[1:]
    again = exchange(Failing(), quorum=1)
    again.go_on(tried.missing, tried.forgiven)
    again.forgive()
    assert ask(again) == BOTH[1:] and again.failed() == tried.missing


def test_a_site_that_cannot_do_the_work_is_not_asked_again():
    grid = Away(1, ErrorCode.CLIENT_APP_RAISED_EXCEPTION)
    assert ask(exchange(grid, quorum=1)) == BOTH[1:] and grid.sent.count(1) == 1


def test_a_locked_database_is_waited_for_and_a_lost_run_is_not():
    assert ask(exchange(Locked(20))) == BOTH
    with pytest.raises(httpx.HTTPStatusError):
        ask(exchange(Locked(int(PATIENCE_SECONDS / module.RETRY_SECONDS) + 5)))
    with pytest.raises(httpx.HTTPStatusError):
        ask(exchange(Locked(1, 404)))


def test_a_push_that_the_superlink_took_in_part_is_sent_anew(clock):
    grid = Unwanted(1, clock)
    assert ask(exchange(grid)) == BOTH and grid.sent == [1, 2]
    with pytest.raises(ObjectPushError):
        ask(exchange(Unwanted(10**6, clock)))


def test_all_who_broke_the_quorum_are_named():
    tried = exchange(Away(10**6), quorum=2)
    tried.cohort = Cohort(sites=("west", *SITES), quorum=2, deadline_seconds=10_000)
    with pytest.raises(
        QuorumError, match=r"1 of 3 sites.*; north: .*; also missing: west \[quorum"
    ):
        ask(tried)


class Refusing(Failing):
    """The first node answers with an error."""

    def __init__(self, error):
        super().__init__()
        self._error = error

    def _handle(self, message):
        if message.metadata.dst_node_id == 1:
            facts = {"error": self._error.code, "message": "no"}
            return Message(to_recorddict(Records(config=facts)), reply_to=message)
        return super()._handle(message)


@pytest.mark.parametrize("error", [PolicyError, ParameterError])
def test_who_declines_what_is_optional_is_not_lost(error):
    seen = []
    exchange = Exchange(
        Refusing(error),
        Cohort(sites=SITES),
        Events(listeners=[seen.append]),
        {"north": 1, "south": 2},
    )
    question = Records(config={"number": 1})
    if error is ParameterError:
        with pytest.raises(ParameterError):
            list(exchange.ask("train.synthesise", question))
        return
    answers = list(exchange.ask("train.synthesise", question))
    assert [site for site, _ in answers] == ["south"]
    assert exchange.sites() == list(SITES) and not exchange.missing
    assert [e["site"] for e in seen if e["event"] == "declined"] == ["north"]
    with pytest.raises(PolicyError):
        list(exchange.ask("train.embed", question))


def test_who_missed_the_selection_shares_no_images_of_an_earlier_one():
    exchange = Exchange(Failing(), Cohort(sites=SITES, quorum=1), SILENT, {"north": 1, "south": 2})
    exchange.unselected = frozenset({"north"})
    answers = list(exchange.ask("train.synthesise", Records(config={"number": 1})))
    assert [site for site, _ in answers] == ["south"] and set(exchange.missing) == {"north"}


def test_who_is_awaited_is_told_once_for_each_time():
    told = []
    tried = exchange(Slow(100))
    tried.events = Events(listeners=[told.append])
    assert ask(tried) == BOTH
    names = [(e["event"], e.get("site")) for e in told]
    assert names == [("asked", None), ("awaited", "north")]
    assert told[0]["action"] == "query.missing" and told[0]["sites"] == list(SITES)
    assert told[0]["bytes"] == tried.traffic.to_sites > 0
