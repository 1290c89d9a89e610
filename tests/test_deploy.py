"""The files under deploy/, by the programs that read them."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from answering import answering

from deployed.deployment import free_ports, wait_for
from sonofed_common.contract.errors import DeploymentError
from sonofed_common.supervision import probes
from sonofed_common.supervision.program import END_SECONDS, answers
from sonofed_server.provisioning.front import find_nginx, write_front
from sonofed_server.provisioning.keys import make_keys
from sonofed_server.provisioning.programs import endpoints
from sonofed_server.provisioning.project import Coordinator, Project

ROOT = Path(__file__).parent.parent
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
COMPOSE = ROOT / "deploy" / "compose"
FOLDERS = {
    "SONOFED_IMAGES": "/srv/ultrasound",
    "SONOFED_SITE": "/etc/sonofed",
    "SONOFED_RELAY": "/var/lib/sonofed-relay",
    "SONOFED_PROJECT": "/srv/sonofed",
}

needs_nginx = pytest.mark.skipif(
    shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="needs nginx"
)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_takes_the_units(unit, tmp_path):
    # The programs are not installed where the units say; anything else must be right.
    program = re.compile(r"^ExecStart=/opt/sonofed/bin/[\w-]+", re.M)
    text = program.sub("ExecStart=/bin/true", unit.read_text())
    copy = tmp_path / unit.name
    copy.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if unit.name in line]
    assert said == [], said


@needs_nginx
def test_nginx_takes_the_front(tmp_path):
    project = Project(name="trial", address="localhost:18444", sites=("north",), contact="it")
    coordinator = Coordinator(project, tmp_path / "coordinator")
    make_keys(coordinator)
    command = [find_nginx(), "-t", "-e", "stderr", "-p", tmp_path, "-c", write_front(coordinator)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "[warn]" not in done.stderr, done.stderr


@contextmanager
def front_before(coordinator):
    """The front of a coordinator, and a function that calls it."""
    command = [find_nginx(), "-e", "stderr", "-p", coordinator.run, "-c", write_front(coordinator)]
    address = ("localhost", coordinator.project.port)
    context = ssl.create_default_context(cafile=coordinator.authority)

    def call(method, path):
        connection = http.client.HTTPSConnection(*address, timeout=60, context=context)
        connection.request(method, path)
        return connection.getresponse().status

    with subprocess.Popen(command) as nginx:
        try:
            wait_for(lambda: answers(coordinator.project.port))
            yield call
        finally:
            nginx.terminate()


@pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="needs nginx")
def test_the_front_logs_what_happens_and_works_in_a_folder_with_spaces(root):
    ports = free_ports(2)
    front = f"localhost:{ports[0]}"
    project = Project(name="trial", address=front, sites=("north",), contact="it")
    coordinator = Coordinator(project, root / 'a "good" folder')
    make_keys(coordinator)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(coordinator.superlink_certificate, coordinator.superlink_key)
    pull, beat, push = (
        f"/v1/fleet/{name}" for name in ("pull-messages", "send-node-heartbeat", "push-object")
    )
    with answering(200, b"", context) as superlink:
        values = {**project.model_dump(), "superlink_port": superlink, "health_port": ports[1]}
        coordinator = Coordinator(Project.model_validate(values), coordinator.root)
        with front_before(coordinator) as call:
            assert call("GET", "/v1/fleet") == 404
            assert [call("POST", path) for path in (pull, beat, push)] == [200] * 3
    with front_before(coordinator) as call:
        assert call("POST", pull) == 502
    logged = map(json.loads, coordinator.front_log.read_text().splitlines())
    assert [(call["path"], call["status"]) for call in logged] == [
        ("/v1/fleet", 404),
        (push, 200),
        (pull, 502),
    ]


@needs_nginx
def test_a_front_counts_where_it_listens_if_it_answers_with_its_own_certificate(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(probes, "ANSWER_SECONDS", 1.0)
    (port,) = free_ports(1)
    project = Project(
        name="trial",
        address=f"localhost:{port}",
        sites=("north",),
        contact="it",
        listen="127.0.0.2",
    )
    coordinator = Coordinator(project, tmp_path / "coordinator")
    make_keys(coordinator)
    _, front = endpoints(coordinator)
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.2", port))
        stranger.listen()
        assert not front.works()
        with pytest.raises(DeploymentError, match=f"port {port}"):
            front.require_free()
    front.require_free()
    command = [find_nginx(), "-e", "stderr", "-p", tmp_path, "-c", write_front(coordinator)]
    nginx = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        wait_for(front.works, patience=60)
        other = Coordinator(project, tmp_path / "other")
        make_keys(other)
        assert not endpoints(other)[1].works()
        os.killpg(nginx.pid, signal.SIGSTOP)
        assert not front.works()
        os.killpg(nginx.pid, signal.SIGCONT)
        wait_for(front.works, patience=60)
        assert coordinator.front_log.read_text() == ""
    finally:
        os.killpg(nginx.pid, signal.SIGKILL)
        nginx.wait()


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="needs docker-compose")
@pytest.mark.parametrize(
    "names", [["hospital"], ["hospital", "hospital-gpu"], ["coordinator"]], ids="+".join
)
def test_compose_takes_its_files(names):
    files = [word for name in names for word in ("-f", COMPOSE / f"{name}.yaml")]
    command = ["docker-compose", *files, "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **FOLDERS})
    assert done.returncode == 0 and not done.stderr, done.stderr


def mounts(service):
    """What a service sees of the machine: where it is there, and whether it may write."""
    form = re.compile(r"(?:\$\{)?(\w+)(?:[^}]*\})?:/[^:]+(?::(ro))?")
    found = (form.fullmatch(volume).groups() for volume in service["volumes"])
    return {source: mode or "rw" for source, mode in found}


def test_the_enclave_of_a_composition_has_no_network_and_the_relay_no_images():
    services = yaml.safe_load((COMPOSE / "hospital.yaml").read_text())["services"]
    enclave, relay = services["enclave"], services["relay"]
    assert enclave["network_mode"] == "none" and "network_mode" not in relay
    assert mounts(enclave) == {
        "SONOFED_IMAGES": "ro",
        "SONOFED_SITE": "ro",
        "store": "rw",
        "socket": "rw",
    }
    assert mounts(relay) == {"SONOFED_RELAY": "rw", "socket": "ro"}
    # The socket's group is all that the two accounts share.
    (account, group), own = enclave["user"].split(":"), relay["user"].split(":")
    assert account not in own and group not in own and relay["group_add"] == [group]
    for service in services.values():
        assert service["cap_drop"] == ["ALL"] and service["read_only"]
        assert service["security_opt"] == ["no-new-privileges:true"] and "privileged" not in service
    recipe = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    for number, name in ((account, "sonofed-enclave"), (own[0], "sonofed-user")):
        assert re.search(rf"useradd --uid {number} .* {name}\b", recipe)
    assert f"groupadd --gid {group} sonofed-relay" in recipe


def test_whoever_ends_a_supervisor_waits_for_all_its_programs():
    longest = {"coordinator": 4 * END_SECONDS, "relay": END_SECONDS}
    for file, service in (("coordinator", "coordinator"), ("hospital", "relay")):
        text = (COMPOSE / f"{file}.yaml").read_text()
        grace = yaml.safe_load(text)["services"][service]["stop_grace_period"]
        assert float(grace.removesuffix("s")) > longest[service]
        unit = (ROOT / "deploy" / "systemd" / f"sonofed-{service}.service").read_text()
        (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.M)
        assert float(seconds) > longest[service]


def test_the_recipe_installs_what_is_there():
    recipe = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (?!--from)(.+)$", recipe, re.M):
        assert all((ROOT / name).exists() for name in line.split()[:-1]), line
    extras = (ROOT / "pyproject.toml").read_text()
    for side in re.findall(r"SIDE=(\w+) ", recipe):
        assert re.search(rf"^{side} = \[", extras, re.M), side
    assert re.findall(r"^USER (.+)$", recipe, re.M) == ["sonofed-user"]
