import ssl
import threading
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sonofed_common.preflight import certificate, clock, front, machine, verdict
from sonofed_server.provisioning.certificates import issue, key_pem, make_authority, new_key


@pytest.fixture
def server(tmp_path):
    """Starts a server over TLS with a certificate and its key."""
    with ExitStack() as stack:

        def start(pem, key):
            file = tmp_path / "server.pem"
            file.write_bytes(pem + key_pem(key))
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(file)
            server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
            server.socket = context.wrap_socket(server.socket, server_side=True)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            return server.server_address[1]

        yield start


@pytest.mark.parametrize(
    ("skew", "state"),
    [(0, "ok"), (-59, "ok"), (61, "warning"), (-299, "warning"), (300, "fails"), (-600, "fails")],
)
def test_a_clock_that_is_off_is_told_in_words(skew, state):
    finding = clock(1_000_000, 1_000_000 + skew)
    assert finding.state == state
    if skew:
        assert f"{abs(skew)} seconds {'ahead of' if skew > 0 else 'behind'}" in finding.said
    if state == "fails":
        assert "NTP" in finding.said and verdict([finding]) == 1
    else:
        assert verdict([finding]) == 0


def test_a_clock_that_is_not_told_is_a_warning():
    assert clock(None, 0.0).state == "warning"


def test_the_machine_is_described(tmp_path):
    assert [f.subject for f in machine(tmp_path)] == ["disk", "memory", "GPU"]


def test_an_address_that_does_not_answer_is_told(tmp_path):
    authority = tmp_path / "ca.pem"
    key = new_key()
    authority.write_bytes(make_authority("trial", key))
    (finding,) = front("127.0.0.1:1", authority)
    assert finding.state == "fails" and "does not answer" in finding.said
    (finding,) = front("no.such.name.invalid:443", authority)
    assert finding.state == "fails"


def test_a_server_of_the_authority_is_well_and_tells_its_time(tmp_path, server):
    key, leaf = new_key(), new_key()
    (tmp_path / "ca.pem").write_bytes(make_authority("ours", key))
    pem = issue((tmp_path / "ca.pem").read_bytes(), key, leaf, ("localhost",))
    port = server(pem, leaf)
    reached, time = front(f"localhost:{port}", tmp_path / "ca.pem")
    assert (reached.state, time.state) == ("ok", "ok")
    late = front(f"localhost:{port}", tmp_path / "ca.pem", lambda: 0.0)
    assert [f.state for f in late] == ["ok", "fails"]


@pytest.mark.parametrize(("days", "state"), [(40, "ok"), (10, "warning"), (-2, "fails")])
def test_expiry_is_told_in_time(tmp_path, days, state):
    key = new_key()
    pem = issue(make_authority("ours", key), key, new_key(), ("localhost",), days)
    (tmp_path / "front.pem").write_bytes(pem)
    finding = certificate("front", tmp_path / "front.pem", "renew it")
    assert finding.state == state and ("renew it" in finding.said) == (state != "ok")


def test_a_certificate_that_is_damaged_or_gone_is_a_finding(tmp_path):
    file = tmp_path / "front.pem"
    for _ in range(2):
        finding = certificate("front", file, "renew it")
        assert finding.state == "fails" and "renew it" in finding.said and str(file) in finding.said
        (finding,) = front("localhost:1", file)
        assert finding.state == "fails" and str(file) in finding.said
        file.write_text("no certificate")


@pytest.mark.parametrize("wrong", ["authority", "name", "expired"])
def test_a_wrong_certificate_is_told_in_words(tmp_path, server, wrong):
    key, other, leaf = new_key(), new_key(), new_key()
    ours = make_authority("ours", key)
    theirs, signer = ours, key
    if wrong == "authority":
        theirs, signer = make_authority("theirs", other), other
    host = "elsewhere.example" if wrong == "name" else "localhost"
    days = -1 if wrong == "expired" else 10
    port = server(issue(theirs, signer, leaf, (host,), days), leaf)
    (tmp_path / "ca.pem").write_bytes(ours)
    (finding,) = front(f"localhost:{port}", tmp_path / "ca.pem")
    assert finding.state == "fails" and "certificate" in finding.said
