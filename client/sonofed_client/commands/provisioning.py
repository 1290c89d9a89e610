"""``sonofed-site init`` and ``install``: from nothing to an installed startup kit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sonofed_client.provisioning.kit import check_kit, install_kit, read_kit
from sonofed_client.provisioning.options import check_images, check_same, check_socket
from sonofed_client.provisioning.place import Hospital, RelaySettings
from sonofed_client.provisioning.programs import site_of
from sonofed_client.provisioning.request import make_request, replace_node_key
from sonofed_client.settings import MasterKeySource, SiteData, SiteSettings, read_site
from sonofed_common.cli import agreed_words
from sonofed_common.contract.configuration import validate
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.study import check_site_name
from sonofed_common.fingerprint import compare_words, words_of

Folder = Annotated[Path, typer.Option(help="Folder of the hospital's installation.")]


def init(
    name: Annotated[str, typer.Argument(help="The hospital's name, as the coordinator has it.")],
    folder: Folder = Path("site"),
    new_node_key: Annotated[
        bool, typer.Option("--new-node-key", help="Replace the node's key: after a revocation.")
    ] = False,
) -> None:
    """Make the hospital's keys here, and write the enrolment request for the coordinator."""
    try:
        check_site_name(name)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    hospital = Hospital(folder.resolve())
    if (installed := site_of(hospital)) not in (None, name):
        raise ConfigurationError(
            f"{hospital.root} is the installation of site {installed}; give another folder: "
            "--folder"
        )
    make = replace_node_key if new_node_key else make_request
    request = make(hospital, name)
    print(f"send the coordinator this file, in which no secret is: {hospital.request}")
    print(f"and read these words to them over the phone: {request.words}")


def install(
    kit: Annotated[Path, typer.Argument(help="The startup kit, a zip, from the coordinator.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder of the images; needed the first time.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="How the images are read: table (the default), busi ...")
    ] = None,
    folder: Folder = Path("site"),
    words: Annotated[
        str | None, typer.Option(help="What the coordinator read out; else it is asked for.")
    ] = None,
    health_port: Annotated[
        int | None, typer.Option(help="Loopback port of the supervisor; 9095 by default.")
    ] = None,
    simulated: Annotated[
        bool,
        typer.Option("--simulated", help="Answer labels from the data set; approve every study."),
    ] = False,
) -> None:
    """Check the startup kit, compare its fingerprint with the coordinator's, and lay it out."""
    hospital = Hospital(folder.resolve())
    read, files = read_kit(kit)
    if not check_kit(hospital, read):
        print(f"kit of project {read.project} for site {read.site}, contact {read.contact}")
        said = agreed_words(words, words_of(read.coordinator))
        compare_words(said, read.coordinator, "this kit's coordinator")
    images = None if data is None else data.resolve()
    if hospital.site.exists():
        settings = read_site(hospital.site)
        wanted = {"--data": images, "--kind": kind, "--simulated": simulated or None}
        written = {
            "--data": settings.data.path,
            "--kind": settings.data.kind,
            "--simulated": settings.oracle,
        }
        check_same(hospital.site, wanted, written)
    elif images is None:
        raise ConfigurationError("give the folder of the images: --data")
    else:
        settings = SiteSettings(
            name=read.site,
            store=hospital.store,
            data=SiteData(kind=kind or "table", path=images),
            coordinator_key=read.public_key,
            oracle=simulated,
            policy=hospital.policy,
            master_key=MasterKeySource(file=hospital.master_key),
            socket=hospital.socket,
            auto_approve=(read.public_key,) if simulated else (),
        )
        check_images(settings.data)
        check_socket(hospital.socket)
    if hospital.relay.exists():
        relay = hospital.relay_settings
        check_same(
            hospital.relay, {"--health-port": health_port}, {"--health-port": relay.health_port}
        )
    else:
        values = {} if health_port is None else {"health_port": health_port}
        relay = validate(RelaySettings, values, "the relay's settings")
    install_kit(hospital, read, files, settings, relay)
    print(f"site {read.site} is installed in {hospital.root}; next: sonofed-site up")
