"""A coordinator and two hospitals as real processes, over TLS with node authentication."""

import json
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import urllib.request
from pathlib import Path

import pytest

from deployed.deployment import CHANGES, assert_same_bits, needs_front, run, wait_for
from deployed.strangers import REFUSED, Caller, number_of, refusals, try_to_enter, write_node_key
from sonofed_client.admission import NOT_KNOWN, refusal
from sonofed_client.enclave.store import open_store
from sonofed_client.enclave.wall import open_ledger
from sonofed_client.settings import read_site
from sonofed_common.contract.results import read_results
from sonofed_server.study.desk import find

ROOT = Path(__file__).parent.parent.parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    needs_front,
]


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
    log = deployment.coordinator.front_log
    before = len(log.read_text().splitlines())
    assert deployment.call(path) == code

    def logged():
        # The hospitals' own calls come meanwhile, and the last line may be half written.
        whole = log.read_text().split("\n")[before:-1]
        return code in [json.loads(line)["status"] for line in whole]

    # The front answers before it logs.
    wait_for(logged, patience=60)


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
        assert found["registration"] == "ok"
        # The coordinator was up only when it knew them.
        assert NOT_KNOWN not in (hospital.run / "supernode.log").read_text()


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


def test_a_key_that_is_not_registered_is_refused(deployment, tmp_path):
    caller = Caller(deployment.coordinator, write_node_key(tmp_path / "node.key"))
    before = len(refusals(deployment.coordinator))
    node, _ = number_of(deployment, deployment.names[0])
    assert {caller.enter(), caller.register(), caller.fetch(node)} <= REFUSED
    said = try_to_enter(deployment.coordinator, tmp_path / "node.key", tmp_path)
    assert NOT_KNOWN in said and "Exit Code" not in said
    assert len(refusals(deployment.coordinator)) >= before + 4


def test_a_signed_request_counts_once(deployment):
    node, key = number_of(deployment, deployment.names[0])
    caller = Caller(deployment.coordinator, key)
    assert caller.beat(node) == 200
    (sent,) = caller.sent
    assert caller.again(sent) == caller.steal(sent, node) == 401
    paths = ["/v1/fleet/send-node-heartbeat", "/v1/fleet/pull-messages"]
    assert refusals(deployment.coordinator)[-2:] == paths
    # Who asks and is told that there is nothing leaves no line: that would be all day long.
    calls = map(json.loads, deployment.coordinator.front_log.read_text().splitlines())
    assert not {call["status"] for call in calls if call["path"] in paths} & {200}
    log = deployment.coordinator.run / "superlink.log"
    assert "a signed request that was met before" in log.read_text()
    assert caller.beat(node) == 200


def test_a_revoked_site_is_cut_off(deployment):
    """Last: the site does not come back."""
    other, name = deployment.names[0], deployment.names[-1]
    hospital = deployment.hospitals[name]
    # A damaged record harms neither its own site nor what is done with others.
    record = deployment.coordinator.sites / f"{other}.json"
    kept = record.read_bytes()
    record.write_bytes(b"{")
    node, staying = (number_of(deployment, site)[0] for site in (name, other))
    run("sonofed-coordinator", "revoke", name, "--project", deployment.project)
    log = deployment.coordinator.run / "conductor.log"
    wait_for(lambda: f"node {node} is unregistered" in log.read_text())
    assert f"{record} is damaged" in log.read_text()
    assert number_of(deployment, other)[0] == staying
    wait_for(refusal(hospital.heartbeat).exists)
    for _ in range(3):
        said = run("sonofed-site", "check", "--folder", hospital.root, code=1)
        assert f"registration: {NOT_KNOWN}" in said
    record.write_bytes(kept)
    file = deployment.write("afterwards")
    said = deployment.study("check", file, "--bundle", deployment.bundle, code=20)
    assert f"not enrolled: {name}" in said
    kept = open_ledger(open_store(read_site(hospital.site)))
    kept.verify()
