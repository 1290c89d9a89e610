"""``sonofed-site ledger``: what left this site, what was refused, and that nobody changed it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from sonofed_client.enclave.ledger import Ledger
from sonofed_client.enclave.store import open_store
from sonofed_client.enclave.wall import open_ledger
from sonofed_client.settings import read_site

app = typer.Typer(help="What left the site and what was refused.", no_args_is_help=True)
Site = Annotated[Path, typer.Option(help="The site's settings, a TOML file.")]


@app.callback()
def ledger() -> None:
    """Read and check the site's ledger."""


@app.command()
def show(
    site: Site,
    last: Annotated[int, typer.Option(min=1, help="How many of the latest entries.")] = 20,
    study: Annotated[str | None, typer.Option(help="Entries of this study only.")] = None,
    keys: Annotated[bool, typer.Option(help="Name every record of a message.")] = False,
) -> None:
    """Print the latest entries, oldest first."""
    entries = [e for e in _open(site).entries() if study is None or e["study"] == study]
    for entry in entries[-last:]:
        print(_line(entry))
        for name, kind, shape in entry["records"] if keys else ():
            print(f"    {_plain(name)} {kind} {'x'.join(map(str, shape))}".rstrip())
    sent = [e for e in entries if e["outcome"] == "sent"]
    total = sum(e["bytes"] for e in sent)
    held = sum(max(1, e["repeats"]) for e in entries if e["outcome"] == "refused")
    print(f"{len(sent)} messages of {total} bytes left, {held} were refused")


@app.command()
def verify(site: Site) -> None:
    """Check every entry and the head; name the first that was edited, deleted, moved or cut."""
    opened = _open(site)
    count = opened.verify()
    print(f"{count} entries, all sound and in order; public key {opened.public_key}")
    head = opened.head()
    print(f"head {head}: write it down elsewhere, and a later ledger must still hold it")


@app.command()
def export(
    site: Site, out: Annotated[Path, typer.Argument(help="JSON-lines file to write.")]
) -> None:
    """Write all entries with hashes, signatures and the public key, for an auditor."""
    print(f"{_open(site).export(out)} entries written to {out}")


def _open(site: Path) -> Ledger:
    return open_ledger(open_store(read_site(site)))


def _line(entry: dict[str, Any]) -> str:
    when = datetime.fromtimestamp(entry["time"]).astimezone().isoformat(timespec="seconds")
    about = " ".join(_plain(entry[k]) for k in ("study", "action") if entry[k])
    parts = [f"{entry['number']:>6}  {when}  {entry['outcome']:<8}  {about}"]
    if entry["round"] is not None:
        parts.append(f"round {entry['round']}")
    if entry["outcome"] == "sent":
        parts.append(f"{entry['bytes']} bytes, sha256 {entry['sha256'][:12]}")
    if entry["repeats"]:
        parts.append(f"{entry['repeats']} more within a minute")
    parts += [f"{name} {value:g}" for name, value in entry["privacy"].items()]
    if entry["rule"]:
        parts.append(f"rule {_plain(entry['rule'])}")
    if entry["message"]:
        parts.append(_plain(entry["message"]))
    return "; ".join(parts)


def _plain(text: str) -> str:
    # Names of the wire could carry a terminal's control codes.
    return text if text.isprintable() else ascii(text)[1:-1]
