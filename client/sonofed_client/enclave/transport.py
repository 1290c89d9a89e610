"""An enclave behind a unix socket, as its relay sees it."""

from __future__ import annotations

import time
from pathlib import Path

import grpc

from sonofed_client.enclave.parts import DESCRIPTION_BYTES, receive, send
from sonofed_common.contract import enclave_pb2 as messages
from sonofed_common.contract.enclave_pb2_grpc import EnclaveStub
from sonofed_common.contract.errors import EngineError, ParameterError, error_from_code
from sonofed_common.contract.names import DESCRIBE
from sonofed_common.contract.records import Records, from_bytes, to_bytes

TOO_LARGE = "the request is larger than this site takes; send less"
PATIENCE_SECONDS = 120.0
"""How long an enclave may be away, for example while it starts anew."""

OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
ANSWER_SECONDS = 60.0
"""An enclave that lives answers sooner: a stream of states ends before."""

MOVE_SECONDS = 600.0
AWAY = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}
_OVER_A_LIMIT = "larger than max"
_WAITING = (messages.WAITING, messages.RUNNING)


class SocketEnclave:
    """An enclave in a process of its own.

    Parameters
    ----------
    path : Path
        The enclave's socket.
    patience : float
        Seconds without any answer after which it counts as gone.

    Notes
    -----
    An enclave that is killed takes its jobs up again; this side only asks again, with the same
    request, and so finds the same job.
    """

    def __init__(self, path: Path, patience: float = PATIENCE_SECONDS) -> None:
        self._stub = EnclaveStub(grpc.insecure_channel(f"unix:{path.absolute()}", OPTIONS))
        self._patience = patience
        self._heard = 0.0

    def perform(self, action: str, request: Records) -> Records:
        """Have one named action done, and wait for its reply.

        Raises
        ------
        EngineError
            The enclave is gone.
        SonoFedError
            What the enclave answered.
        """
        self._heard = time.monotonic()
        while True:
            try:
                reply = self._describe(request) if action == DESCRIBE else self._do(action, request)
            except grpc.RpcError as error:
                # An enclave that is busy has this code as well, but another sentence.
                if _OVER_A_LIMIT in (error.details() or ""):
                    raise ParameterError(TOO_LARGE) from None
                if error.code() not in AWAY:
                    raise EngineError("the site's enclave failed; its own log says why") from None
                reply = None
            if reply is not None:
                return reply
            if time.monotonic() - self._heard > self._patience:
                raise EngineError("the site's enclave does not answer; start it")
            time.sleep(min(0.5, self._patience / 10))

    def _describe(self, request: Records) -> Records:
        encoded = to_bytes(request)
        if len(encoded) > DESCRIPTION_BYTES:
            raise ParameterError(TOO_LARGE)
        reply = self._stub.Describe(messages.Request(records=encoded), timeout=ANSWER_SECONDS)
        if reply.WhichOneof("reply") == "failure":
            raise error_from_code(reply.failure.code, reply.failure.sentence)
        return from_bytes(reply.records)

    def _do(self, action: str, request: Records) -> Records | None:
        """Submit, wait and fetch; None if the enclave knows nothing of the job any more."""
        status = self._stub.Submit(send(request, action), timeout=MOVE_SECONDS)
        self._heard = time.monotonic()
        job = messages.Job(id=status.job)
        while status.state in _WAITING:
            time.sleep(0.01)
            for latest in self._stub.Watch(job, timeout=ANSWER_SECONDS):
                status, self._heard = latest, time.monotonic()
        if status.state == messages.FAILED:
            raise error_from_code(status.failure.code, status.failure.sentence)
        if status.state != messages.DONE:
            return None
        try:
            return receive(self._stub.Fetch(job, timeout=MOVE_SECONDS)).records
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return None
            raise
