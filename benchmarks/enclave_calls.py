"""What a call costs before any work: one description through Flower's ClientApp, and the start.

``describe`` asks a warm enclave process, through the relay's own ClientApp in this process, and
prints the median. ``imports`` starts Python with all that a relay's process loads, and with
``flwr.clientapp`` alone, by turns, and prints the ratio of their medians. One JSON line each::

    python benchmarks/enclave_calls.py describe
    python benchmarks/enclave_calls.py imports
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

KEY = "0" * 64
FLOWER = "import flwr.clientapp"
RELAY = "import sonofed_client.app, sonofed_client.relay, sonofed_client.enclave.transport"


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@contextmanager
def enclave(folder: Path) -> Iterator[Path]:
    """An enclave process of a hospital of phantoms; gives its socket."""
    import tomli_w

    from sonofed_simulations.phantoms.dataset import write_dataset
    from sonofed_simulations.phantoms.scanner import SCANNERS

    write_dataset(folder / "images", SCANNERS["riverside"], 20, 5, 64, 0.4)
    socket, site = folder / "enclave.sock", folder / "site.toml"
    settings = {
        "name": "north",
        "store": str(folder / "store"),
        "coordinator_key": KEY,
        "auto_approve": [KEY],
        "socket": str(socket),
        "data": {"kind": "table", "path": str(folder / "images"), "test_fraction": 0.4},
    }
    site.write_text(tomli_w.dumps(settings))
    command = [Path(sys.executable).with_name("sonofed-site"), "enclave", "--site", site]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None and b" answers" in process.stdout.readline()
        yield socket
    finally:
        process.kill()
        process.wait()


def describe(repeats: int) -> dict[str, object]:
    from flwr.app import Context, Message, RecordDict
    from flwr.app.user_config import UserConfig
    from flwr.supercore.task_identity import TaskIdentity

    from sonofed_client.app import app
    from sonofed_client.relay import SOCKET_KEY
    from sonofed_common.contract.recorddict import from_recorddict, to_recorddict
    from sonofed_common.contract.records import Records

    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0
    asked = Records(config={"study": "trial", "seed": 3, "study_digest": KEY})
    folder = Path(tempfile.mkdtemp(prefix="sonofed-"))
    try:
        with enclave(folder) as socket:
            node = UserConfig({SOCKET_KEY: str(socket)})
            context = Context(1, 1, node, RecordDict(), UserConfig())

            def ask() -> None:
                message = Message(to_recorddict(asked), 1, "query.describe")
                message.metadata.__dict__["_message_id"] = "1"
                reply = from_recorddict(app(message, context).content)
                assert reply.config.get("site") == "north", reply.config

            ask()
            taken = [1000 * seconds(ask) for _ in range(repeats)]
    finally:
        shutil.rmtree(folder)
    return {
        "benchmark": "enclave_calls describe",
        "repeats": repeats,
        "median_ms": round(statistics.median(taken), 2),
        "least_ms": round(min(taken), 2),
        "most_ms": round(max(taken), 2),
    }


def imports(repeats: int) -> dict[str, object]:
    def start(code: str) -> float:
        return seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True))

    start(RELAY)
    taken = [(start(FLOWER), start(RELAY)) for _ in range(repeats)]
    flower, relay = (statistics.median(times) for times in zip(*taken, strict=True))
    return {
        "benchmark": "enclave_calls imports",
        "repeats": repeats,
        "seconds": {"flower": round(flower, 3), "relay": round(relay, 3)},
        "ratio": round(relay / flower, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["describe", "imports"])
    parser.add_argument("--repeats", type=int)
    given = parser.parse_args()
    measure, repeats = (describe, 100) if given.what == "describe" else (imports, 7)
    print(json.dumps(measure(given.repeats or repeats)))


if __name__ == "__main__":
    main()
