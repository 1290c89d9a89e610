"""Moving a record through an enclave's socket, against ``cp`` of the same bytes to tmpfs.

The enclave is a process of its own whose work is to give back what it got: what is measured is the
way in (Submit), the way in for a long job, whose request is also encrypted into the store before it
is accepted (Submit, kept), and the way out (Fetch). Prints one JSON line::

    python benchmarks/enclave_transport.py --megabytes 200
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np

from sonofed_client.enclave.parts import receive, send
from sonofed_common.contract import enclave_pb2 as messages
from sonofed_common.contract.enclave_pb2_grpc import EnclaveStub
from sonofed_common.contract.records import Records, to_bytes

TMPFS = Path("/dev/shm")
PLAIN, KEPT = "query.echo", "train.embed"


def serve(folder: Path) -> None:
    from sonofed_client.enclave.jobs import Jobs
    from sonofed_client.enclave.ledger import Ledger
    from sonofed_client.enclave.room import Room
    from sonofed_client.enclave.server import Service, wait_for_the_end
    from sonofed_client.enclave.server import serve as answer
    from sonofed_client.enclave.store import Store

    class Echo:
        def perform(self, action: str, request: Records) -> Records:
            return request

        def admit(self, action: str, request: Records) -> None:
            pass

    store = Store(folder / "store")
    jobs = Jobs(Echo(), store, lambda: "no images")
    ledger = Ledger(store.folder, store.keys.ledger)
    server = answer(Service(Echo(), jobs, ledger, Room(2**40)), folder / "socket")
    jobs.start()
    print("answers", flush=True)
    wait_for_the_end(server)


def memory(pid: int, line: str) -> int:
    """Bytes of the process: VmRSS now, VmHWM at its peak."""
    for text in Path(f"/proc/{pid}/status").read_text().splitlines():
        if text.startswith(f"{line}:"):
            return int(text.split()[1]) * 1024
    raise ValueError(line)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(folder: Path, megabytes: int, repeats: int) -> dict[str, object]:
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(folder)], stdout=subprocess.PIPE
    )
    try:
        assert server.stdout is not None and server.stdout.readline() == b"answers\n"
        stub = EnclaveStub(grpc.insecure_channel(f"unix:{folder / 'socket'}"))
        generator = np.random.default_rng(0)
        small = Records({"weights/a": generator.random(1000)})
        _round_trip(stub, small, PLAIN)
        size = megabytes * 1024**2
        record = Records({"weights/a": generator.integers(0, 256, size, dtype=np.uint8)})
        (folder / "file").write_bytes(to_bytes(record))
        times: dict[str, list[float]] = {"cp": [], "submit": [], "submit_kept": [], "fetch": []}
        growth = []
        for number in range(repeats):
            record.arrays["weights/a"][0] = number
            times["cp"].append(seconds(lambda: subprocess.run(copy_command(folder), check=True)))
            for action, name in ((PLAIN, "submit"), (KEPT, "submit_kept")):
                Path(f"/proc/{server.pid}/clear_refs").write_text("5")
                before = memory(server.pid, "VmRSS")
                into, out = _round_trip(stub, record, action)
                growth.append((memory(server.pid, "VmHWM") - before) / size)
                times[name].append(into)
                times["fetch"].append(out)
        medians = {name: statistics.median(values) for name, values in times.items()}
        ratios = {n: round(s / medians["cp"], 2) for n, s in medians.items() if n != "cp"}
        return {
            "benchmark": "enclave_transport",
            "megabytes": megabytes,
            "repeats": repeats,
            "seconds": {name: round(value, 3) for name, value in medians.items()},
            "ratio_to_cp": ratios,
            "worst_ratio": max(ratios.values()),
            "peak_memory_growth": round(max(growth), 2),
        }
    finally:
        server.kill()
        server.wait()


def copy_command(folder: Path) -> list[str]:
    return ["cp", str(folder / "file"), str(folder / "copy")]


def _round_trip(stub: EnclaveStub, record: Records, action: str) -> tuple[float, float]:
    status = messages.Status()

    def submit() -> None:
        status.CopyFrom(stub.Submit(send(record, action)))

    into = seconds(submit)
    while status.state != messages.DONE:
        assert status.state != messages.FAILED, status.failure.sentence
        *_, latest = stub.Watch(messages.Job(id=status.job))
        status.CopyFrom(latest)
    replies = []
    fetch = stub.Fetch(messages.Job(id=status.job))
    out = seconds(lambda: replies.append(receive(fetch)))
    assert replies[0].records.digest() == record.digest()
    return into, out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serve", type=Path)
    given = parser.parse_args()
    if given.serve is not None:
        serve(given.serve)
        return
    folder = Path(tempfile.mkdtemp(dir=TMPFS if TMPFS.is_dir() else None))
    try:
        print(json.dumps(measure(folder, given.megabytes, given.repeats)))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
