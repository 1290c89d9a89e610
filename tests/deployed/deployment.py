"""A coordinator and hospitals as real processes, over TLS with node authentication."""

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import tomli_w

from sonofed_client.enclave.store import open_store
from sonofed_client.provisioning.place import Hospital
from sonofed_client.settings import read_site
from sonofed_common.contract.records import from_bytes
from sonofed_common.contract.study import Study
from sonofed_common.runtime import Events
from sonofed_common.supervision.family import end
from sonofed_common.supervision.program import mark
from sonofed_common.supervision.supervisor import read_status
from sonofed_server.provisioning.project import read_coordinator
from sonofed_server.study.desk import find
from sonofed_server.study.standing import standing
from sonofed_simulations.engines.inline import run_inline

BIN = Path(sys.executable).parent
PATIENCE = 1500
CHANGES = {
    "phases": ["enrol", "ship", "select", "annotate", "classifier", "publish"],
    "selection": {"strategy": "random", "budgets": [0.5]},
    "finetuning": {"rounds": 4},
}
"""The tiny study with few questions."""

needs_front = pytest.mark.skipif(
    shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None,
    reason="needs nginx, the front",
)


def tiny(laboratory, name="tiny", **further):
    values = laboratory.scenario.study.model_dump(mode="json", exclude_none=True)
    for key, value in {**CHANGES, **further}.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return Study.model_validate({**values, "name": name})


def run(program, *words, code=0, at=()):
    command = [*at, BIN / program, *map(str, words)]
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


def wait_for(condition, patience=PATIENCE):
    until = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.1)
    return found


class OneMachine:
    """Everyone on the loopback."""

    address, listen = "localhost", "127.0.0.1"

    def at(self, name):
        """What a command begins with that runs at the coordinator or at a hospital."""
        return ()


class Deployment:
    """A coordinator and hospitals, with the laboratory's images and bundle."""

    def __init__(self, laboratory, root, machines=None):
        self.laboratory = laboratory
        self.machines = machines or OneMachine()
        self.project = root / "project.toml"
        front, superlink, health, *ports = free_ports(3 + len(self.names))
        values = {
            "name": "trial",
            "address": f"{self.machines.address}:{front}",
            "sites": self.names,
            "contact": "it@example.org",
            "listen": self.machines.listen,
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

    def up(self, *names):
        """Start the coordinator and all hospitals, or these hospitals alone."""
        if not names:
            at = self.machines.at("coordinator")
            run("sonofed-coordinator", "up", "--detach", "--project", self.project, at=at)
        for name in names or self.names:
            folder, at = self.hospitals[name].root, self.machines.at(name)
            run("sonofed-site", "up", "--detach", "--folder", folder, at=at)

    def down(self):
        for hospital in self.hospitals.values():
            run("sonofed-site", "down", "--folder", hospital.root)
        run("sonofed-coordinator", "down", "--project", self.project)

    def lose(self, name):
        """A hospital's machine is gone: nothing there ends by itself."""
        folder = self.hospitals[name].run
        status = read_status(folder)
        os.kill(status.supervisor.pid, signal.SIGKILL)
        for program, found in status.programs.items():
            end(mark(folder, program), found.identity, 0.0)

    def study(self, *words, code=0):
        return run("sonofed-coordinator", "study", *words, "--project", self.project, code=code)

    def standing(self, name):
        """What ``study status`` says, without a process for it."""
        return standing(find(self.coordinator, name), self.coordinator.front_log)

    def write(self, name, **further):
        study = tiny(self.laboratory, name, **further)
        values = study.model_dump(mode="json", exclude_none=True)
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
        assert array.dtype == others[name].dtype, name
        assert array.tobytes() == others[name].tobytes(), name


def undisturbed(laboratory, root, **further):
    """The outcome of the same study in one process."""
    sites = laboratory.prepare_sites(0, root / "sites")
    study = tiny(laboratory, **further)
    workspace = laboratory.workspace(study, laboratory.root / "source", root / "study")
    run_inline(workspace, sites, Events())
    return outcome(workspace, sites, study.name)
