"""A hospital's own programs before a coordinator that is none, or whose clock is off."""

import json
import ssl
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from deployed.deployment import free_ports, run
from deployed.strangers import try_to_enter, write_node_key
from sonofed_common.preflight import SKEW_FAILS
from sonofed_server.provisioning.certificates import (
    issue,
    key_pem,
    make_authority,
    new_key,
    read_key,
)
from sonofed_server.provisioning.project import read_coordinator

(PORT,) = free_ports(1)
PROJECT = f"""
name = "trial"
address = "localhost:{PORT}"
sites = ["north"]
contact = "it@example.org"
"""


class Calls(BaseHTTPRequestHandler):
    """Notes each request, and tells a time that is off."""

    def do_GET(self):
        self.server.calls.append(self.path)
        self.send_error(404)

    def do_POST(self):
        self.do_GET()

    def date_time_string(self, timestamp=None):
        return super().date_time_string(time.time() + self.server.ahead)


@contextmanager
def serving(certificate, ahead=0):
    """A server in the place of the coordinator's front, and the calls that come to it."""
    server = ThreadingHTTPServer(("127.0.0.1", PORT), Calls)
    server.calls, server.ahead = [], ahead
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.calls
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory):
    """A coordinator that is not up, with a hospital that is installed."""
    root = tmp_path_factory.mktemp("project")
    (root / "project.toml").write_text(PROJECT)
    (root / "images" / "north").mkdir(parents=True)
    data = ("--data", root / "images")
    run("sonofed-coordinator", "provision", root / "project.toml", "--all", *data)
    return read_coordinator(root / "project.toml")


@pytest.mark.parametrize("wrong", ["another authority", "expired"])
def test_a_hospital_tells_an_imposter_nothing(coordinator, tmp_path, wrong):
    authority, days, leaf = coordinator.authority.read_bytes(), -1, new_key()
    signer = read_key(coordinator.authority_key.read_bytes(), "the authority's key")
    if wrong == "another authority":
        signer, days = new_key(), 10
        authority = make_authority("theirs", signer)
    file = tmp_path / "imposter.pem"
    file.write_bytes(issue(authority, signer, leaf, ("localhost",), days) + key_pem(leaf))
    write_node_key(tmp_path / "node.key")
    with serving(file) as calls:
        said = try_to_enter(coordinator, tmp_path / "node.key", tmp_path)
        found = check(coordinator)
    assert "certificate" in said and calls == []
    assert found["coordinator"]["state"] == "fails"
    assert "certificate" in found["coordinator"]["said"]


@pytest.mark.parametrize("minutes", [-10, 10])
def test_a_clock_that_is_ten_minutes_off_is_told_in_words(coordinator, minutes):
    # A coordinator that is ahead of the hospital is a hospital that is behind.
    with serving(coordinator.front, ahead=60 * minutes):
        found = check(coordinator)
    assert found["coordinator"]["state"] == "ok" and found["clock"]["state"] == "fails"
    words = found["clock"]["said"]
    assert ("behind" if minutes > 0 else "ahead of") in words and "NTP" in words
    seconds = int(words.partition(" seconds")[0].rpartition(" ")[2])
    assert seconds > SKEW_FAILS


def check(coordinator):
    folder = coordinator.root.parent / "sites" / "north"
    said = run("sonofed-site", "check", "--folder", folder, "--json", code=1)
    return {line["subject"]: line for line in map(json.loads, said.splitlines())}
