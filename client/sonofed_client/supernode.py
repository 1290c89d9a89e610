"""Flower's SuperNode, asking for messages more often.

It rests for three seconds whenever no message waits, and for half a second at a time until a reply
is there: together most of what a short question costs. Its lines are those of all our processes.
Nothing else is changed.

Use: ``python -m sonofed_client.supernode [OPTIONS OF flower-supernode]``
"""

from __future__ import annotations

import time
from types import SimpleNamespace

from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode
from uvicorn.config import LOGGING_CONFIG

from sonofed_common.log import configure_as_told

LONGEST_REST = 0.5
SHORT_REST = 0.1


def rest(seconds: float) -> None:
    """Sleep as long as asked, but no longer than between two questions that we want."""
    time.sleep(min(seconds, LONGEST_REST if seconds > LONGEST_REST else SHORT_REST))


def main() -> None:
    """Run the SuperNode with the arguments of the command line."""
    LOGGING_CONFIG["loggers"]["uvicorn"] |= {"handlers": [], "propagate": True}
    configure_as_told()
    own = SimpleNamespace(**{**vars(time), "sleep": rest})
    vars(start_client_internal)["time"] = own
    flower_supernode()


if __name__ == "__main__":
    main()
