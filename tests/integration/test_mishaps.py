"""What is missing, damaged or mistyped is told in a sentence, and harms nothing else."""

import json
from pathlib import Path

from two_programs import coordinator, enrol, run, site


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
