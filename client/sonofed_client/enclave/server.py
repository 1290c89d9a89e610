"""The enclave's server: its five calls on a unix socket, and nothing else."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from sonofed_client.enclave.deadlines import Deadlines
from sonofed_client.enclave.entry import MESSAGE_LENGTH, Entry
from sonofed_client.enclave.interface import Enclave
from sonofed_client.enclave.jobs import Job, Jobs, State
from sonofed_client.enclave.ledger import Ledger
from sonofed_client.enclave.parts import DESCRIPTION_BYTES, failure, read, receive, send
from sonofed_client.enclave.room import Room
from sonofed_common.contract import enclave_pb2 as messages
from sonofed_common.contract.enclave_pb2_grpc import (
    EnclaveServicer,
    add_EnclaveServicer_to_server,
)
from sonofed_common.contract.errors import ConfigurationError, ParameterError, SonoFedError
from sonofed_common.contract.names import DESCRIBE
from sonofed_common.contract.records import Records, to_bytes
from sonofed_common.runtime import end_signals

T = TypeVar("T")
THREADS = 16
CALLS = 24
"""Calls at a time; one more is told at once that the enclave is busy."""

WATCHES = 8
WATCH_SECONDS = 20.0
SUBMIT_SECONDS = 600.0
"""Longest time that one request may take to come in."""

STOP_SECONDS = 5.0
POLL_SECONDS = 0.2
PATH_BYTES = 107
MESSAGE_BYTES = 16 * 1024**2
"""What is larger, gRPC itself ends: the ledger hears of it where it is part of a request."""

OPTIONS = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", MESSAGE_BYTES)]

log = logging.getLogger(__name__)


class Service(EnclaveServicer):  # type: ignore[misc]
    """Answers the calls of `enclave.proto`.

    Parameters
    ----------
    enclave : Enclave
        Answers descriptions at once.
    jobs : Jobs
        Does the rest.
    ledger : Ledger
        Gets what is refused before it comes to be a request.
    room : Room
        Memory for requests.
    """

    def __init__(self, enclave: Enclave, jobs: Jobs, ledger: Ledger, room: Room) -> None:
        self._enclave, self._jobs, self._ledger, self._room = enclave, jobs, ledger, room
        self._watches = threading.BoundedSemaphore(WATCHES)
        self._deadlines = Deadlines(SUBMIT_SECONDS)

    def Describe(self, request: messages.Request, _: grpc.ServicerContext) -> messages.Reply:  # noqa: N802
        """Answer ``query.describe``."""
        try:
            asked = self._noting(lambda: _description(request.records))
            return messages.Reply(records=to_bytes(self._enclave.perform(DESCRIBE, asked)))
        except Exception as error:
            return messages.Reply(failure=failure(_named(error)))

    def Submit(  # noqa: N802
        self, request_iterator: Iterator[messages.Part], context: grpc.ServicerContext
    ) -> messages.Status:
        """Take a request in and queue its job."""
        try:
            # A sender that stalls would hold a thread, and its request's memory, for ever.
            with self._deadlines.limit(context):
                received = self._noting(lambda: receive(request_iterator, self._room.memory))
            return _status(self._jobs.submit(received))
        except grpc.RpcError:
            # Its sender is gone or took too long, or a part was too large for gRPC.
            self._note(ParameterError("the request ended before it was whole"))
            raise
        except Exception as error:
            return messages.Status(state=State.FAILED, failure=failure(_named(error)))

    def Watch(  # noqa: N802
        self, request: messages.Job, context: grpc.ServicerContext
    ) -> Iterator[messages.Status]:
        """Tell the state of a job now, and each time that it changes."""
        job = self._jobs.find(request.id)
        if job is None:
            yield messages.Status(job=request.id[:64])
            return
        yield _status(job)
        if not self._watches.acquire(blocking=False):
            return
        try:
            changes, until = job.changes, time.monotonic() + WATCH_SECONDS
            while not job.state.over and time.monotonic() < until and context.is_active():
                now = self._jobs.wait(job, changes, 1.0)
                if now != changes:
                    yield _status(job)
                changes = now
        finally:
            self._watches.release()

    def Fetch(  # noqa: N802
        self, request: messages.Job, context: grpc.ServicerContext
    ) -> Iterator[messages.Part]:
        """Send the reply of a job that is done."""
        try:
            reply = self._jobs.take(request.id)
        except Exception as error:
            yield messages.Part(failure=failure(_named(error)))
            return
        if reply is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no reply; submit the request again")
            return
        yield from send(reply)

    def Cancel(self, request: messages.Job, _: grpc.ServicerContext) -> messages.Status:  # noqa: N802
        """Cancel a job."""
        job = self._jobs.find(request.id)
        if job is None:
            return messages.Status(job=request.id[:64])
        self._jobs.cancel(job)
        return _status(job)

    def _noting(self, take_in: Callable[[], T]) -> T:
        try:
            return take_in()
        except SonoFedError as error:
            self._note(error)
            raise

    def _note(self, error: SonoFedError) -> None:
        # A stream may end with a failure, whose sentence is the relay's own and of any length.
        entry = Entry(outcome="refused", message=str(error)[:MESSAGE_LENGTH])
        self._ledger.refuse(entry, error.code)


class _Lenient(grpc.ServerInterceptor):  # type: ignore[misc]
    """Takes bytes that are no message for an empty one, which no call answers with anything.

    gRPC itself would refuse them before the ledger hears of it, and log a traceback for each.
    """

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        return handler._replace(request_deserializer=_or_empty(handler.request_deserializer))


def serve(service: Service, path: Path) -> grpc.Server:
    """Start to answer on a unix socket, readable and writable by its owner and group only.

    Parameters
    ----------
    service : Service
        Answers.
    path : Path
        Of the socket; its folder is made if absent.

    Raises
    ------
    ConfigurationError
        The socket cannot be made there.
    """
    path = path.absolute()
    if len(os.fsencode(path)) > PATH_BYTES:
        raise ConfigurationError(
            f"the socket's path has more than {PATH_BYTES} bytes; choose a shorter one"
        )
    # Modes from the first instant, not after a chmod.
    before = os.umask(0o027)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    finally:
        os.umask(before)
    server = grpc.server(
        ThreadPoolExecutor(THREADS, "calls"),
        interceptors=[_Lenient()],
        maximum_concurrent_rpcs=CALLS,
        options=OPTIONS,
    )
    add_EnclaveServicer_to_server(service, server)
    os.umask(0o117)
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError:
        raise ConfigurationError(
            f"the socket {path} cannot be made; check its folder and that no file is in its place"
        ) from None
    finally:
        os.umask(before)
    server.start()
    return server


def wait_for_the_end(server: grpc.Server) -> None:
    """Answer until the process is asked to end; then let calls finish for a moment."""
    asked_to_end = end_signals()
    while not asked_to_end:
        time.sleep(POLL_SECONDS)
    # A call that gRPC lost sight of must not keep the process from its end.
    server.stop(grace=1.0).wait(STOP_SECONDS)


def _status(job: Job) -> messages.Status:
    error = job.error
    return messages.Status(
        job=job.id,
        state=int(job.state),
        percent=job.percent,
        failure=failure(error) if error is not None else None,
    )


def _description(file: bytes) -> Records:
    if len(file) > DESCRIPTION_BYTES:
        raise ParameterError("the description is too long; send no arrays and fewer facts")
    return read(memoryview(file))


def _or_empty(parse: Callable[[bytes], Message]) -> Callable[[bytes], Message]:
    def parse_or_empty(data: bytes) -> Message:
        try:
            return parse(data)
        except DecodeError:
            return parse(b"")

    return parse_or_empty


def _named(error: Exception) -> SonoFedError:
    if isinstance(error, SonoFedError):
        return error
    # The text of an error that we did not write may name a file or a patient.
    log.error("a call failed: %s", type(error).__name__)
    return SonoFedError("the site could not do the work; its own log says why")
