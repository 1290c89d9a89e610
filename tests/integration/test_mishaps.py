"""What is missing, damaged or mistyped is told in a sentence, and harms nothing else."""

import json
import os
import pwd
import socket
import ssl
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from answering import answering
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supernode import fleet_http_connection
from flwr.supernode.fleet_http_connection import http_request_response
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from two_programs import coordinator, enrol, run, site, write_project

from deployed.deployment import free_ports
from sonofed_client.admission import NOT_KNOWN, explain_refusal, refusal
from sonofed_client.commands import deployment
from sonofed_client.provisioning.kit import read_kit
from sonofed_client.provisioning.place import Hospital
from sonofed_common.contract.errors import EnrolmentError
from sonofed_common.runtime import Events, write_atomically
from sonofed_common.supervision.control import START_SECONDS
from sonofed_common.supervision.family import MARK, Identity
from sonofed_common.supervision.program import ProgramStatus, mark
from sonofed_common.supervision.supervisor import Status, state_file
from sonofed_server.provisioning.certificates import key_pem, new_key
from sonofed_server.provisioning.front import write_front
from sonofed_server.provisioning.project import Coordinator, Project
from sonofed_server.study.workspace import Workspace


def test_a_signing_key_that_is_missing_is_never_made_anew(project):
    run(coordinator, "init project.toml")
    enrol()
    key = Path("coordinator/coordinator.pem")
    kept = key.read_bytes()
    key.unlink()
    words = run(site, "init south --folder south").split("phone: ")[1].strip()
    for command, code in (
        ("check", 1),
        (f"enrol south/request.json --words '{words}'", 20),
        ("provision project.toml --all --data images", 20),
    ):
        assert "restore it from its backup" in run(coordinator, command, code)
        assert not key.exists()
    assert not Path("coordinator/sites/south.json").exists()
    key.write_bytes(kept)
    run(coordinator, f"enrol south/request.json --words '{words}'")


@pytest.mark.parametrize("wrong", ["damaged", "of another authority"])
def test_nothing_is_signed_by_an_authority_that_is_none(project, wrong):
    run(coordinator, "init project.toml")
    file = Path("coordinator/ca.pem" if wrong == "damaged" else "coordinator/ca.key")
    kept, front = file.read_bytes(), Path("coordinator/front.pem").read_bytes()
    file.write_bytes(b"damaged" if wrong == "damaged" else key_pem(new_key()))
    words = run(site, "init north --folder north").split("phone: ")[1].strip()
    enrolling = f"enrol north/request.json --words '{words}'"
    for command, code in (("renew", 20), (enrolling, 20), ("check", 1)):
        said = run(coordinator, command, code)
        assert str(file) in said and "from" in said and "backup" in said
    assert Path("coordinator/front.pem").read_bytes() == front
    assert not Path("coordinator/sites/north.json").exists()
    assert not Path("coordinator/kits").exists()
    file.write_bytes(kept)
    run(coordinator, enrolling)
    # It may be kept elsewhere.
    Path("coordinator/ca.key").unlink()
    assert "run this where it is kept" in run(coordinator, "renew", 20)
    run(coordinator, enrolling)
    assert "ok       authority's key: is kept elsewhere" in run(coordinator, "check", 1)


@pytest.mark.parametrize("name", ["superlink.pem", "superlink.key"])
def test_a_check_names_what_the_superlink_lacks(project, name):
    run(coordinator, "init project.toml")
    Path("coordinator", name).unlink()
    said = run(coordinator, "check", 1)
    assert f"coordinator/{name}" in said and "restore it from its backup" in said


def test_a_damaged_record_is_named_and_harms_no_other_site(project):
    run(coordinator, "init project.toml")
    enrol()
    enrol("south", "south")
    record = Path("coordinator/sites/north.json")
    kept = record.read_bytes()
    record.write_text("{")
    found = {
        line["subject"]: line
        for line in map(json.loads, run(coordinator, "check --json", 1).splitlines())
    }
    assert found["site north"]["state"] == "fails" and found["site south"]["state"] == "ok"
    assert "north.json is damaged" in found["site north"]["said"]
    run(coordinator, "revoke south")
    assert "north.json is damaged" in run(coordinator, "revoke north", 20)
    assert record.read_text() == "{"
    record.write_bytes(kept)
    run(coordinator, "revoke north")


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """A startup kit, and a file to put a damaged one in."""
    root = tmp_path_factory.mktemp("kit")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        write_project(root)
        run(coordinator, "init project.toml")
        enrol()
    return (root / "coordinator" / "kits" / "north.zip").read_bytes(), root / "damaged.zip"


