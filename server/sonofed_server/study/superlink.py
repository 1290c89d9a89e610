"""Flower's SuperLink, patient with its database, and with each signed request taken once.

It gives up when SQLite is locked for five seconds, which a slow or busy disk easily is, and answers
with an error that ends its own executors and nodes; why a request is taken once, see
`sonofed_server.study.once`. Weights are long: its database has large pages, and requests are read
whole (`sonofed_server.study.bodies`). Its lines are those of all our processes. Nothing else is
changed.

Use: ``python -m sonofed_server.study.superlink [OPTIONS OF flower-superlink]``
"""

from __future__ import annotations

from typing import Any

from flwr.supercore import constant, http_logging

from sonofed_common.log import configure_as_told
from sonofed_server.study.bodies import WholeBodies
from sonofed_server.study.once import once

PRAGMAS = {"page_size": "65536", "busy_timeout": "120000", "wal_autocheckpoint": "1024"}
"""Bytes, which a database keeps that has others; milliseconds; pages."""


def as_all_others(uvicorn: dict[str, Any]) -> dict[str, Any]:
    """Have the HTTP server log by the process's own handler; routine calls stay out as before."""
    loggers = uvicorn["loggers"]
    for name in ("uvicorn", "uvicorn.access"):
        loggers[name] |= {"handlers": [], "propagate": True}
    loggers["uvicorn.access"]["filters"] = ["routine_access"]
    return {**uvicorn, "handlers": {}, "formatters": {}}


def main() -> None:
    """Run the SuperLink with the arguments of the command line."""
    others = tuple(p for p in constant.SQLITE_PRAGMAS if p[0] not in PRAGMAS)
    # Ours first: pages have their size before the database has a journal.
    vars(constant)["SQLITE_PRAGMAS"] = (*PRAGMAS.items(), *others)
    its_own = http_logging.get_uvicorn_log_config
    vars(http_logging)["get_uvicorn_log_config"] = lambda level: as_all_others(its_own(level))
    configure_as_told()
    # Only now: it copies what was changed.
    from flwr.superlink import main as superlink
    from flwr.superlink.cli import flower_superlink
    from flwr.superlink.routers.fleet import node_auth

    vars(node_auth)["authenticate_node"] = once(node_auth.authenticate_node)
    create = superlink.create_app

    def create_app(*given: Any) -> Any:
        app = create(*given)
        app.add_middleware(WholeBodies)
        return app

    vars(superlink)["create_app"] = create_app

    flower_superlink()


if __name__ == "__main__":
    main()
