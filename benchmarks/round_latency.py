"""Seconds of a round of training and evaluation: our exchange against Flower's own FedAvg.

One SuperLink, with TLS and node authentication, and two sites on this machine: by turns Flower's
SuperNodes with a ClientApp and FedAvg as Flower's users write it, and what a hospital of SonoFed
runs, with an enclave whose work is as little. Every round trains at each site and evaluates the
global weights there; ours does both in one message, of the weights that it brings. Asserts that
both end with the same weights. The last line is JSON::

    python benchmarks/round_latency.py --megabytes 1 20 200

``--memory`` measures the ServerApp's memory at its peak, for 2, 4 and 8 sites, in models above what
it takes before it has one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from sonofed_client.enclave.jobs import Jobs
from sonofed_client.enclave.ledger import Ledger
from sonofed_client.enclave.room import Room
from sonofed_client.enclave.server import Service, serve, wait_for_the_end
from sonofed_client.enclave.store import Store
from sonofed_client.provisioning.place import Hospital
from sonofed_client.provisioning.programs import installed_kit
from sonofed_client.provisioning.programs import programs as site_programs
from sonofed_common.contract.recorddict import from_recorddict, send_larger_parts, to_recorddict
from sonofed_common.contract.records import Records, grouped
from sonofed_common.supervision.program import Program, answers
from sonofed_server.provisioning.keys import make_keys
from sonofed_server.provisioning.laboratory import provision_sites
from sonofed_server.provisioning.programs import programs as coordinator_programs
from sonofed_server.provisioning.project import Coordinator, read_coordinator
from sonofed_server.study.flower import CONNECTION, ask
from sonofed_server.study.registration import register

HERE = Path(__file__).resolve().parent
PATIENCE = 3000.0
SITES = (2, 4, 8)


class Echo:
    """An enclave whose training adds a number, as that of Flower's ClientApp here does."""

    def __init__(self, site: int) -> None:
        from round_apps import step_of

        self._step = step_of(site)

    def perform(self, action: str, request: Records) -> Records:
        weights = request.group("weights")
        trained = {name: array + self._step for name, array in weights.items()}
        metrics = {"value": float(weights["layer0"][0])}
        return Records(grouped("weights", trained), {"examples": 1}, metrics)

    def admit(self, action: str, request: Records) -> None:
        pass


def enclave(folder: Path, path: Path, site: int) -> None:
    """Answer on a socket as a hospital's enclave does; approval, policy and ledger are left out."""
    store, echo = Store(folder), Echo(site)
    jobs = Jobs(echo, store, lambda: "no images")
    server = serve(Service(echo, jobs, Ledger(store.folder, store.keys.ledger), Room(2**40)), path)
    jobs.start()
    wait_for_the_end(server)


def light_site(hospital: Hospital, site: int) -> None:
    """Answer as a hospital's node does, without an enclave."""
    from flwr.app import Message
    from flwr.supernode.fleet_http_connection import http_request_response

    from sonofed_client import supernode

    echo = Echo(site)

    class Light(supernode.Node):
        def _work(self, message: Message) -> Message:
            reply = echo.perform(message.metadata.message_type, from_recorddict(message.content))
            return Message(to_recorddict(reply), reply_to=message)

    supernode.be_patient()
    send_larger_parts()
    key = supernode.load_ssh_private_key(hospital.node_key.read_bytes(), None)
    address, certificates = installed_kit(hospital).address, hospital.authority.read_bytes()
    with http_request_response(address, False, certificates, (key, key.public_key())) as connection:
        Light(connection, {}, threading.Event()).serve()


def free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


