"""A coordinator and two hospitals as real processes, over TLS with node authentication."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
import tomli_w

from sonofed_client.enclave.store import open_store
from sonofed_client.enclave.wall import open_ledger
from sonofed_client.provisioning.place import Hospital
from sonofed_client.settings import read_site
from sonofed_common.contract.records import from_bytes
from sonofed_common.contract.results import read_results
from sonofed_common.contract.study import Study
from sonofed_common.runtime import Events
from sonofed_common.supervision.supervisor import read_status
from sonofed_server.provisioning.project import read_coordinator
from sonofed_server.study.desk import find
from sonofed_simulations.engines.inline import run_inline

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(
        shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None,
        reason="needs nginx, the front",
    ),
]

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
PATIENCE = 1500
CHANGES = {
    "phases": ["enrol", "ship", "select", "annotate", "classifier", "publish"],
    "selection": {"strategy": "random", "budgets": [0.5]},
    "finetuning": {"rounds": 4},
}
"""The tiny study with few questions, each of which starts a process at each hospital."""


def tiny(laboratory, name="tiny"):
    values = laboratory.scenario.study.model_dump(mode="json", exclude_none=True)
    for key, value in CHANGES.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return Study.model_validate({**values, "name": name})


def run(program, *words, code=0):
    command = [BIN / program, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def free_ports(number):
    probes = [socket.socket() for _ in range(number)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def wait_for(condition):
    until = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.1)
    return found


class Deployment:
    """A coordinator and hospitals that are up, with the laboratory's images and bundle."""

    def __init__(self, laboratory, root):
        self.laboratory = laboratory
        self.project = root / "project.toml"
        front, superlink, health, *ports = free_ports(3 + len(self.names))
        values = {
            "name": "trial",
            "address": f"localhost:{front}",
            "sites": self.names,
            "contact": "it@example.org",
            "listen": "127.0.0.1",
            "superlink_port": superlink,
            "health_port": health,
        }
        self.project.write_text(tomli_w.dumps(values))
        run("sonofed-coordinator", "init", self.project)
        # The coordinator that signed the laboratory's bundle.
        shutil.copyfile(laboratory.key, root / "coordinator" / "coordinator.pem")
        images = root / "images"
        for name in self.names:
            (images / name).mkdir(parents=True)
        run("sonofed-coordinator", "provision", self.project, "--all", "--data", images)
        self.hospitals = {name: Hospital(root / "sites" / name) for name in self.names}
        for hospital in self.hospitals.values():
            self._settle(hospital, ports.pop())
        self.coordinator = read_coordinator(self.project)

    @property
    def names(self):
        return list(self.laboratory.scenario.hospitals)

    def _settle(self, hospital, health):
        """The hospital's own settings: its images, and ids as in the laboratory."""
        kept = read_site(hospital.site)
        settings, _ = self.laboratory.site(kept.name, 0)
        own = ("store", "coordinator_key", "policy", "master_key", "socket")
        settings = settings.model_copy(update={name: getattr(kept, name) for name in own})
        values = settings.model_dump(mode="json", exclude_none=True)
        hospital.site.write_text(tomli_w.dumps(values))
        hospital.relay.write_text(f"health_port = {health}\n")

    def up(self):
        run("sonofed-coordinator", "up", "--detach", "--project", self.project)
        for hospital in self.hospitals.values():
            run("sonofed-site", "up", "--detach", "--folder", hospital.root)

    def down(self):
        for hospital in self.hospitals.values():
            run("sonofed-site", "down", "--folder", hospital.root)
        run("sonofed-coordinator", "down", "--project", self.project)

    def study(self, *words, code=0):
        return run("sonofed-coordinator", "study", *words, "--project", self.project, code=code)

    def write(self, name):
        values = tiny(self.laboratory, name).model_dump(mode="json", exclude_none=True)
        file = self.project.with_name(f"{name}.toml")
        file.write_text(tomli_w.dumps(values))
        return file

    @property
    def bundle(self):
        return self.laboratory.root / "source"

    def outcome(self, name):
        """All weights and sums of a study, and which images each site selected."""
        workspace = find(self.coordinator, name).workspace
        sites = [hospital.site for hospital in self.hospitals.values()]
        return outcome(workspace, sites, name)

    def call(self, path, data=b""):
        """Post to the front as a stranger would."""
        context = ssl.create_default_context(cafile=self.coordinator.authority)
        address = f"https://{self.coordinator.project.address}{path}"
        try:
            with urllib.request.urlopen(address, data, context=context) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code


