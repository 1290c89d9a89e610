"""The hospital's command, ``sonofed-site``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sonofed_client.commands import ledger, policy, store, studies
from sonofed_client.commands.deployment import check, down, status, up
from sonofed_client.commands.enclave import enclave
from sonofed_client.commands.provisioning import init, install
from sonofed_client.enclave.store import open_store
from sonofed_client.settings import read_site
from sonofed_common.cli import application

app = application("Run a hospital's side of federated ultrasound studies.")
for group in (policy, ledger, studies, store):
    app.add_typer(group.app, name=group.__name__.rpartition(".")[2])
for command in (init, install, check, up, down, status, enclave):
    app.command()(command)


@app.callback()
def site() -> None:
    """Run a hospital's side of federated ultrasound studies."""


@app.command()
def intake(
    settings: Annotated[Path, typer.Argument(help="The site's settings, a TOML file.")],
) -> None:
    """Read the site's images anew and report what is usable and what was passed over, and why."""
    # The other commands need no torch, and start faster without.
    from sonofed_client.enclave.intake import take_in

    read = read_site(settings)
    kept_images = open_store(read)
    take_in(read, kept_images, again=True)
    for part, use in (("pool", "to choose from"), ("test", "to test on")):
        images = kept_images.images(part)
        patients = len({image.group for image in images})
        malignant = sum(image.label == 1 for image in images)
        print(f"{len(images)} images of {patients} patients {use}, {malignant} malignant")
    kept = kept_images.get("intake")
    facts = kept.config if kept else {"skipped": [], "excluded": {}}
    for reason, count in facts["excluded"].items():
        print(f"left out {count} images: {reason}")
    for skipped in facts["skipped"]:
        print(f"skipped {skipped['name']}: {skipped['reason']}")
