"""A table's cells on many cores, or on the machines of a Ray cluster."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace

from sonofed_common.contract.errors import ConfigurationError, EngineError
from sonofed_common.runtime import Events
from sonofed_simulations.tables.request import Made, Request

POLL_SECONDS, KNOCK_SECONDS = 1.0, 10
# Before Ray is imported: it reports nothing home, and leaves a task without a GPU its environment.
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def make_on_ray(
    make: Callable[[Request], Made],
    request: Request,
    workers: int | None = None,
    address: str | None = None,
) -> Made:
    """Run a table's cells on Ray, one shard a worker, then write the page of all of them.

    Parameters
    ----------
    make : callable
        Of the table; see `maker`.
    request : Request
        Of the whole table. Its folders have the same path on all machines.
    workers : int or None
        How many shards run at once, each on one CPU; None takes as many as there are CPUs.
    address : str or None
        Of a running cluster, ``host:port`` or ``auto``; None starts Ray on this machine for the
        time of the run.

    Raises
    ------
    ConfigurationError
        No cluster answers at the address.
    EngineError
        Ray does not start on this machine, or a worker died again and again.
    SonoFedError
        What a worker ended with.

    Notes
    -----
    A worker that dies is begun anew, and goes on from the cells that it has finished. What a
    worker does stands in ``work/worker-<n>.jsonl``. An interruption keeps the cells, and writes no
    page.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray
    from ray.exceptions import RayError, RayTaskError

    quiet = {"log_to_driver": False, "configure_logging": False}
    try:
        if address is None:
            ray.init("local", num_cpus=workers, include_dashboard=False, **quiet)
        else:
            if address != "auto":
                _knock(address)
            ray.init(address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        if address is None:
            raise EngineError(f"Ray does not start on this machine: {error}") from None
        raise ConfigurationError(
            f"no Ray cluster answers at '{address}'; start one by 'ray start --head' and name its "
            "host:port, or leave --ray out"
        ) from None
    try:
        held = ray.cluster_resources()
        count = workers or max(1, int(held.get("CPU", 1)))
        share = min(1.0, held.get("GPU", 0.0) / count)
        task = ray.remote(num_cpus=1, num_gpus=share)(_make_shard)
        waiting = [task.remote(make, _asked(request, n, count)) for n in range(1, count + 1)]
        request.events.progress("shards", 0, count)
        while waiting:
            done, waiting = ray.wait(waiting, timeout=POLL_SECONDS)
            ray.get(done)
            if done:
                request.events.progress("shards", count - len(waiting), count)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise EngineError(f"Ray: {type(error).__name__}; run the command again to go on") from None
    finally:
        ray.shutdown()
    return make(request)


def _knock(address: str) -> None:
    """Connect once: Ray itself goes on trying for minutes, and then ends the process."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), KNOCK_SECONDS).close()


def _asked(request: Request, number: int, count: int) -> Request:
    out = request.out.absolute()
    data = None if request.data is None else request.data.absolute()
    events = Events(out / "work" / f"worker-{number}.jsonl")
    return replace(request, out=out, data=data, shard=(number, count), events=events)


def _make_shard(make: Callable[[Request], Made], request: Request) -> None:
    make(request)
