"""``sonofed-coordinator study``: check, run, follow, stop, resume and report studies."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from sonofed_common.contract.errors import ConfigurationError, DeploymentError, error_from_code
from sonofed_common.contract.results import read_results
from sonofed_common.contract.study import read_study
from sonofed_common.supervision.supervisor import find_status, left_running
from sonofed_server.commands.provisioning import DEFAULT, Project
from sonofed_server.provisioning.project import Coordinator, read_coordinator
from sonofed_server.study import desk
from sonofed_server.study.hindrance import hindrance
from sonofed_server.study.standing import Standing, standing
from sonofed_server.study.summary import summary

app = typer.Typer(help="Studies with the enrolled hospitals.", no_args_is_help=True)
File = Annotated[Path, typer.Argument(help="The study's file, TOML.", metavar="STUDY.toml")]
Bundle = Annotated[Path, typer.Option(help="Folder of the source's signed bundle.")]
SourceFile = Annotated[
    Path | None, typer.Option(help="The source's file, of a study that works on its data.")
]
SourceData = Annotated[
    Path | None, typer.Option(help="Folder of the source's data; default: beside its file.")
]
Name = Annotated[str, typer.Argument(help="The study's name.")]
Follow = Annotated[bool, typer.Option("--follow", help="Print progress until it ends.")]
FOLLOW_SECONDS = 1.0
SECONDS = re.compile(r"-?\d+ s\b")
"""What changes in a line while nothing happens, and is left out of what `_follow` compares."""

STOP_SECONDS = 120.0
"""How long the conductor may take to end a study's process: it may wait for the SuperLink."""


@app.callback()
def study() -> None:
    """Launch studies and look after them."""


@app.command()
def check(
    study: File,
    bundle: Bundle,
    source: SourceFile = None,
    data: SourceData = None,
    project: Project = DEFAULT,
) -> None:
    """Say before it starts whether a study can."""
    coordinator, where = read_coordinator(project), _source(source, data)
    for line in desk.check(coordinator, read_study(study), bundle, where):
        print(line)


@app.command()
def run(
    study: File,
    bundle: Bundle,
    source: SourceFile = None,
    data: SourceData = None,
    project: Project = DEFAULT,
    follow: Follow = False,
) -> None:
    """Run a study; it survives the end of this command, of any process, and a restart."""
    coordinator = read_coordinator(project)
    entry = desk.put_on(coordinator, study, bundle, _source(source, data))
    _begin(coordinator, entry, follow)


@app.command("list")
def list_studies(project: Project = DEFAULT) -> None:
    """Print the studies and their states."""
    for entry in desk.entries(read_coordinator(project)):
        print(f"{entry.state:<10} {entry.name}")


@app.command()
def status(
    name: Name,
    project: Project = DEFAULT,
    follow: Follow = False,
    json: Annotated[bool, typer.Option("--json", help="For machines: an object a line.")] = False,
) -> None:
    """Say where a study stands: phase, round, hospitals, bytes, time left."""
    coordinator = read_coordinator(project)
    entry = desk.find(coordinator, name)
    if follow:
        _follow(coordinator, entry, _objects if json else _lines)
        return
    now = _standing(coordinator, entry)
    print(now.model_dump_json() if json else "\n".join(now.lines()))


@app.command()
def resume(name: Name, project: Project = DEFAULT, follow: Follow = False) -> None:
    """Go on with a study that was stopped or has failed, from its last finished round."""
    coordinator = read_coordinator(project)
    entry = desk.find(coordinator, name)
    desk.check_bundle(entry)
    entry.workspace.failure.unlink(missing_ok=True)
    _begin(coordinator, entry, follow)


@app.command()
def stop(name: Name, project: Project = DEFAULT) -> None:
    """Stop a study after its last finished round; `resume` goes on from there."""
    coordinator = read_coordinator(project)
    entry = desk.find(coordinator, name)
    if entry.state in ("completed", "failed"):
        raise ConfigurationError(f"study {name} is {entry.state}; there is nothing to stop")
    entry.want(desk.Wish(wanted="stop"))
    _check_up(coordinator)
    until = time.monotonic() + STOP_SECONDS
    while entry.state == "running":
        if time.monotonic() > until:
            raise DeploymentError(
                f"study {name} still runs; it stops as soon as the conductor comes to it, see "
                f"{coordinator.run / 'conductor.log'}"
            )
        time.sleep(FOLLOW_SECONDS / 4)
    print(f"study {name} is {entry.state}")


@app.command()
def report(name: Name, project: Project = DEFAULT) -> None:
    """Print what a completed study found, and where its results are."""
    entry = desk.find(read_coordinator(project), name)
    if entry.state != "completed":
        raise ConfigurationError(f"study {name} is {entry.state}; it has no results yet")
    for line in summary(read_results(entry.workspace.results)):
        print(line)
    print(f"results: {entry.workspace.results}\nmodel: {entry.workspace.final_bundle}")


def _source(file: Path | None, data: Path | None) -> desk.Source | None:
    if file is not None:
        return file, data or file.parent
    if data is not None:
        raise ConfigurationError(
            f"--data {data} is the data of a source that is not named; name its file by --source, "
            "or leave --data out"
        )
    return None


def _begin(coordinator: Coordinator, entry: desk.Entry, follow: bool) -> None:
    if entry.state == "completed":
        print(f"study {entry.name} is completed; see its report")
        return
    if entry.state == "failed":
        raise ConfigurationError(f"study {entry.name} has failed; resume it")
    if entry.state != "running":
        entry.want(desk.Wish())
    _check_up(coordinator)
    print(f"study {entry.name} runs; see: sonofed-coordinator study status {entry.name}")
    if follow:
        _follow(coordinator, entry)


def _lines(now: Standing) -> dict[str, str]:
    return {SECONDS.sub("", line): line for line in now.lines()}


def _objects(now: Standing) -> dict[str, str]:
    return {now.model_dump_json(exclude={"seconds_left", "asked_seconds"}): now.model_dump_json()}


def _follow(
    coordinator: Coordinator,
    entry: desk.Entry,
    words: Callable[[Standing], dict[str, str]] = _lines,
) -> None:
    said: dict[str, str] = {}
    while True:
        now = _standing(coordinator, entry)
        lines = words(now)
        for told, line in lines.items():
            if told not in said:
                print(line, flush=True)
        said = lines
        if (failure := entry.failure) is not None and now.state == "failed":
            raise error_from_code(failure.error, failure.message)
        if now.state in ("completed", "stopped"):
            return
        _check_up(coordinator)
        time.sleep(FOLLOW_SECONDS)


def _standing(coordinator: Coordinator, entry: desk.Entry) -> Standing:
    now = standing(entry, coordinator.front_log)
    if now.state != "waiting":
        return now
    return now.model_copy(update={"reason": hindrance(coordinator, entry.name)})


def _check_up(coordinator: Coordinator) -> None:
    if find_status(coordinator.run, "the coordinator") is not None:
        return
    if left := left_running(coordinator.run):
        raise DeploymentError(
            f"the coordinator's supervisor was killed, and {', '.join(left)} run on without it; "
            "end them and start it again: sonofed-coordinator up"
        )
    raise DeploymentError(
        "the coordinator is not up, and no study runs meanwhile; start it: sonofed-coordinator up"
    )
