"""``sonofed-site studies``: read what a study asks, and decide."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sonofed_client.enclave.forecast import asks
from sonofed_client.enclave.ledger import Entry
from sonofed_client.enclave.policy import read_policy
from sonofed_client.enclave.store import open_store
from sonofed_client.enclave.studies import KnownStudy
from sonofed_client.enclave.wall import open_ledger, open_studies
from sonofed_client.settings import read_site
from sonofed_common.contract.errors import ConfigurationError

app = typer.Typer(help="Studies that ask for this site's work.", no_args_is_help=True)
Site = Annotated[Path, typer.Option(help="The site's settings, a TOML file.")]
Which = Annotated[str, typer.Argument(help="Name of the study, or the start of its digest.")]


@app.callback()
def studies() -> None:
    """Read what studies ask, and approve or deny them."""


@app.command("list")
def list_studies(site: Site) -> None:
    """Print the studies that this site was asked to join, oldest first."""
    settings = read_site(site)
    known = open_studies(settings).known()
    for study in known:
        print(f"{study.state:<8}  {study.name}  {study.digest[:12]}  seen {_when(study.seen)}")
    if not known:
        print("no study has asked for this site's work")


@app.command()
def show(site: Site, study: Which) -> None:
    """Print what a study asks: its phases, what leaves in each, and all its settings."""
    settings = read_site(site)
    found = open_studies(settings).find(study)
    print(f"study {found.name}, {found.state}, digest {found.digest}")
    print(f"coordinator's key {found.coordinator}")
    if found.content is None:
        raise ConfigurationError(f"study {found.name} came without its content")
    print()
    for line in asks(found.content, read_policy(settings.policy)):
        print(line)
    print("\nThe study's settings:\n")
    for line in _settings(found.content.model_dump(mode="json")):
        print(line)


@app.command()
def approve(site: Site, study: Which) -> None:
    """Let a study work at this site: this content, of this coordinator's key, and no other."""
    _decide(site, study, "approved")


@app.command()
def deny(site: Site, study: Which) -> None:
    """Refuse a study, also one that was approved before."""
    _decide(site, study, "denied")


def _decide(site: Path, key: str, state: Literal["approved", "denied"]) -> None:
    settings = read_site(site)
    ledger = open_ledger(open_store(settings))
    decided = open_studies(settings).decide(key, state)
    rule = f"coordinator {decided.coordinator}"
    ledger.append(Entry(outcome=state, study=decided.name, study_digest=decided.digest, rule=rule))
    print(_sentence(decided))


def _settings(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            # As JSON, whose escapes keep a stranger's control codes from the terminal.
            yield f"{prefix}{name} = {json.dumps(value)}"


def _sentence(study: KnownStudy) -> str:
    if study.state == "approved":
        return f"study {study.name} ({study.digest[:12]}) may work at this site"
    return f"study {study.name} ({study.digest[:12]}) is refused from now on"


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="minutes")
