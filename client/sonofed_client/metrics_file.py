"""The file by which an enclave, which has no network, tells its metrics to a supervisor."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from sonofed_common.supervision.probes import fresh

STALE_SECONDS = 60.0


def metrics_file(socket: Path) -> Path:
    """Where the enclave of a socket writes its metrics."""
    return socket.with_suffix(".prom")


def read_metrics(socket: Path) -> list[Metric]:
    """Return what the enclave of a socket wrote; nothing if it has not lately."""
    file = metrics_file(socket)
    try:
        if not fresh(file, STALE_SECONDS):
            return []
        return list(text_string_to_metric_families(file.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return []
