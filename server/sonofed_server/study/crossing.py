"""What crosses the front, as its log tells it: the only progress of a long exchange."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

IDLE = ("/v1/fleet/pull-messages", "/v1/fleet/send-node-heartbeat")
"""Calls that come while nothing moves; what a message holds is asked for by calls of its own."""

BLOCK_BYTES = 65_536
LONGEST_BYTES = 256 * BLOCK_BYTES
"""Of the log, read from its end: an exchange that logs more is told too little of."""


def bytes_since(log: Path, since: float) -> int:
    """Return the bytes of all requests and answers that ended since a time.

    Parameters
    ----------
    log : Path
        The front's, one JSON object a line; absent where the front was never up.
    since : float
        Seconds since the epoch.

    Returns
    -------
    int
        Of all hospitals and studies. A request is counted when it ends, and arrays are sent as
        requests of little over 7 MB.
    """
    total = 0
    for line in _backwards(log):
        try:
            entry = json.loads(line)
            ended = datetime.fromisoformat(entry["time"]).timestamp()
            size = 0 if entry["path"] in IDLE else int(entry["in"]) + int(entry["out"])
        except (ValueError, KeyError, TypeError):
            # Cut off by the kill of a front.
            continue
        # The log's times are whole seconds.
        if ended < int(since):
            break
        total += size
    return total


def _backwards(log: Path) -> Iterator[bytes]:
    """Yield the lines of a file from its last."""
    try:
        file = log.open("rb")
    except OSError:
        return
    with file:
        end = file.seek(0, 2)
        first, begun = max(0, end - LONGEST_BYTES), b""
        while end > first:
            start = max(first, end - BLOCK_BYTES)
            file.seek(start)
            begun, *lines = (file.read(end - start) + begun).split(b"\n")
            yield from (line for line in reversed(lines) if line)
            end = start
        if begun and first == 0:
            yield begun
