"""`sonofed-coordinator`: train a source model and launch federated studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sonofed_common.cli import application
from sonofed_common.progress import progress_listener
from sonofed_common.runtime import Events
from sonofed_common.security import load_or_create_signing_key, public_hex
from sonofed_server.commands import study
from sonofed_server.commands.deployment import check, conduct, down, status, up
from sonofed_server.commands.provisioning import enrol, init, provision, renew, revoke

app = application("Train a source model and launch federated studies with hospitals.")
source = typer.Typer(help="Models trained on labelled source data.", no_args_is_help=True)
app.add_typer(source, name="source")
for command in (init, enrol, provision, revoke, renew, check, up, down, status):
    app.command()(command)
app.command(hidden=True)(conduct)
app.add_typer(study.app, name="study")

KEY = Path(typer.get_app_dir("sonofed")) / "coordinator.pem"


@source.command()
def train(
    settings: Annotated[Path, typer.Argument(help="Source file, TOML.", metavar="SOURCE.toml")],
    out: Annotated[Path, typer.Option(help="Folder of the bundle.")],
    data: Annotated[
        Path | None, typer.Option(help="Data folder; default: the folder of the source file.")
    ] = None,
    key: Annotated[Path, typer.Option(help="Signing key, PEM; made there if there is none.")] = KEY,
) -> None:
    """Train classifiers and diffusion stack on labelled data, and write the signed bundle.

    The same command after an interruption goes on where it stopped.
    """
    from sonofed_server.source.settings import read_source
    from sonofed_server.source.training import train_source

    wanted = read_source(settings)
    signing_key = load_or_create_signing_key(key)
    with progress_listener() as listener:
        events = Events(listeners=[listener])
        train_source(wanted, data or settings.parent, out, signing_key, events)
    print(f"bundle: {out}\ncoordinator's public key: {public_hex(signing_key)}")
