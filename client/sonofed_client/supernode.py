"""The hospital's Flower node: takes messages from the SuperLink and has the relay answer them.

Flower's own SuperNode starts a process for every message, hands the message on to it over HTTP, and
takes the app from the coordinator that this process loads. Here one process does all of it, with
Flower's connection and its keys: nothing that the coordinator sends is ever run, and a message is
on its way to the enclave as soon as it is there. Flower's calls get more time for an answer than
thirty seconds, in which the two parts that go at a time cross no slow link.

Use: ``python -m sonofed_client.supernode --help``
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import httpx
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.config import parse_config_args
from flwr.common.constant import ErrorCode
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.exit import register_signal_handlers
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.telemetry import EventType
from flwr.supernode import fleet_http_connection
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.fleet_http_connection import http_request_response

from sonofed_client.admission import explain_refusal, note_answer, note_refusal
from sonofed_client.app import app
from sonofed_common.contract.recorddict import PATIENCE, send_larger_parts, take_apart

SHORTEST_REST = 0.05
LONGEST_REST = 0.5
WAITED_SHARE = 0.1
"""Pause between two questions for a message, as a share of how long none came."""

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0
"""Seconds between two questions for a part of a message that is not there yet."""

log = logging.getLogger(__name__)


class Client(FleetHttpClient):
    """Flower's calls, which tell where the answer to one for a message did not come.

    Flower asks again by itself, and may then be told that there is nothing: what the SuperLink gave
    to the first call is gone. They also tell when a node is refused that had been let in, at which
    Flower ends this process without a word.
    """

    lost = threading.Event()
    heartbeat: ClassVar[Path | None] = None

    def _unary_unary(self, **call: Any) -> Any:
        try:
            return super()._unary_unary(**call)
        except httpx.HTTPStatusError as error:
            let_in = self.heartbeat is not None and self.heartbeat.exists()
            if let_in and error.response.status_code == httpx.codes.UNAUTHORIZED:
                note_refusal(self.heartbeat)
            raise

    def PullMessages(  # noqa: N802, for it is Flower's
        self, request: PullMessagesRequest
    ) -> PullMessagesResponse:
        """Ask for a message."""
        try:
            return super().PullMessages(request)
        except httpx.HTTPStatusError as error:
            if error.response.is_server_error:
                self.lost.set()
            raise
        except httpx.TransportError:
            self.lost.set()
            raise


class Node:
    """A hospital's node, connected.

    Parameters
    ----------
    connection : tuple
        Flower's calls of the Fleet API.
    settings : mapping
        The hospital's own words, for the relay.
    lost : threading.Event
        Set where an answer that may have held a message did not come.
    """

    def __init__(
        self, connection: tuple[Any, ...], settings: Mapping[str, Any], lost: threading.Event
    ) -> None:
        self._id, self._receive, self._send, *_, self._pull, self._push, self._confirm = connection
        self._settings, self._lost = dict(settings), lost
        TaskIdentity.node_id, TaskIdentity.task_id = self._id, 0

    def serve(self) -> None:
        """Answer messages, one after the other, until one may have been lost on its way here.

        Notes
        -----
        The SuperLink gives a message once. Only a node that comes anew is sent again what it did
        not answer.
        """
        since = time.monotonic()
        while True:
            try:
                found = self._receive()
            except RunNotRunningException:
                # A proxy on the way may refuse a call; to Flower that is a run which is over.
                found = None
            if found is None:
                if self._lost.is_set():
                    return
                waited = WAITED_SHARE * (time.monotonic() - since)
                time.sleep(min(max(SHORTEST_REST, waited), LONGEST_REST))
                continue
            try:
                self._answer(*found)
            except RunNotRunningException:
                log.info("a message's run is over")
            except Exception:
                # A node that comes anew is sent again what it did not answer.
                log.exception("a message was lost on its way")
                raise
            since = time.monotonic()

    def _answer(self, head: Message, tree: ObjectTree) -> None:
        run = TaskIdentity.run_id = head.metadata.run_id
        message = pull_and_inflate_object_from_tree(
            tree,
            partial(self._pull, run),
            partial(self._confirm, run),
            return_type=Message,
            initial_backoff=FIRST_PAUSE,
            backoff_cap=LONGEST_PAUSE,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id
        began = time.monotonic()
        reply = self._work(message)
        del message
        taken = time.monotonic() - began
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects = get_all_nested_objects(reply)
            missing, session = self._send(
                remove_content_from_message(reply), get_object_tree(reply), taken
            )
            del reply
            take_apart(objects, partial(self._push, run, session), object_ids_to_push=missing)

    def _work(self, message: Message) -> Message:
        run = message.metadata.run_id
        context = Context(run, self._id, self._settings, RecordDict(), {})
        try:
            return app(message, context)
        except Exception:
            log.exception("a message was not understood")
            reason = "the site does not know what is asked; both sides need the same version"
            error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
            return Message(error, reply_to=message)


def main() -> None:
    """Connect as the command line says, and serve until the process is asked to end."""
    parser = argparse.ArgumentParser(description="Relay the SuperLink's messages to the enclave.")
    parser.add_argument("--superlink", required=True, help="host:port")
    parser.add_argument("--root-certificates", required=True, type=Path, help="PEM")
    parser.add_argument("--auth-supernode-private-key", required=True, type=Path, help="OpenSSH")
    parser.add_argument("--node-config", default="", help='enclave="SOCKET"')
    parser.add_argument("--heartbeat", type=Path, help="file that each answered heartbeat touches")
    given = parser.parse_args()
    key = load_ssh_private_key(given.auth_supernode_private_key.read_bytes(), None)
    if not isinstance(key, EllipticCurvePrivateKey):
        raise SystemExit(f"{given.auth_supernode_private_key} holds no key of a node")
    register_signal_handlers(EventType.RUN_SUPERNODE_LEAVE, "the node was asked to end")
    explain_refusal(given.heartbeat)
    Client.heartbeat = given.heartbeat
    be_patient()
    send_larger_parts()
    if given.heartbeat is not None:
        show_heartbeats(given.heartbeat)
    certificates = given.root_certificates.read_bytes()
    keys = (key, key.public_key())
    threading.excepthook = partial(end_with_thread, threading.excepthook)
    settings, again = parse_config_args([given.node_config]), True
    vars(fleet_http_connection)["FleetHttpClient"] = Client
    while again:
        Client.lost.clear()
        again = False
        with http_request_response(given.superlink, False, certificates, keys) as connection:
            Node(connection, settings, Client.lost).serve()
            again = True
            log.info("an answer was lost on its way; the node comes anew")
    # Flower keeps to itself what else ended the connection.
    raise SystemExit("the connection to the SuperLink ended")


def be_patient() -> None:
    """Give Flower's calls in this process more time; heartbeats have a time of their own."""
    defaults = ProtobufClient.__init__.__kwdefaults__
    assert defaults is not None
    defaults["timeout"] = PATIENCE


def show_heartbeats(file: Path) -> None:
    """Touch a file with each heartbeat of this process's nodes that the SuperLink answered."""

    def sender(send: Callable[[], bool]) -> HeartbeatSender:
        def send_and_show() -> bool:
            answered = send()
            if answered:
                note_answer(file)
            return answered

        return HeartbeatSender(send_and_show)

    vars(fleet_http_connection)["HeartbeatSender"] = sender


def end_with_thread(
    report: Callable[[threading.ExceptHookArgs], Any], ended: threading.ExceptHookArgs
) -> None:
    """End this process with its heartbeat: without, the SuperLink takes the node for gone."""
    report(ended)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
