"""Metrics of a supervisor and what it supervises, in Prometheus' text form."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sonofed_common.supervision.program import ProgramStatus

Source = Callable[[], Iterable[Metric]]


def exposition(*sources: Source) -> bytes:
    """Return what sources tell now, as ``GET /metrics`` answers it."""
    registry = CollectorRegistry(auto_describe=False)
    for source in sources:
        registry.register(_Collected(source))
    text: bytes = generate_latest(registry)
    return text


def program_metrics(programs: dict[str, ProgramStatus]) -> list[Metric]:
    """Whether each program works, and how often it was started again."""
    up = GaugeMetricFamily("sonofed_program_up", "1 if the program works.", labels=["program"])
    again = CounterMetricFamily(
        "sonofed_program_restarts", "Times that the program was started again.", labels=["program"]
    )
    for name, status in programs.items():
        up.add_metric([name], float(status.state == "running"))
        again.add_metric([name], status.restarts)
    return [up, again]


class _Collected(Collector):
    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterable[Metric]:
        return self._source()
