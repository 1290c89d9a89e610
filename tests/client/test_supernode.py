"""How a supervisor sees that the SuperLink answers a node."""

import threading

import httpx
import pytest
from answering import answering
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.supernode import fleet_http_connection

from sonofed_client.admission import NOT_KNOWN, note_answer, refusal
from sonofed_client.supernode import Client, show_heartbeats


def test_a_refusal_is_known_until_the_superlink_answers_again(tmp_path, monkeypatch, caplog):
    heartbeat = tmp_path / "supernode.heartbeat"
    monkeypatch.setattr(Client, "heartbeat", heartbeat)

    def ask():
        with answering(401, b"") as port:
            client = Client(f"http://127.0.0.1:{port}")
            with pytest.raises(httpx.HTTPStatusError):
                client.PullMessages(PullMessagesRequest())

    # Who was not let in yet may have a clock that is off.
    ask()
    assert not refusal(heartbeat).exists()
    note_answer(heartbeat)
    ask()
    assert refusal(heartbeat).exists() and not heartbeat.exists()
    assert caplog.messages.count(NOT_KNOWN) == 1
    note_answer(heartbeat)
    assert heartbeat.exists() and not refusal(heartbeat).exists()


def test_a_heartbeat_shows_once_the_superlink_answered_it(tmp_path, monkeypatch):
    monkeypatch.setattr(
        fleet_http_connection, "HeartbeatSender", fleet_http_connection.HeartbeatSender
    )
    file, sent = tmp_path / "heartbeat", threading.Semaphore(0)
    seen = []

    def send():
        # Not answered, and tried again.
        seen.append(file.exists())
        sent.release()
        return len(seen) > 1

    show_heartbeats(file)
    sender = fleet_http_connection.HeartbeatSender(send)
    sender.start()
    assert sent.acquire(timeout=60) and sent.acquire(timeout=60)
    sender.stop()
    assert seen == [False, False] and file.exists()
