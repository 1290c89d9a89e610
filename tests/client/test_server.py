"""An enclave's socket: what is too large, what ends early, and what was denied meanwhile."""

import tempfile
import time
from pathlib import Path

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sonofed_client.enclave import transport
from sonofed_client.enclave.jobs import Jobs
from sonofed_client.enclave.parts import DESCRIPTION_BYTES, send
from sonofed_client.enclave.room import Room
from sonofed_client.enclave.server import MESSAGE_BYTES, Service, serve
from sonofed_client.enclave.store import open_store
from sonofed_client.enclave.transport import SocketEnclave
from sonofed_client.enclave.wall import Wall, open_studies
from sonofed_client.settings import SiteData, SiteSettings
from sonofed_common.contract import actions
from sonofed_common.contract import enclave_pb2 as messages
from sonofed_common.contract.actions import request
from sonofed_common.contract.enclave_pb2_grpc import EnclaveStub
from sonofed_common.contract.errors import ParameterError, StudyDeniedError, StudyWaitingError
from sonofed_common.contract.records import Records
from sonofed_common.contract.study import Study
from sonofed_common.security import public_hex

KEY = public_hex(Ed25519PrivateKey.generate())
STUDY = Study(name="trial", cohort={"sites": ["north"]})
LABELLED = Records(metrics={"done": 5, "total": 5})
WAIT_SECONDS = 60.0
GRPC_DEFAULT = 4 * 1024**2


class Hospital:
    """Its wall is real; its work is over at once."""

    def __init__(self, settings, store):
        self.wall = Wall(settings, store)
        self.admit = self.wall.admit

    def perform(self, action, request):
        return self.wall.perform(action, request, lambda _: LABELLED)


@pytest.fixture
def settings(tmp_path):
    data = SiteData(kind="table", path=tmp_path)
    return SiteSettings(name="north", store=tmp_path / "store", data=data, coordinator_key=KEY)


@pytest.fixture
def socket():
    with tempfile.TemporaryDirectory(prefix="sonofed-") as folder:
        yield Path(folder) / "enclave.sock"


@pytest.fixture
def wall(settings, socket):
    store = open_store(settings)
    hospital = Hospital(settings, store)
    jobs = Jobs(hospital, store, lambda: "images")
    jobs.start()
    server = serve(Service(hospital, jobs, hospital.wall.ledger, Room(2**30)), socket)
    yield hospital.wall
    server.stop(None).wait()


@pytest.fixture
def stub(wall, socket):
    unlimited = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(f"unix:{socket}", unlimited) as channel:
        yield EnclaveStub(channel)


def refused(wall, count=1):
    """The first of the refusals, once there are so many."""
    until = time.monotonic() + WAIT_SECONDS
    while True:
        found = [e for e in wall.ledger.entries() if e["outcome"] == "refused"]
        if sum(max(1, e["repeats"]) for e in found) >= count:
            return found[0]
        assert time.monotonic() < until
        time.sleep(0.02)


def large(size):
    return Records({"w": np.zeros(size, np.uint8)})


def test_a_description_that_is_too_long_stands_in_the_ledger(stub, wall):
    for size in (DESCRIPTION_BYTES + 1, GRPC_DEFAULT + 1):
        reply = stub.Describe(messages.Request(records=bytes(size)))
        assert reply.failure.code == "parameters" and "too long" in reply.failure.sentence
    assert "too long" in refused(wall, 2)["message"]


def test_a_large_part_is_refused_as_any_other(stub, wall):
    head = messages.Part(head=messages.Head(action="query.missing", size=100))
    status = stub.Submit(iter([head, messages.Part(data=bytes(GRPC_DEFAULT + 1))]))
    assert status.failure.code == "parameters"
    assert refused(wall)["outcome"] == "refused"


@pytest.mark.parametrize("end", ["too large", "gone"])
def test_a_request_that_ends_before_it_is_whole_stands_in_the_ledger(stub, wall, end):
    def parts():
        yield messages.Part(head=messages.Head(action="query.missing", size=2**29))
        if end == "too large":
            yield messages.Part(data=bytes(MESSAGE_BYTES + 1))
        yield messages.Part(data=b"x")
        time.sleep(1)
        call.cancel()

    call = stub.Submit.future(parts())
    with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
        call.result(timeout=WAIT_SECONDS)
    assert "ended before" in refused(wall)["message"]


def test_a_relay_does_not_send_a_description_that_no_enclave_takes(socket):
    with pytest.raises(ParameterError, match="send less"):
        SocketEnclave(socket, patience=1).perform("query.describe", large(DESCRIPTION_BYTES))


def test_a_relay_does_not_wait_for_an_enclave_that_finds_its_message_too_large(
    wall, socket, monkeypatch
):
    monkeypatch.setattr(transport, "DESCRIPTION_BYTES", 2**40)
    with pytest.raises(ParameterError, match="send less"):
        SocketEnclave(socket, patience=1).perform("query.describe", large(MESSAGE_BYTES))


def test_what_was_denied_after_the_work_does_not_leave(stub, wall, settings):
    facts = {"study": STUDY.name, "seed": STUDY.seed}
    description = actions.Describe(**facts, study_digest=STUDY.digest(), content=STUDY)
    with pytest.raises(StudyWaitingError):
        wall.admit("query.describe", request(description))
    known = open_studies(settings, wall.ledger)
    known.approve(f"sha256:{STUDY.digest()}")
    status = stub.Submit(send(request(actions.Annotations(**facts)), "query.annotations"))
    job = messages.Job(id=status.job)
    while status.state in (messages.WAITING, messages.RUNNING):
        *_, status = stub.Watch(job)
    assert status.state == messages.DONE
    known.deny("trial")
    (part,) = stub.Fetch(job)
    assert part.failure.code == StudyDeniedError.code
    assert [e["outcome"] for e in wall.ledger.entries()] == [
        "refused",
        "approved",
        "sent",
        "denied",
        "refused",
    ]