@given(st.data())
def test_whatever_is_damaged_in_a_kit_is_told(packed, data):
    whole, file = packed
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(damaged)
    try:
        _, files = read_kit(file)
    except EnrolmentError:
        return
    file.write_bytes(whole)
    assert files == read_kit(file)[1]


@pytest.mark.parametrize("at", range(6, 12))
def test_a_zip_of_another_making_is_no_kit(packed, at):
    """Flags, compression and times of its first entry, in both places: encrypted, bzip2, LZMA."""
    whole, file = packed
    for value in (1, 8, 12, 14, 64, 255):
        damaged = bytearray(whole)
        for start, offset in ((whole.index(b"PK\3\4"), 0), (whole.index(b"PK\1\2"), 2)):
            damaged[start + at + offset] = value
        file.write_bytes(damaged)
        try:
            read_kit(file)
        except EnrolmentError as error:
            assert "no startup kit" in error.message


@pytest.mark.parametrize(
    "change",
    [
        {"name": ".."},
        {"address": "localhost:0"},
        {"address": "localhost:65536"},
        {"address": "-.:8443"},
        {"address": "a..b:8443"},
        {"listen": "nonsense; }"},
        {"listen": ""},
        {"superlink_port": 8001},
        {"superlink_port": 8443},
        {"health_port": 8443},
    ],
    ids=str,
)
def test_a_project_that_cannot_work_is_refused(change):
    values = {"name": "trial", "address": "fed.example.org:8443", "sites": ["n"], "contact": "it"}
    Project.model_validate(values)
    with pytest.raises(ValidationError):
        Project.model_validate({**values, **change})


@pytest.mark.parametrize("given_as", ["::1", "[::1]"])
def test_the_front_listens_on_an_address_of_either_family(given_as, tmp_path):
    project = Project(name="trial", address="h:8443", sites=("n",), contact="it", listen=given_as)
    text = write_front(Coordinator(project, tmp_path)).read_text()
    assert project.listen == "::1" and "listen [::1]:8443 ssl;" in text


def test_options_of_install_are_checked_and_never_ignored(project):
    run(coordinator, "init project.toml")
    install = enrol()
    assert "no reader is called 'tabel'" in run(site, f"{install} --kind tabel", 20)
    assert "no folder" in run(site, install.replace("--data images", "--data imagse"), 10)
    assert not Path("north/site.toml").exists() and not Path("north/kit").exists()
    run(site, f"{install} --health-port 9300")
    before = Path("north/site.toml").read_bytes(), Path("north/relay.toml").read_bytes()
    Path("others").mkdir()
    for words, file in (
        (install.replace("--data images", "--data others"), "site.toml"),
        (f"{install} --kind busi", "site.toml"),
        (f"{install} --simulated", "site.toml"),
        (f"{install} --health-port 9301", "relay.toml"),
    ):
        said = run(site, words, 20)
        assert file in said and "edit it there" in said
    # What is said again is no contradiction.
    run(site, f"{install} --kind table --health-port 9300")
    run(site, "install coordinator/kits/north.zip --folder north")
    assert before == (Path("north/site.toml").read_bytes(), Path("north/relay.toml").read_bytes())


def test_a_kit_is_installed_over_a_damaged_one(project):
    run(coordinator, "init project.toml")
    install = enrol()
    run(site, install)
    kit = Path("north/kit/kit.json")
    kept = kit.read_bytes()
    kit.write_text("{")
    assert "--words" in run(site, install.split(" --words")[0], 90)
    run(site, install)
    assert kit.read_bytes() == kept


def test_the_superuser_leaves_no_file_that_the_processes_cannot_read(project, monkeypatch):
    run(coordinator, "init project.toml")
    before = Path("coordinator/front.pem").read_bytes()
    if os.geteuid() == 0:
        os.chown("coordinator", 65534, 65534)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    owner = pwd.getpwuid(Path("coordinator").stat().st_uid).pw_name
    assert f"runuser -u {owner} --" in run(coordinator, "renew", 91)
    assert Path("coordinator/front.pem").read_bytes() == before


