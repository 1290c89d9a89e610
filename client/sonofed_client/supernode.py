"""Flower's SuperNode, asking for messages more often and more patient with a slow link.

It rests for three seconds whenever no message waits, and for half a second at a time until a reply
is there: together most of what a short question costs. It gives an answer thirty seconds to come,
in which the two pieces of 5 MB that it sends at a time cross no link below 3 Mbit/s, and sends them
again for ever. Nothing else is changed.

Use: ``python -m sonofed_client.supernode [OPTIONS OF flower-supernode]``
"""

from __future__ import annotations

import time
from types import SimpleNamespace

import httpx
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode

LONGEST_REST = 0.5
SHORT_REST = 0.1
PATIENCE = httpx.Timeout(180.0, connect=30.0)


def rest(seconds: float) -> None:
    """Sleep as long as asked, but no longer than between two questions that we want."""
    time.sleep(min(seconds, LONGEST_REST if seconds > LONGEST_REST else SHORT_REST))


def main() -> None:
    """Run the SuperNode with the arguments of the command line."""
    own = SimpleNamespace(**{**vars(time), "sleep": rest})
    vars(start_client_internal)["time"] = own
    # Heartbeats have a time of their own.
    defaults = ProtobufClient.__init__.__kwdefaults__
    assert defaults is not None
    defaults["timeout"] = PATIENCE
    flower_supernode()


if __name__ == "__main__":
    main()
