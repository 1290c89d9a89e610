"""``sonofed-site policy``: what this site's policy says, and what it would refuse of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sonofed_client.enclave.forecast import GOES_ON, declines, explain, refusals
from sonofed_client.enclave.policy import read_policy, running_policy
from sonofed_client.settings import read_site
from sonofed_common.contract.errors import PolicyError
from sonofed_common.contract.study import read_study

app = typer.Typer(help="The site's egress policy.", no_args_is_help=True)
Site = Annotated[Path, typer.Option(help="The site's settings, a TOML file.")]


@app.callback()
def policy() -> None:
    """Explain and try the site's egress policy."""


@app.command()
def check(site: Site) -> None:
    """Say in words what the policy lets in and out."""
    settings = read_site(site)
    read = read_policy(settings.policy)
    read.check_coordinator(settings.coordinator_key)
    for line in explain(read):
        print(line)
    running = running_policy(settings.store)
    if running is None:
        print("no enclave of this site has started yet")
    elif running == read.digest():
        print("the enclave holds this policy")
    else:
        print(f"NOTE: the enclave holds another policy, digest {running}; start it again for this")


@app.command()
def test(
    site: Site, study: Annotated[Path, typer.Argument(help="The study's file, TOML.")]
) -> None:
    """Say before a study starts what the policy would refuse of it, and why."""
    settings = read_site(site)
    read = read_policy(settings.policy)
    read.check_coordinator(settings.coordinator_key)
    asked = read_study(study)
    found, spared = refusals(asked, read), declines(asked, read)
    for line in found:
        print(line)
    if spared:
        print(f"{GOES_ON}:", *spared, sep="\n")
    if found:
        raise PolicyError(f"the policy '{read.name}' would refuse study {asked.name}")
    more = " more" * bool(spared)
    print(f"the policy '{read.name}' refuses nothing{more} that study {asked.name} is known to ask")