class Federation:
    """A coordinator's SuperLink and its registered sites, in a folder.

    Parameters
    ----------
    root : Path
        Gets keys, logs and reports.
    sites : int
        How many hospitals.
    """

    def __init__(self, root: Path, sites: int) -> None:
        self.root, port, self.runs = root, free_ports(1)[0], 0
        values = {
            "name": "benchmark",
            "address": f"127.0.0.1:{port}",
            "sites": [f"site{number}" for number in range(sites)],
            "contact": "nobody",
            "superlink_port": port,
        }
        project = root / "project.toml"
        project.write_text(tomli_w.dumps(values))
        self.coordinator: Coordinator = read_coordinator(project, new=True)
        make_keys(self.coordinator)
        for name in self.coordinator.project.sites:
            (root / "images" / name).mkdir(parents=True)
        self.sites = [Hospital(f) for f in provision_sites(self.coordinator, root / "images", True)]
        self._superlink = [
            program
            for program in coordinator_programs(self.coordinator, project)
            if program.name in ("superlink", "executor")
        ]

    @contextmanager
    def up(self) -> Iterator[None]:
        with ExitStack() as stack:
            for program in self._superlink:
                stack.enter_context(self.running(program))
            register(self.coordinator)
            yield

    @contextmanager
    def nodes(self, side: str, sites: int) -> Iterator[None]:
        """The sites' processes: ``"sonofed"``, ``"light"`` (no enclave) or ``"flower"``."""
        with ExitStack() as stack:
            for number, hospital in enumerate(self.sites[:sites]):
                for program in self._programs(side, number, hospital):
                    stack.enter_context(self.running(program))
            yield

    def _programs(self, side: str, number: int, hospital: Hospital) -> list[Program]:
        if side == "light":
            command = (sys.executable, __file__, "--site", str(number), str(hospital.root))
            return [Program("site", command, lambda: True)]
        if side == "sonofed":
            socket = hospital.socket
            socket.unlink(missing_ok=True)
            echo = (sys.executable, __file__, "--enclave", str(number), str(hospital.root))
            relay = [p for p in site_programs(hospital) if p.name != "enclave"]
            return [Program("enclave", echo, socket.exists), *relay]
        home, (port,) = hospital.run / "flower", free_ports(1)
        home.mkdir(parents=True, exist_ok=True)
        command = (
            str(Path(sys.executable).with_name("flower-supernode")),
            *("--superlink", self.coordinator.project.address),
            *("--root-certificates", str(hospital.authority)),
            *("--auth-supernode-private-key", str(hospital.node_key)),
            *("--node-config", f"site={number}"),
            *("--host", "127.0.0.1", "--port", str(port)),
        )
        return [Program("supernode", command, lambda: answers(port), {"FLWR_HOME": str(home)})]

    def run(self, side: str, megabytes: int, rounds: int, sites: int) -> dict[str, Any]:
        """Run an app to its end and return its report."""
        self.runs += 1
        report, app = self.root / f"report{self.runs}.json", self.root / f"app{self.runs}"
        client = "round_apps:flower_client" if side == "flower" else "sonofed_client.app:app"
        config = {
            "report": str(report),
            "megabytes": megabytes,
            "rounds": rounds,
            "sites": sites,
        }
        components = {"serverapp": f"round_apps:{side}_server", "clientapp": client}
        flwr = {"app": {"publisher": "sonofed", "components": components, "config": config}}
        project = {"name": f"round-{side}", "version": "1.0.0", "license": "Apache-2.0"}
        app.mkdir()
        pyproject = {"project": {**project, "dependencies": []}, "tool": {"flwr": flwr}}
        (app / "pyproject.toml").write_text(tomli_w.dumps(pyproject))
        ask(self.coordinator, "run", str(app), CONNECTION)
        until = time.monotonic() + PATIENCE
        while not report.exists():
            if time.monotonic() > until:
                raise TimeoutError(f"{side}, {megabytes} MB: no report; logs are in {self.root}")
            time.sleep(0.2)
        facts = dict(json.loads(report.read_bytes()))
        if "error" in facts:
            raise RuntimeError(facts["error"])
        return facts

    @contextmanager
    def running(self, program: Program) -> Iterator[None]:
        with (self.root / "log").open("ab") as log:
            given = {**os.environ, **program.environment}
            process = subprocess.Popen(program.command, env=given, stdout=log, stderr=log)
        try:
            until = time.monotonic() + PATIENCE
            while not program.ready():
                assert process.poll() is None and time.monotonic() < until, program.name
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def latency(root: Path, sizes: list[int], rounds: int, pairs: int) -> dict[str, object]:
    federation = Federation(root, 2)
    seconds: dict[str, dict[str, list[float]]] = {}
    with federation.up():
        for size in sizes:
            taken: dict[str, list[float]] = {"flower": [], "sonofed": []}
            for _ in range(pairs):
                reports = {}
                for side, rounds_taken in taken.items():
                    with federation.nodes(side, 2):
                        report = reports[side] = federation.run(side, size, rounds, 2)
                    rounds_taken += report["rounds"]
                    print(json.dumps({"megabytes": size, "side": side, **report}), flush=True)
                assert reports["flower"]["weights"] == reports["sonofed"]["weights"]
            seconds[f"{size}MB"] = taken
    means = {
        size: {side: statistics.mean(values) for side, values in taken.items()}
        for size, taken in seconds.items()
    }
    return {
        "benchmark": "round_latency",
        "ratios": {s: round(m["sonofed"] / m["flower"], 3) for s, m in means.items()},
        "seconds_per_round": {
            size: {side: [round(v, 2) for v in values] for side, values in taken.items()}
            for size, taken in seconds.items()
        },
        "rounds": rounds,
        "pairs": pairs,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "load": os.getloadavg(),
    }


def peak_memory(root: Path, megabytes: int, rounds: int) -> dict[str, object]:
    models, raw = {}, {}
    federation = Federation(root, max(SITES))
    with federation.up():
        for sites in SITES:
            with federation.nodes("light", sites):
                report = federation.run("sonofed", megabytes, rounds, sites)
            models[sites] = round((report["peak"] - report["idle"]) / (megabytes * 1024**2), 2)
            raw[sites] = {name: round(report[name] / 1024**2) for name in ("idle", "peak")}
            print(json.dumps({"sites": sites, "models": models[sites], **report}), flush=True)
    return {
        "benchmark": "round_latency --memory",
        "megabytes": megabytes,
        "models_above_idle": models,
        "flat_within": round(max(models.values()) / min(models.values()) - 1, 3),
        "megabytes_of_the_serverapp": raw,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 20, 200])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--keep", action="store_true", help="keep the folder of keys and logs")
    for process in ("--enclave", "--site"):
        parser.add_argument(process, nargs=2, metavar=("NUMBER", "FOLDER"))
    given = parser.parse_args()
    # Whoever ends this ends what it started; a site takes its leave.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if given.site is not None:
        light_site(Hospital(Path(given.site[1])), int(given.site[0]))
        return
    if given.enclave is not None:
        hospital = Hospital(Path(given.enclave[1]))
        enclave(hospital.root / "echo", hospital.socket, int(given.enclave[0]))
        return
    root = Path(tempfile.mkdtemp(prefix="sonofed-", dir="/tmp"))
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    # Flower's SuperNode looks for its own programs there.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # Flower's processes find `round_apps` there.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    try:
        if given.memory:
            result = peak_memory(root, max(given.megabytes), given.rounds)
        else:
            result = latency(root, given.megabytes, given.rounds, given.pairs)
        print(json.dumps(result))
    finally:
        if given.keep:
            print(f"kept {root}", file=sys.stderr)
        else:
            shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
