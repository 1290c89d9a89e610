"""Who calls a coordinator's front without a right to, and what the front and the SuperLink log."""

import json
import os
import ssl
import subprocess
import sys

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from sonofed_client.provisioning.request import read_node_key
from sonofed_common.contract.enrolment import node_public_text

HEARTBEAT_SECONDS = 30.0
REFUSED = {401, 403, 412}
"""Not signed by the node, not allowed, and not registered."""

SUPERNODE_SECONDS = 120


class Caller:
    """Signs calls of a hospital with a node's key, and keeps each as it went."""

    def __init__(self, coordinator, key):
        self.key, self.address = key, coordinator.project.address
        self.context = ssl.create_default_context(cafile=coordinator.authority)
        self.sent = []
        auth = NodeAuthHttpInterceptor(key, key.public_key())
        version = RuntimeVersionHttpInterceptor(component_name="SuperNode")
        authority = str(coordinator.authority)
        self._client = FleetHttpClient.from_server_address(
            self.address, False, authority, [version, auth, self]
        )

    def intercept(self, context, call_next):
        self.sent.append(context.request)
        return call_next(context)

    @property
    def public(self):
        return public_key_to_bytes(self.key.public_key())

    def enter(self):
        """Ask to be let in, and return the answer's code."""
        request = ActivateNodeRequest(public_key=self.public, heartbeat_interval=HEARTBEAT_SECONDS)
        return self._code(self._client.ActivateNode, request)

    def register(self):
        """Ask to be registered, and return the answer's code."""
        return self._code(
            self._client.RegisterNode, RegisterNodeFleetRequest(public_key=self.public)
        )

    def beat(self, node):
        """Say that a node is there, and return the answer's code."""
        request = SendNodeHeartbeatRequest(
            node=Node(node_id=node), heartbeat_interval=HEARTBEAT_SECONDS
        )
        return self._code(self._client.SendNodeHeartbeat, request)

    def fetch(self, node):
        """Ask for the messages of a node, and return the answer's code."""
        return self._code(self._client.PullMessages, messages_of(node))

    def again(self, request):
        """Send what was sent before."""
        return self._post(request.url, request.content, request.headers)

    def steal(self, request, node):
        """Ask for the messages of a node, signed as what was sent before."""
        url = request.url.copy_with(path="/v1/fleet/pull-messages")
        return self._post(url, messages_of(node).SerializeToString(), request.headers)

    def _post(self, url, content, headers):
        headers = {k: v for k, v in headers.items() if k != "content-length"}
        with httpx.Client(verify=self.context) as client:
            return client.post(url, content=content, headers=headers).status_code

    def _code(self, call, request):
        try:
            call(request)
        except httpx.HTTPStatusError as error:
            return error.response.status_code
        return 200


def messages_of(node):
    return PullMessagesRequest(node=Node(node_id=node))


def number_of(deployment, name):
    """Flower's number of a hospital's node, and its key."""
    key = read_node_key(deployment.hospitals[name])
    known = json.loads((deployment.coordinator.flower / "nodes.json").read_bytes())
    return int(known[node_public_text(key.public_key())]), key


def refusals(coordinator):
    """Paths that the front refused a hospital's call to."""
    lines = map(json.loads, (coordinator.front_log).read_text().splitlines())
    return [line["path"] for line in lines if line["status"] in REFUSED]


def write_node_key(path, key=None):
    """Write a new node key, or one that is given, as a SuperNode reads it."""
    key = key or ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.chmod(0o600)
    return key


def try_to_enter(coordinator, key, folder):
    """Start a SuperNode that cannot get in, and return what it said until its end."""
    command = [
        *(sys.executable, "-m", "sonofed_client.supernode", "--superlink"),
        *(coordinator.project.address, "--root-certificates", str(coordinator.authority)),
        *("--auth-supernode-private-key", str(key)),
    ]
    done = subprocess.run(
        command,
        env={**os.environ, "FLWR_HOME": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SUPERNODE_SECONDS,
    )
    assert done.returncode != 0, done.stdout
    return done.stdout