def outcome(workspace, sites, name):
    arrays = from_bytes(workspace.checkpoint.read_bytes()).arrays
    chosen = [open_store(read_site(s)).get(f"study/{name}/selected").config["ids"] for s in sites]
    return arrays, chosen


def assert_same_bits(one, other):
    (arrays, chosen), (others, chosen_there) = one, other
    assert chosen == chosen_there
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        assert array.tobytes() == others[name].tobytes(), name


@pytest.fixture(scope="module")
def undisturbed(laboratory, tmp_path_factory):
    """The same study in one process."""
    root = tmp_path_factory.mktemp("undisturbed")
    sites = laboratory.prepare_sites(0, root / "sites")
    study = tiny(laboratory)
    workspace = laboratory.workspace(study, laboratory.root / "source", root / "study")
    run_inline(workspace, sites, Events())
    return outcome(workspace, sites, study.name)


@pytest.fixture(scope="module")
def deployment(laboratory):
    # A short path: that of a socket may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="sonofed-", dir="/tmp") as folder:
        deployment = Deployment(laboratory, Path(folder))
        try:
            deployment.up()
            yield deployment
        finally:
            deployment.down()


def test_a_study_gives_the_same_bits_as_in_one_process(deployment, undisturbed):
    file = deployment.write("tiny")
    said = deployment.study("check", file, "--bundle", deployment.bundle)
    assert "all enrolled" in said and "signed by this coordinator" in said
    said = deployment.study("run", file, "--bundle", deployment.bundle, "--follow")
    assert re.search(r"^study tiny: completed$", said, re.M), said
    assert_same_bits(deployment.outcome("tiny"), undisturbed)
    results = read_results(find(deployment.coordinator, "tiny").workspace.results)
    assert results.engine == "deployment" and results.missing_sites == ()
    said = deployment.study("report", "tiny")
    assert all(name in said for name in deployment.names) and "auroc" in said
    now = json.loads(deployment.study("status", "tiny", "--json"))
    assert now["state"] == "completed" and now["phases_done"] == now["phases"]
    assert now["bytes_from_sites"] > 0 and set(now["sites"]) == set(deployment.names)
    assert re.search(r"^completed +tiny$", deployment.study("list"), re.M)
    for hospital in deployment.hospitals.values():
        open_ledger(open_store(read_site(hospital.site))).verify()
        assert "without a network" in (hospital.run / "enclave.log").read_text()


def lines(run, name):
    return [json.loads(line) for line in (run / f"{name}.log").read_text().splitlines()]


