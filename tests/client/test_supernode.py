"""How a supervisor sees that the SuperLink answers a node."""

import threading

from flwr.supernode import fleet_http_connection

from sonofed_client.supernode import show_heartbeats


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
