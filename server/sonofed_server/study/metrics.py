"""What a coordinator's studies tell Prometheus: phases, rounds, bytes and who is missing."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from sonofed_common.contract.errors import SonoFedError
from sonofed_server.provisioning.project import Coordinator
from sonofed_server.study.desk import State, entries
from sonofed_server.study.standing import standing

log = logging.getLogger(__name__)


def study_metrics(coordinator: Coordinator) -> Iterable[Metric]:
    """Return the metrics of all studies, as their files say.

    Notes
    -----
    Labels are names of studies, phases and states; how a hospital is, its own supervisor tells.
    """
    state = GaugeMetricFamily(
        "sonofed_study_state", "1 for the state that the study is in.", labels=["study", "state"]
    )
    gauges = {
        name: GaugeMetricFamily(f"sonofed_study_{name}", text, labels=["study"])
        for name, text in (
            ("phases_done", "Phases that are over."),
            ("phases", "Phases of the study."),
            ("sites", "Hospitals of the cohort."),
            ("sites_missing", "Hospitals that a running study left out of what it asked last."),
            ("quorum", "Hospitals without which the study fails."),
            ("attempts", "Starts since the study last finished a round."),
        )
    }
    costs = {
        name: CounterMetricFamily(f"sonofed_phase_{name}", text, labels=["study", "phase"])
        for name, text in (
            ("saves", "Times that the study was saved: after each round, and at the phase's end."),
            ("seconds", "Time in the phase."),
            ("bytes_to_sites", "Sent to the hospitals."),
            ("bytes_from_sites", "Come from the hospitals."),
        )
    }
    for entry in entries(coordinator):
        try:
            found = standing(entry)
        except SonoFedError:
            # One study's damaged file must not hide the others; its status names it.
            continue
        except Exception:
            log.exception("a study's metrics cannot be told", extra={"study": entry.name})
            continue
        for name in get_args(State):
            state.add_metric([entry.name, name], float(found.state == name))
        running = found.state == "running"
        missing = running * sum(word.startswith("missing") for word in found.sites.values())
        values = {
            "phases_done": found.phases_done,
            "phases": found.phases,
            "sites": len(found.sites),
            "sites_missing": missing,
            "quorum": found.quorum,
            "attempts": found.attempts,
        }
        for name, value in values.items():
            gauges[name].add_metric([entry.name], value)
        for cost in found.costs:
            for name, family in costs.items():
                family.add_metric([entry.name, cost.name], getattr(cost, name))
    return [state, *gauges.values(), *costs.values()]
