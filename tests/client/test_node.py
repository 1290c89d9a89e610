"""A hospital's node over its connection: a call for a message whose answer never comes."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import (
    ActivateNodeResponse,
    DeactivateNodeResponse,
    PullMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.supernode import fleet_http_connection

from sonofed_client.supernode import Client, Node

ANSWERS = {
    "activate-node": ActivateNodeResponse(node_id=7),
    "deactivate-node": DeactivateNodeResponse(),
    "pull-messages": PullMessagesResponse(),
    "send-node-heartbeat": SendNodeHeartbeatResponse(success=True),
}


@pytest.fixture
def calls(monkeypatch):
    """Calls that came to a fleet whose first answer to a call for a message is lost."""
    met = []

    class Fleet(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            call = self.path.rsplit("/", 1)[1]
            first = call == "pull-messages" and call not in met
            met.append(call)
            if first:
                self.close_connection = True
                return
            body = ANSWERS[call].SerializeToString()
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Fleet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setitem(vars(fleet_http_connection), "FleetHttpClient", Client)
    Client.lost.clear()
    yield met, f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    Client.lost.clear()


def test_a_node_comes_anew_where_a_message_may_have_been_lost(calls):
    """Or nobody would send it again: the SuperLink has given it to the first call."""
    met, address = calls
    key = ec.generate_private_key(ec.SECP384R1())
    with fleet_http_connection.http_request_response(
        address, True, None, (key, key.public_key())
    ) as connection:
        Node(connection, {}, Client.lost).serve()
    told = [call for call in met if call != "send-node-heartbeat"]
    assert told == ["activate-node", "pull-messages", "pull-messages", "deactivate-node"]
