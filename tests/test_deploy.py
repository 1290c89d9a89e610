"""The files under deploy/, by the programs that read them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sonofed_server.provisioning.front import find_nginx, write_front
from sonofed_server.provisioning.keys import make_keys
from sonofed_server.provisioning.project import Coordinator, Project

ROOT = Path(__file__).parent.parent
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))


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


@pytest.mark.skipif(shutil.which("nginx", path="/usr/sbin:/usr/bin") is None, reason="needs nginx")
def test_nginx_takes_the_front(tmp_path):
    project = Project(name="trial", address="localhost:18444", sites=("north",), contact="it")
    coordinator = Coordinator(project, tmp_path / "coordinator")
    make_keys(coordinator)
    command = [find_nginx(), "-t", "-e", "stderr", "-p", tmp_path, "-c", write_front(coordinator)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "[warn]" not in done.stderr, done.stderr
