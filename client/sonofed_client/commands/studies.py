"""``sonofed-site studies``: read what a study asks, and decide."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from sonofed_client.enclave.forecast import asks
from sonofed_client.enclave.policy import read_policy
from sonofed_client.enclave.store import open_store
from sonofed_client.enclave.studies import Studies
from sonofed_client.enclave.wall import open_ledger, open_studies
from sonofed_client.settings import read_site
from sonofed_common.contract.errors import ConfigurationError

app = typer.Typer(help="Studies that ask for this site's work.", no_args_is_help=True)
Site = Annotated[Path, typer.Option(help="The site's settings, a TOML file.")]
Which = Annotated[
    str, typer.Argument(help="Name of the study, or sha256: and the start of its digest.")
]
Digest = Annotated[str, typer.Argument(help="The digest that 'show' prints: sha256: and digits.")]


@app.callback()
def studies() -> None:
    """Read what studies ask, and approve or deny them."""


@app.command("list")
def list_studies(site: Site) -> None:
    """Print the studies that this site was asked to join, oldest first."""
    table = open_studies(read_site(site))
    known = table.known()
    for study in known:
        by = ", automatically" if study.decided_by == "automatic" else ""
        print(f"{study.state:<8}  {study.name}  {study.short_key}  seen {_when(study.seen)}{by}")
    table.check()
    if not known:
        print("no study has asked for this site's work")


@app.command()
def show(site: Site, study: Which) -> None:
    """Print what a study asks: its phases, what leaves in each, and all its settings."""
    settings = read_site(site)
    found = open_studies(settings).one(study)
    print(f"study {found.name}, {found.state}, digest {found.digest}")
    print(f"coordinator's key {found.coordinator}")
    if found.content is None:
        raise ConfigurationError(f"study {found.name} came without its content")
    print()
    pool = len(open_store(settings).images("pool"))
    for line in asks(found.content, read_policy(settings.policy), pool):
        print(line)
    print("\nThe study's settings:\n")
    for line in _settings(found.content.model_dump(mode="json")):
        print(line)
    print(f"\nTo approve this content: sonofed-site studies approve {found.key} --site {site}")


@app.command()
def approve(site: Site, digest: Digest) -> None:
    """Let a study work at this site: this content, of this coordinator's key, and no other."""
    approved = _deciding(site).approve(digest)
    print(f"study {approved.name} ({approved.short_key}) may work at this site")


@app.command()
def deny(site: Site, study: Which) -> None:
    """Refuse a content, or all contents of a name, also ones that were approved before."""
    for denied in _deciding(site).deny(study):
        print(f"study {denied.name} ({denied.short_key}) is refused from now on")


@app.command()
def forget(site: Site, study: Which) -> None:
    """Drop a content, or all contents of a name, and what was decided; they wait anew."""
    for gone in _deciding(site).forget(study):
        print(f"study {gone} is forgotten; if it asks again, it waits")


def _deciding(site: Path) -> Studies:
    settings = read_site(site)
    return open_studies(settings, open_ledger(open_store(settings)))


def _settings(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            # As JSON, whose escapes keep a stranger's control codes from the terminal.
            yield f"{prefix}{name} = {json.dumps(value)}"


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="minutes")