def test_a_check_says_all_whatever_file_is_damaged(project):
    run(coordinator, "init project.toml")
    run(site, enrol())
    for file, program, words in (
        ("coordinator/front.pem", coordinator, "check --json"),
        ("north/kit/ca.pem", site, "check --folder north --json"),
    ):
        whole = [json.loads(line)["subject"] for line in run(program, words, 1).splitlines()]
        Path(file).write_text("damaged")
        found = list(map(json.loads, run(program, words, 1).splitlines()))
        assert [finding["subject"] for finding in found] == whole
        assert any(file in line["said"] and line["state"] == "fails" for line in found)


def supervised(folder, *names, killed=False):
    """What a supervisor wrote that runs these programs, as this process, or that was killed."""
    here = Identity.of(os.getpid())
    program = ProgramStatus(state="running", identity=here, restarts=0, since=0.0)
    supervisor = here.model_copy(update={"started": here.started - 1}) if killed else here
    each = dict.fromkeys(names, program)
    status = Status(title="it", supervisor=supervisor, health_port=1, programs=each)
    write_atomically(state_file(folder), status.model_dump_json().encode())


@contextmanager
def left_running(folder, *names):
    """Programs whose supervisor was killed."""
    supervised(folder, *names, killed=True)
    with ExitStack() as stack:
        for name in names:
            environment = {**os.environ, MARK: mark(folder, name)}
            process = stack.enter_context(subprocess.Popen(["sleep", "10000"], env=environment))
            stack.callback(process.kill)
        yield


def findings(program, words, code):
    lines = map(json.loads, run(program, f"{words} --json", code).splitlines())
    return {line["subject"]: line for line in lines}


def test_a_check_tells_what_a_killed_supervisor_left(project):
    run(coordinator, "init project.toml")
    run(site, enrol())
    hospital, there = Hospital(Path("north").resolve()), Path("coordinator/run").resolve()
    front = Path("coordinator/front.pem").read_bytes()
    with (
        left_running(there, "superlink", "front"),
        left_running(hospital.run, "enclave", "supernode"),
    ):
        hospital.heartbeat.touch()
        found = findings(coordinator, "check", 1)
        assert "processes" not in found
        at_site = findings(site, "check --folder north", 1)
        assert at_site["registration"]["state"] == "ok"
        for line in (found["superlink"], found["front"], at_site["enclave"], at_site["supernode"]):
            assert line["state"] == "warning" and "its supervisor was killed" in line["said"]
        # It is renewed, and nobody is told to show it.
        assert "still shows the old one" in run(coordinator, "renew", 91)
        assert Path("coordinator/front.pem").read_bytes() != front
    assert "processes" in findings(coordinator, "check", 1)
    run(coordinator, "renew")


def test_a_check_under_the_relays_account_leaves_out_what_is_the_enclaves(project):
    run(coordinator, "init project.toml")
    run(site, enrol())
    hospital = Hospital(Path("north").resolve())
    with hospital.relay.open("a") as file:
        file.write(f'socket = "{hospital.socket}"\n')
    supervised(hospital.run, "supernode")
    hospital.heartbeat.touch()
    with socket.socket(socket.AF_UNIX) as enclave:
        enclave.bind(str(hospital.socket))
        enclave.listen()
        # An account that may read all of it, and the relay's own.
        found = findings(site, "check --folder north", 1)
        assert found["enclave"]["state"] == "ok" and {"policy", "images"} <= found.keys()
        hospital.site.unlink()
        found = findings(site, "check --folder north", 1)
    assert found["settings"]["state"] == "warning" and "relay's" in found["settings"]["said"]
    assert not {"policy", "images"} & found.keys()
    assert {"kit", "authority", "coordinator", "disk"} <= found.keys()
    assert {found[name]["state"] for name in ("enclave", "supernode", "registration")} == {"ok"}
    assert findings(site, "check --folder north", 1)["enclave"]["state"] == "fails"


def test_a_hospital_is_told_that_its_node_is_not_known(project):
    run(coordinator, "init project.toml")
    run(site, enrol())
    hospital = Hospital(Path("north").resolve())

    def registration():
        lines = map(json.loads, run(site, "check --folder north --json", 1).splitlines())
        return next(line for line in lines if line["subject"] == "registration")

    assert registration()["state"] == "warning"
    hospital.run.mkdir(exist_ok=True)
    refusal(hospital.heartbeat).touch()
    assert registration()["state"] == "fails" and "revoked" in registration()["said"]
    run(site, "install coordinator/kits/north.zip --folder north")
    assert registration()["state"] == "warning"