def test_every_process_logs_json_that_names_study_round_and_site(deployment):
    """After the study: its whole course stands in logs that a machine can filter."""
    coordinator = deployment.coordinator.run
    for name in ("supervisor", "superlink", "conductor", "serverapp"):
        each = lines(coordinator, name)
        assert each and all(line.keys() >= {"time", "level", "event"} for line in each), name
        assert {line["process"] for line in each} == {name}
    (began,) = [x for x in lines(coordinator, "conductor") if x["event"] == "the study began"]
    assert began["study"] == "tiny"
    course = lines(coordinator, "serverapp")
    assert [x["event"] for x in course if "study" in x][-1] == "study-completed"
    assert {x["study"] for x in course if "phase" in x} == {"tiny"}
    rounds = set(range(CHANGES["finetuning"]["rounds"]))
    assert {x["round"] for x in course if x.get("phase") == "classifier" and "round" in x} == rounds
    for site, hospital in deployment.hospitals.items():
        for name in ("supervisor", "enclave", "supernode"):
            each = lines(hospital.run, name)
            assert each and all(line.keys() >= {"time", "level", "event"} for line in each), name
            assert {(line["process"], line["site"]) for line in each} == {(name, site)}
        for name, event in (("supernode", "answered"), ("enclave", "job done")):
            trained = [
                (line["study"], line["round"])
                for line in lines(hospital.run, name)
                if line["event"] == event and line.get("action") == "train.classifier"
            ]
            assert sorted(trained) == [("tiny", number) for number in sorted(rounds)], name


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
def test_a_log_is_filtered_by_study_and_round_as_the_page_says(deployment):
    (command,) = re.findall(r"^jq .+", (ROOT / "docs" / "deploy.md").read_text(), re.M)
    hospital = next(iter(deployment.hospitals.values()))
    words = shlex.split(command.replace("site/run", str(hospital.run)))
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    found = [json.loads(line) for line in said.splitlines()]
    assert {(line["study"], line["round"]) for line in found} == {("tiny", 1)}
    assert {line["process"] for line in found} == {"enclave", "supernode"}


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/", 404),
        ("/docs", 404),
        ("/health", 404),
        ("/v1/control/list-runs", 404),
        ("/v1/runtime/get-nodes", 404),
        ("/v1/fleet/../control/list-runs", 404),
        ("/v1/fleet/%2e%2e/control/list-runs", 404),
        ("/v1/fleet/..%2fcontrol/list-runs", 404),
        ("/v1/control/../fleet/../control/list-runs", 404),
        ("//v1//control/list-runs", 404),
    ],
)
def test_a_stranger_meets_nothing_but_the_hospitals_path(deployment, path, code):
    assert deployment.call(path) == code
    log = (deployment.coordinator.run / "front-access.log").read_text().splitlines()
    assert json.loads(log[-1])["status"] == code


def test_the_front_speaks_modern_tls_and_bounds_requests(deployment):
    host, port = deployment.coordinator.project.host, deployment.coordinator.project.port
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(deployment.coordinator.authority)
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with socket.create_connection((host, port)) as plain, pytest.raises(ssl.SSLError):
        old.wrap_socket(plain, server_hostname=host)
    most = deployment.coordinator.project.body_megabytes * 2**20
    with socket.create_connection((host, port)) as plain:
        context = ssl.create_default_context(cafile=deployment.coordinator.authority)
        with context.wrap_socket(plain, server_hostname=host) as secure:
            head = (
                f"POST /v1/fleet/x HTTP/1.1\r\nHost: {host}\r\nContent-Length: {most + 1}\r\n\r\n"
            )
            secure.sendall(head.encode())
            assert b" 413 " in secure.recv(1000).splitlines()[0]


def test_a_renewed_certificate_is_shown_at_once(deployment):
    address = (deployment.coordinator.project.host, deployment.coordinator.project.port)
    before = ssl.get_server_certificate(address)
    run("sonofed-coordinator", "renew", "--project", deployment.project)
    wait_for(lambda: ssl.get_server_certificate(address) != before)
    assert deployment.call("/") == 404


def test_the_superlink_is_on_the_loopback_alone(deployment):
    port = deployment.coordinator.project.superlink_port
    wanted = f":{port:04X}"
    lines = [
        line.split()
        for file in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(file).read_text().splitlines()[1:]
    ]
    listening = {local for _, local, _, state, *_ in lines if state == "0A"}
    assert {address for address in listening if address.endswith(wanted)} == {f"0100007F{wanted}"}


def test_what_cannot_run_is_told_before(deployment, tmp_path):
    file = deployment.write("other")
    text = file.read_text().replace(f'"{deployment.names[0]}"', '"nowhere"')
    file.write_text(text)
    said = deployment.study("check", file, "--bundle", deployment.bundle, code=20)
    assert "not enrolled: nowhere" in said
    assert "[bundle]" in deployment.study(
        "check", deployment.write("b"), "--bundle", tmp_path, code=30
    )
    assert "no study" in deployment.study("status", "nothing", code=20)
    assert "no study" in deployment.study("report", "nothing", code=20)


def test_preflight_finds_a_deployment_that_is_up_well(deployment):
    said = run("sonofed-coordinator", "check", "--project", deployment.project)
    assert not [line for line in said.splitlines() if not line.startswith("ok ")], said
    for hospital in deployment.hospitals.values():
        lines = run("sonofed-site", "check", "--folder", hospital.root, "--json").splitlines()
        found = {line["subject"]: line["state"] for line in map(json.loads, lines)}
        assert {state for subject, state in found.items() if subject not in ("disk", "memory")} == {
            "ok"
        }
        assert found.keys() >= {"kit", "coordinator", "clock", "enclave", "supernode", "images"}


