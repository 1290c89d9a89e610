"""What is missing, damaged or mistyped is told in a sentence, and harms nothing else."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from two_programs import coordinator, enrol, run, site, write_project

from sonofed_client.provisioning.kit import read_kit
from sonofed_common.contract.errors import EnrolmentError
from sonofed_server.provisioning.front import write_front
from sonofed_server.provisioning.project import Coordinator, Project


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
