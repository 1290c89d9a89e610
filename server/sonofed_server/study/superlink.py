"""Flower's SuperLink, patient with its database, and with each signed request taken once.

It gives up when SQLite is locked for five seconds, which a slow or busy disk easily is, and answers
with an error that ends its own executors and nodes; why a request is taken once, see
`sonofed_server.study.once`. Nothing else is changed.

Use: ``python -m sonofed_server.study.superlink [OPTIONS OF flower-superlink]``
"""

from __future__ import annotations

from flwr.supercore import constant

from sonofed_server.study.once import once

PATIENCE = ("busy_timeout", "120000")
"""Milliseconds."""


def main() -> None:
    """Run the SuperLink with the arguments of the command line."""
    others = tuple(p for p in constant.SQLITE_PRAGMAS if p[0] != PATIENCE[0])
    vars(constant)["SQLITE_PRAGMAS"] = (PATIENCE, *others)
    # Only now: it copies the constant.
    from flwr.superlink.cli import flower_superlink
    from flwr.superlink.routers.fleet import node_auth

    vars(node_auth)["authenticate_node"] = once(node_auth.authenticate_node)

    flower_superlink()


if __name__ == "__main__":
    main()
