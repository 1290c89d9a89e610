"""Whether the coordinator let this hospital's node in, and in words why it did not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

NOT_KNOWN = (
    "the coordinator does not know this node's key: it is not enrolled yet, or was revoked; ask "
    "the coordinator (for a minute after a node was killed, this passes by itself)"
)
"""Flower's answer is the same to a stranger and to who still counts as connected."""

log = logging.getLogger(__name__)


def refusal(heartbeat: Path) -> Path:
    """Return what is there, beside the file of heartbeats, from a refusal to the next answer."""
    return heartbeat.with_suffix(".refused")


def note_refusal(heartbeat: Path | None) -> None:
    """Say that the coordinator refused this node, also to who asks while it starts anew.

    Parameters
    ----------
    heartbeat : Path or None
        The file of heartbeats; it goes, and a mark of the refusal is made beside it.
    """
    log.error(NOT_KNOWN)
    if heartbeat is not None:
        refusal(heartbeat).touch(mode=0o600)
        heartbeat.unlink(missing_ok=True)


def note_answer(heartbeat: Path) -> None:
    """Say that the coordinator answered this node."""
    heartbeat.touch(mode=0o600)
    refusal(heartbeat).unlink(missing_ok=True)


def explain_refusal(heartbeat: Path | None) -> None:
    """Have Flower's connection, in this process, say in words that the node is not let in.

    Parameters
    ----------
    heartbeat : Path or None
        See `note_refusal`.
    """
    # Who asks only how a node is needs nothing of Flower.
    from flwr.supercore.error import ApiErrorCode
    from flwr.supernode import fleet_http_connection

    code = f"[code: {ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED.value}]"
    theirs = vars(fleet_http_connection)
    its_own = theirs["flwr_exit"]

    def end(number: int, message: str | None = None, **others: Any) -> None:
        if message is None or code not in message:
            its_own(number, message, **others)
        note_refusal(heartbeat)
        raise SystemExit(1)

    theirs["flwr_exit"] = end
