"""What is missing, damaged or mistyped is told in a sentence, and harms nothing else."""

import json
import os
import pwd
import time
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

from sonofed_client.admission import NOT_KNOWN, explain_refusal, refusal
from sonofed_client.provisioning.kit import read_kit
from sonofed_client.provisioning.place import Hospital
from sonofed_common.contract.errors import EnrolmentError
from sonofed_common.runtime import Events, write_atomically
from sonofed_common.supervision.family import Identity
from sonofed_common.supervision.supervisor import Status, state_file
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


def test_a_refused_node_says_why(tmp_path, monkeypatch, caplog):
    its_own = vars(fleet_http_connection)
    monkeypatch.setitem(its_own, "flwr_exit", its_own["flwr_exit"])
    error = FlowerError(ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED, "").to_json("not activated")
    heartbeat = tmp_path / "supernode.heartbeat"
    refusal(heartbeat).touch()
    explain_refusal(heartbeat)
    assert not refusal(heartbeat).exists()
    key = ec.generate_private_key(ec.SECP384R1())
    with answering(400, json.dumps(error).encode()) as port:
        coordinator_there = (f"127.0.0.1:{port}", True, None, (key, key.public_key()))
        with pytest.raises(SystemExit), http_request_response(*coordinator_there):
            raise AssertionError("the node was let in")
    assert refusal(heartbeat).exists() and NOT_KNOWN in caplog.messages


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
    up = Status(title="it", supervisor=Identity.of(os.getpid()), health_port=1, programs={})
    write_atomically(state_file(Path("coordinator/run")), up.model_dump_json().encode())
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
