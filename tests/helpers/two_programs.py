"""Provisioning by the two programs' own commands, in this process and the current folder."""

import re
import shlex

import pytest
from typer.testing import CliRunner

from sonofed_client.cli import app as site
from sonofed_server.cli import app as coordinator

PROJECT = """
name = "trial"
address = "localhost:8443"
sites = ["north", "south"]
contact = "it@example.org"
"""


def run(program, words, code=0):
    done = CliRunner().invoke(program, shlex.split(words))
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def words(output):
    return re.search(r"(?:words|phone): ([a-z]+(?: [a-z]+){11})$", output, re.M).group(1)


def write_project(folder):
    (folder / "project.toml").write_text(PROJECT)
    (folder / "images").mkdir()


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path)
    return tmp_path


def enrol(name="north", folder="north"):
    said = words(run(site, f"init {name} --folder {folder}"))
    told = words(run(coordinator, f"enrol {folder}/request.json --words '{said}'"))
    return f"install coordinator/kits/{name}.zip --folder {folder} --data images --words '{told}'"
