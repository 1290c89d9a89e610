"""A table's page of prose and numbers: README.md, table.csv, table.json and its figures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sonofed_common.runtime import write_atomically
from sonofed_server.study.report import this_machine
from sonofed_simulations.tables.manifest import MADE_OF

Row = Mapping[str, str | float | int | None]


@dataclass(frozen=True)
class Article:
    """What a page says.

    Attributes
    ----------
    title, work : str
        Of the page, and what it is after.
    found : str
        The one paragraph, computed from the numbers.
    sections : mapping of str to sequence of str
        Lines under each heading.
    method, adapted : sequence of str
        List items: how it was made, and what differs from the work.
    rows : sequence of mapping
        All numbers, with the same names in every row.
    figures : mapping of str to bytes
        SVG by the file's name.
    """

    title: str
    work: str
    found: str
    sections: Mapping[str, Sequence[str]]
    method: Sequence[str]
    adapted: Sequence[str]
    rows: Sequence[Row]
    figures: Mapping[str, bytes]


def write_article(article: Article, out: Path) -> None:
    """Write the page into a folder."""
    values = json.dumps(list(article.rows), indent=1)
    write_atomically(out / "table.json", f"{values}\n".encode())
    write_atomically(out / "table.csv", _csv(article.rows).encode())
    for name, figure in article.figures.items():
        write_atomically(out / name, figure)
    write_atomically(out / "README.md", ("\n".join(_page(article)) + "\n").encode())


def _page(article: Article) -> list[str]:
    machine = this_machine()
    lines = [f"# {article.title}", "", f"After {article.work}.", "", article.found]
    for heading, section in article.sections.items():
        lines += ["", f"## {heading}", "", *section]
    return [
        *lines,
        "",
        "## How it was made",
        "",
        *(f"- {item}" for item in article.method),
        f"- {machine.cpu}, {machine.cores} cores, {machine.device}. {MADE_OF}",
        "",
        "## What is adapted",
        "",
        *(f"- {item}" for item in article.adapted),
    ]


def _csv(rows: Sequence[Row]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(rows[0] if rows else [])
    for row in rows:
        writer.writerow([f"{v:.5f}" if isinstance(v, float) else v for v in row.values()])
    return buffer.getvalue()
