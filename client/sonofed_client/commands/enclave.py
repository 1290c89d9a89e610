"""``sonofed-site enclave``: the process that owns the images, behind its socket."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from sonofed_client.enclave.isolation import enter, way_out, with_key
from sonofed_client.enclave.lock import alone
from sonofed_client.settings import SiteSettings, read_site
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.log import configure

WARNING = (
    "the enclave of site {} runs WITHOUT network isolation: this process, which reads the images, "
    "{}; {}"
)
UNABLE = "start it as root, allow user namespaces, or use the systemd unit's PrivateNetwork=yes"

log = logging.getLogger(__name__)


def enclave(
    site: Annotated[Path, typer.Option(help="The site's settings, a TOML file.")],
    no_isolation: Annotated[
        bool, typer.Option("--no-isolation", help="Stay on the network, for example to debug.")
    ] = False,
) -> None:
    """Answer the site's relay on a unix socket, without a network, until ended."""
    settings = read_site(site)
    configure("enclave", site=settings.name)
    if settings.socket is None:
        raise ConfigurationError(f"{site.name} names no socket; add: socket = '/run/...'")
    if not no_isolation:
        enter(settings)
    settings = with_key(settings)
    # Nothing that this process writes is for anyone else, whoever started it.
    os.umask(0o077)
    with alone(settings.store):
        _answer(settings, "--no-isolation was given" if no_isolation else UNABLE)
    # A job that runs now is taken up by the next enclave; its thread is not waited for.
    sys.stdout.flush()
    os._exit(0)


def _answer(settings: SiteSettings, why_not: str) -> None:
    # Only now: torch and the models load once, in the process that stays.
    from sonofed_client.enclave.enclave import InProcessEnclave
    from sonofed_client.enclave.entry import Entry
    from sonofed_client.enclave.jobs import Jobs
    from sonofed_client.enclave.metrics import keep_written
    from sonofed_client.enclave.room import Room
    from sonofed_client.enclave.server import Service, serve, wait_for_the_end
    from sonofed_common.contract.records import HEADER_BYTES

    assert settings.socket is not None
    enclave = InProcessEnclave(settings)
    open_way = way_out()
    if open_way:
        log.warning(WARNING.format(settings.name, open_way, why_not))
        note = f"the enclave runs without network isolation: it {open_way}; {why_not}"
        enclave.ledger.append(Entry(outcome="note", message=note))
    jobs = Jobs(enclave, enclave.site.store, lambda: enclave.site.snapshot)
    enclave.site.events.listeners.append(jobs.progress)
    # What is larger than the policy takes is not even read.
    room = Room(enclave.policy.received_bytes + HEADER_BYTES)
    server = serve(Service(enclave, jobs, enclave.ledger, room), settings.socket)
    # Not before: while the socket is made, files are made with its mode.
    jobs.start()
    keep_written(enclave.ledger, jobs, settings.socket)
    how = "NOT isolated" if open_way else "without a network"
    log.info("the enclave of site %s answers, %s", settings.name, how)
    wait_for_the_end(server)
    enclave.ledger.settle()