def test_the_supervisors_tell_their_health(deployment):
    ports = [deployment.coordinator.project.health_port]
    ports += [hospital.relay_settings.health_port for hospital in deployment.hospitals.values()]
    told = []
    for port in ports:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz") as answer:
            assert json.load(answer)["healthy"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
            told.append(answer.read().decode())
    assert 'sonofed_study_state{state="completed",study="tiny"} 1.0' in told[0]
    for text in told[1:]:
        left = re.findall(
            r'^sonofed_ledger_entries_total{action="train.classifier",outcome="sent"} (.+)$',
            text,
            re.M,
        )
        assert float(left[0]) >= 1 and 'sonofed_sent_bytes_total{study="tiny"}' in text
    run("sonofed-coordinator", "status", "--project", deployment.project)
    for hospital in deployment.hospitals.values():
        run("sonofed-site", "status", "--folder", hospital.root)


def count_restarts(deployment, hospital):
    """How often each program was started again, at the coordinator and at a hospital."""
    there, here = (read_status(d.run).programs for d in (deployment.coordinator, hospital))
    names = [(there, n) for n in ("superlink", "front", "conductor")]
    names += [(here, n) for n in ("enclave", "supernode")]
    return {name: programs[name].restarts for programs, name in names}


@pytest.mark.faults
@pytest.mark.parametrize("turn", range(7))
def test_a_study_survives_the_death_of_every_process(deployment, undisturbed, turn):
    """Seven studies of six deaths: in each, every process dies at another place of the study."""
    dice, study = random.Random(turn), f"killed-{turn}"
    file = deployment.write(study)
    deployment.study("run", file, "--bundle", deployment.bundle)
    entry = find(deployment.coordinator, study)
    hospital = deployment.hospitals[deployment.names[turn % len(deployment.names)]]

    def of(folder, name):
        return lambda: read_status(folder).programs[name].identity

    coordinator = deployment.coordinator.run
    victims = {
        "ServerApp": lambda: entry.process,
        "SuperLink": of(coordinator, "superlink"),
        "front": of(coordinator, "front"),
        "conductor": of(coordinator, "conductor"),
        "enclave": of(hospital.run, "enclave"),
        "SuperNode": of(hospital.run, "supernode"),
    }
    restarts = count_restarts(deployment, hospital)
    order = list(victims.items())
    for name, victim in order[turn % len(order) :] + order[: turn % len(order)]:
        # Each dies in work that follows what was saved since the one before died.
        saved = entry.checkpoint
        wait_for(lambda saved=saved: entry.state == "completed" or entry.checkpoint > saved)
        assert entry.state != "completed", f"it ended before {name} died"
        time.sleep(dice.uniform(0, 2))
        identity = wait_for(lambda victim=victim: (found := victim()) and found.alive and found)
        os.kill(identity.pid, signal.SIGKILL)
        wait_for(lambda identity=identity: not identity.alive)
    deployment.study("stop", study)
    assert entry.state == "stopped"
    deployment.study("resume", study, "--follow")
    now = deployment.study("status", study)
    assert entry.state == "completed", now
    assert read_results(entry.workspace.results).missing_sites == ()
    assert_same_bits(deployment.outcome(study), undisturbed)
    died = count_restarts(deployment, hospital)
    assert all(died[program] > restarts[program] for program in restarts)
    for one in deployment.hospitals.values():
        open_ledger(open_store(read_site(one.site))).verify()


def test_a_revoked_site_is_cut_off(deployment):
    """Last: the site does not come back."""
    name = deployment.names[-1]
    hospital = deployment.hospitals[name]
    run("sonofed-coordinator", "revoke", name, "--project", deployment.project)
    log = deployment.coordinator.run / "front-access.log"

    def refused():
        lines = map(json.loads, log.read_text().splitlines())
        return any(line["status"] in (401, 403) for line in lines)

    wait_for(refused)
    file = deployment.write("afterwards")
    said = deployment.study("check", file, "--bundle", deployment.bundle, code=20)
    assert f"not enrolled: {name}" in said
    kept = open_ledger(open_store(read_site(hospital.site)))
    kept.verify()
