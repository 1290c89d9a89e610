"""``sonofed-site store``: the encrypted store and its master key."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from sonofed_client.enclave.keys import KeyRing
from sonofed_client.enclave.master_key import MasterKey
from sonofed_client.settings import MasterKeySource, read_site
from sonofed_common.contract.configuration import validate

app = typer.Typer(help="The site's encrypted store and its keys.", no_args_is_help=True)


@app.callback()
def store() -> None:
    """Look after the site's encrypted store and its keys."""


@app.command("rotate-key")
def rotate_key(
    settings: Annotated[Path, typer.Argument(help="The site's settings, a TOML file.")],
    file: Annotated[Path | None, typer.Option(help="File that holds the new key.")] = None,
    environment: Annotated[
        str | None, typer.Option(help="Environment variable that holds the new key, hex.")
    ] = None,
    command: Annotated[
        str | None, typer.Option(help="Command that prints the new key, hex; no shell runs it.")
    ] = None,
) -> None:
    """Wrap the store's keys by a new master key; a running enclave need not stop.

    Without an option a new key is made in the place of the old one, where that is a file.
    """
    site = read_site(settings)
    ring = KeyRing.open(site.store, MasterKey.of(site))
    words = None if command is None else tuple(shlex.split(command))
    given = {"file": file, "environment": environment, "command": words}
    values = {name: value for name, value in given.items() if value is not None}
    if not values:
        ring.rotate()
        print(f"site {site.name} has a new master key in the place of the old one")
        return
    ring.rotate(MasterKey(validate(MasterKeySource, values, "the new master key")))
    print(
        f"the store of site {site.name} opens with the new master key only; name it in "
        f"[master_key] of {settings.name}, which names the old one"
    )
