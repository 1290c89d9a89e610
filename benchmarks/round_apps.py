"""Flower apps of `round_latency.py`: FedAvg as Flower's users write it, and our exchange.

Both average the same weights of the same sites. "Training" adds a number that each site has for
itself: Flower sends what it has already seen under its hash only once, and an update is new each
time. The numbers are powers of two, so that every sum is exact, whoever rounds it how.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from sonofed_common.contract.records import Records, grouped
from sonofed_common.contract.study import Cohort
from sonofed_common.runtime import SILENT, write_atomically
from sonofed_server.aggregation.fedavg import FedAvg as StreamingFedAvg
from sonofed_server.study.exchange import Exchange
from sonofed_server.study.grid import hasten

LAYERS = 8
STEP = 2.0**-12
ACTION = "train.classifier"
Array32 = np.ndarray[Any, np.dtype[np.float32]]

flower_server = ServerApp()
flower_client = ClientApp()
sonofed_server = ServerApp()


def initial_weights(megabytes: int) -> dict[str, Array32]:
    """Random weights that a few steps leave exact in float32."""
    generator = np.random.default_rng(0)
    size = megabytes * 1024**2 // 4 // LAYERS
    return {
        f"layer{number}": generator.integers(-4096, 4096, size).astype(np.float32)
        * np.float32(STEP)
        for number in range(LAYERS)
    }


def step_of(site: int) -> np.float32:
    return np.float32(STEP * 2 * (site + 1))


def memory(line: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(f"{line}:"):
            return int(text.split()[1]) * 1024
    raise ValueError(line)


class Report:
    """What a run tells the benchmark: seconds of each round, its weights, its memory."""

    def __init__(self, context: Context) -> None:
        self._path = Path(str(context.run_config["report"]))
        self._facts: dict[str, Any] = {"rounds": []}
        self._since = time.monotonic()

    def __enter__(self) -> Report:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._facts["error"] = repr(error)
        write_atomically(self._path, json.dumps(self._facts).encode())

    def idle(self) -> None:
        """Before there is a model: from here on the peak is measured anew."""
        Path("/proc/self/clear_refs").write_text("5")
        self._facts["idle"] = memory("VmRSS")

    def begin(self) -> None:
        self._since = time.monotonic()

    def round(self) -> None:
        now = time.monotonic()
        self._facts["rounds"].append(now - self._since)
        self._since = now

    def end(self, weights: dict[str, Array32], **facts: Any) -> None:
        self._facts |= {"peak": memory("VmHWM"), **facts}
        digest = hashlib.sha256()
        for name in sorted(weights):
            digest.update(np.ascontiguousarray(weights[name]).data)
        self._facts["weights"] = digest.hexdigest()


def wait_for_nodes(grid: Grid, number: int) -> dict[str, int]:
    while len(nodes := {node.name: node.node_id for node in grid.get_nodes()}) < number:
        time.sleep(0.2)
    return nodes


@flower_client.train()
def train(message: Message, context: Context) -> Message:
    step = step_of(int(context.node_config["site"]))
    arrays = {n: Array(array.numpy() + step) for n, array in message.content["arrays"].items()}
    content = {
        "arrays": ArrayRecord(arrays),
        "metrics": MetricRecord({"num-examples": 1}),
    }
    return Message(content=RecordDict(content), reply_to=message)


@flower_client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    value = float(message.content["arrays"]["layer0"].numpy()[0])
    content = {"metrics": MetricRecord({"value": value, "num-examples": 1})}
    return Message(content=RecordDict(content), reply_to=message)


@flower_server.main()
def flower_main(grid: Grid, context: Context) -> None:
    config = context.run_config
    with Report(context) as report:
        wait_for_nodes(grid, int(config["sites"]))
        report.idle()
        weights = initial_weights(int(config["megabytes"]))
        initial = ArrayRecord({name: Array(array) for name, array in weights.items()})
        del weights

        def after_round(number: int, _: ArrayRecord) -> None:
            if number:
                report.round()
            else:
                report.begin()

        result = FedAvg(min_available_nodes=int(config["sites"])).start(
            grid, initial_arrays=initial, num_rounds=int(config["rounds"]), evaluate_fn=after_round
        )
        values = result.evaluate_metrics_clientapp
        weights = {name: array.numpy() for name, array in result.arrays.items()}
        report.end(weights, values=[values[number]["value"] for number in sorted(values)])


@sonofed_server.main()
def sonofed_main(grid: Grid, context: Context) -> None:
    config = context.run_config
    hasten(grid)
    with Report(context) as report:
        nodes = wait_for_nodes(grid, int(config["sites"]))
        exchange = Exchange(grid, Cohort(sites=tuple(sorted(nodes))), SILENT, nodes=nodes)
        report.idle()
        weights = initial_weights(int(config["megabytes"]))
        values = []
        report.begin()
        for number in range(int(config["rounds"])):
            weights, value = sonofed_round(exchange, number, weights)
            values.append(value)
            report.round()
        report.end(weights, values=values)


def sonofed_round(
    exchange: Exchange, number: int, weights: dict[str, Array32]
) -> tuple[dict[str, Array32], float]:
    mean, values = StreamingFedAvg(), []
    request = Records(grouped("weights", weights), {"round": number})
    for _, reply in exchange.ask(ACTION, request):
        mean.add(reply.group("weights"), float(reply.config["examples"]))
        values.append(float(reply.metrics["value"]))
        # Or it would stay until the next one is there.
        del reply
    return mean.mean(), sum(values) / len(values)