def test_a_refused_node_says_why(tmp_path, monkeypatch, caplog):
    its_own = vars(fleet_http_connection)
    monkeypatch.setitem(its_own, "flwr_exit", its_own["flwr_exit"])
    error = FlowerError(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED, "").to_json("not activated")
    heartbeat = tmp_path / "supernode.heartbeat"
    explain_refusal(heartbeat)
    key = ec.generate_private_key(ec.SECP384R1())
    with answering(400, json.dumps(error).encode()) as port:
        coordinator_there = (f"127.0.0.1:{port}", True, None, (key, key.public_key()))
        with pytest.raises(SystemExit), http_request_response(*coordinator_there):
            raise AssertionError("the node was let in")
    assert refusal(heartbeat).exists() and NOT_KNOWN in caplog.messages


@pytest.mark.long
def test_a_node_that_is_not_let_in_keeps_no_hospital_from_being_up(project, monkeypatch):
    run(coordinator, "init project.toml")
    run(site, f"{enrol()} --health-port {free_ports(1)[0]}")
    hospital = Hospital(Path("north").resolve())
    with hospital.relay.open("a") as file:
        file.write('socket = "/run/sonofed/enclave.sock"\n')
    clock = time.monotonic

    def there(port, host):
        if refusal(hospital.heartbeat).exists():
            # Nobody waits longer for it.
            monkeypatch.setattr(time, "monotonic", lambda: clock() + START_SECONDS)
        return True

    monkeypatch.setattr(deployment, "answers", there)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("coordinator/front.pem")
    error = FlowerError(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED, "").to_json("not activated")
    with answering(400, json.dumps(error).encode(), context) as port:
        kit = hospital.kit / "kit.json"
        kit.write_text(kit.read_text().replace(":8443", f":{port}"))
        try:
            said = run(site, "up --detach --relay --folder north")
            assert f"is up; localhost:{port} did not let it in yet" in said and NOT_KNOWN in said
            assert "supernode" in run(site, "status --folder north", 1)
        finally:
            assert "is down" in run(site, "down --folder north")


def test_a_socket_whose_path_is_too_long_is_refused(project):
    run(coordinator, "init project.toml")
    deep = f"{'d' * 60}/{'e' * 60}"
    assert "107" in run(site, enrol(folder=deep), 20)
    assert not Path(deep, "site.toml").exists()


def test_one_sites_folder_is_not_anothers(project):
    run(coordinator, "init project.toml")
    run(site, enrol())
    before = Path("north/request.json").read_bytes()
    assert "site north" in run(site, "init south --folder north", 20)
    assert Path("north/request.json").read_bytes() == before


@pytest.fixture
def followed(project, monkeypatch):
    """A study that asks, is silent for minutes, waits for a hospital and ends."""
    run(coordinator, "init project.toml")
    workspace = Workspace(Path("coordinator/studies/tiny"))
    write_atomically(workspace.study, b'name = "tiny"\ncohort.sites = ["north", "south"]\n')
    write_atomically(workspace.process, Identity.of(os.getpid()).model_dump_json().encode())
    supervised(Path("coordinator/run"))
    events = Events(workspace.events)
    events.emit("asked", action="train.install", sites=["north"], bytes=90)
    looks = iter((lambda: None, lambda: None, lambda: events.emit("awaited", site="north")))

    def pause(_):
        # Each look comes a minute after the last.
        now[0] += 60.0
        if (look := next(looks, None)) is None:
            workspace.process.unlink()
        else:
            look()

    now = [time.time()]
    monkeypatch.setattr(time, "time", lambda: now[0])
    monkeypatch.setattr(time, "sleep", pause)
    return "study status tiny --follow"


def test_a_study_is_followed_without_a_line_for_each_second(followed):
    said = run(coordinator, followed).splitlines()
    assert len([line for line in said if "was asked for" in line]) == 1, said
    assert [line for line in said if "awaited: train.install" in line], said


def test_a_study_is_followed_by_a_machine_in_objects(followed):
    said = [json.loads(line) for line in run(coordinator, f"{followed} --json").splitlines()]
    assert [now["state"] for now in said] == ["running", "running", "stopped"]
    assert said[0]["asked_bytes"] == 90 and said[0]["sites"]["north"].startswith("asked for")
    assert said[1]["sites"]["north"] == "awaited: train.install"
