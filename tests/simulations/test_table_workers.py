"""A table on Ray: real workers, one of which is killed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sonofed_common.contract.errors import ConfigurationError, DataMissingError, EngineError
from sonofed_common.runtime import SILENT, Events
from sonofed_simulations.tables.arm_page import About
from sonofed_simulations.tables.arm_table import make_arm_table
from sonofed_simulations.tables.arms import Arm, Outcome
from sonofed_simulations.tables.manifest import Tested
from sonofed_simulations.tables.request import Made, Request
from sonofed_simulations.tables.workers import make_on_ray


@pytest.fixture(autouse=True)
def _by_value() -> None:
    from ray import cloudpickle

    # A worker finds the project's modules, and not this one.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Coins:
    """Each cell notes by whom it was made; the first to come to ``deadly`` is killed there."""

    arms = (Arm("plain"), Arm("deadly"), Arm("other"))
    seeds = (0, 1)
    about = About("Coins", "a work", (), "accuracy", "south", (), ())

    def __init__(self, out: Path) -> None:
        self.made = out / "made"
        self.killed = out / "killed"
        self.made.mkdir(parents=True, exist_ok=True)

    def origin(self, arm: Arm, seed: int) -> Mapping[str, Any]:
        return {}

    def facts(self) -> Mapping[str, Any]:
        return {}

    def tested(self) -> Tested:
        return {}

    def run(self, arm: Arm, seed: int) -> Outcome:
        if arm.name == "deadly" and not self.killed.exists():
            self.killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        with (self.made / f"{seed}-{arm.name}").open("a") as file:
            file.write(f"{os.getpid()} {os.environ['OMP_NUM_THREADS']}\n")
        labels = np.arange(20) % 2
        groups = np.array([str(n) for n in range(20)])
        return Outcome({"south": (labels, np.full(20, 0.6), groups)}, {})


def make(request: Request) -> Made:
    return make_arm_table(Coins(request.out), request)


def fail(request: Request, error: Exception) -> Made:
    raise error


def request(out: Path, events: Events = SILENT) -> Request:
    return Request("coins", True, out, None, (1, 1), events)


def test_workers_make_all_cells_once_though_one_is_killed(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    made = make_on_ray(make, request(tmp_path, Events(listeners=[told.append])), workers=2)
    assert made.cells == made.wanted == 6 and (tmp_path / "killed").exists()
    makers = {path.name: path.read_text().split() for path in (tmp_path / "made").iterdir()}
    # What had finished when a worker was killed was not made again.
    assert len(makers) == 6 and all(threads == "1" for _, threads in makers.values())
    processes = {int(process) for process, _ in makers.values()}
    assert len(processes) >= 2 and os.getpid() not in processes
    assert "6 of 6 cells have run" in (tmp_path / "README.md").read_text()
    shards = [e["done"] for e in told if e.get("task") == "shards"]
    assert shards[0] == 0 and shards[-1] == 2
    log = (tmp_path / "work" / "worker-2.jsonl").read_text().splitlines()
    assert any(json.loads(line).get("task") == "cells" for line in log)


def test_what_a_worker_ends_with_ends_the_table(tmp_path: Path) -> None:
    failing = partial(fail, error=DataMissingError("no folder 'x'; give it with --data"))
    with pytest.raises(DataMissingError, match="give it with --data"):
        make_on_ray(failing, request(tmp_path), workers=1)


def test_a_machine_on_which_ray_does_not_start_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/none")
    with pytest.raises(EngineError, match="Ray does not start on this machine"):
        make_on_ray(make, request(tmp_path), workers=1)


def test_a_cluster_that_does_not_answer_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no Ray cluster answers at '127"):
        make_on_ray(make, request(tmp_path), address="127.0.0.1:9")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """The address of a Ray cluster of two CPUs, which is not this test's to start or end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray = Path(sys.executable).with_name("ray")
    words = f"start --head --block --node-ip-address 127.0.0.1 --port {port} --num-cpus 2"
    words += " --include-dashboard false --disable-usage-stats"
    log = tmp_path / "cluster.log"
    with log.open("wb") as said:
        process = subprocess.Popen([ray, *words.split()], stdout=said, stderr=said)
    try:
        until = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
        # It outlives a table.
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(60)


@pytest.mark.slow
def test_a_table_runs_on_a_cluster_that_is_there(tmp_path: Path, cluster: str) -> None:
    out = tmp_path / "out"
    (out / "killed").parent.mkdir()
    (out / "killed").touch()
    made = make_on_ray(make, request(out), address=cluster)
    assert made.cells == made.wanted == 6
    makers = {path.read_text().split()[0] for path in (out / "made").iterdir()}
    assert str(os.getpid()) not in makers and len(makers) == 2
    assert "6 of 6 cells have run" in (out / "README.md").read_text()
