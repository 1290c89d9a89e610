"""What an enclave tells Prometheus: a file beside its socket, as it has no network."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from sonofed_client.enclave.jobs import Jobs
from sonofed_client.enclave.ledger import Ledger
from sonofed_client.metrics_file import metrics_file
from sonofed_common.contract.actions import ACTIONS
from sonofed_common.contract.errors import LedgerError
from sonofed_common.runtime import write_atomically
from sonofed_common.supervision.metrics import exposition

SECONDS = 10.0
MODE = 0o640

log = logging.getLogger(__name__)


def keep_written(ledger: Ledger, jobs: Jobs, socket: Path) -> None:
    """Write the metrics now and every `SECONDS`, in a thread that ends with the process."""

    def write() -> None:
        while True:
            try:
                text = exposition(lambda: enclave_metrics(ledger, jobs))
                write_atomically(metrics_file(socket), text)
                # Like the socket, for its group whatever the process's umask is.
                metrics_file(socket).chmod(MODE)
            except (OSError, LedgerError) as error:
                log.warning("the metrics cannot be written (%s)", type(error).__name__)
            time.sleep(SECONDS)

    metrics_file(socket).unlink(missing_ok=True)
    threading.Thread(target=write, name="metrics", daemon=True).start()


def enclave_metrics(ledger: Ledger, jobs: Jobs) -> Iterable[Metric]:
    """Return counts of what left, of what was refused, and of jobs.

    Notes
    -----
    Labels are names of actions, studies and outcomes that the coordinator knows: nothing here is of
    an image or a patient.
    """
    messages = CounterMetricFamily(
        "sonofed_ledger_entries",
        "What the ledger holds, refusals that it counted together included.",
        labels=["outcome", "action"],
    )
    sent = CounterMetricFamily("sonofed_sent_bytes", "Bytes that left.", labels=["study"])
    noised = CounterMetricFamily(
        "sonofed_noised_replies",
        "Replies that left with noise of their own: what was spent of a study's privacy.",
        labels=["study", "action"],
    )
    tally = ledger.tally()
    # Prometheus sees the first refusal as an increase only if it saw none before.
    counted = Counter({("refused", action): 0 for action in ("", *ACTIONS)})
    for (outcome, action), count in tally.entries.items():
        # A refused action bears whatever name a stranger gave it.
        counted[outcome, action if action in ACTIONS else ""] += count
    for labels, count in sorted(counted.items()):
        messages.add_metric(list(labels), count)
    for study, size in sorted(tally.sent.items()):
        sent.add_metric([study], size)
    for labels, count in sorted(tally.noised.items()):
        noised.add_metric(list(labels), count)
    states = GaugeMetricFamily("sonofed_jobs", "Jobs of the enclave.", labels=["state"])
    for state, count in Counter(jobs.states()).items():
        states.add_metric([state.name.lower()], count)
    return [messages, sent, noised, states]
