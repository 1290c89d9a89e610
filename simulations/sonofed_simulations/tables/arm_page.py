"""The page of a table of arms: README.md, table.csv, table.json and the differences' figure."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.table import Table

from sonofed_common.runtime import write_atomically
from sonofed_simulations.tables.arm_findings import NAMES, Claim, findings
from sonofed_simulations.tables.arm_summary import METRICS, ArmRow, ArmSummary
from sonofed_simulations.tables.forest import LEGEND, forest
from sonofed_simulations.tables.manifest import MADE_OF
from sonofed_simulations.tables.pages import contrast_text, interval_text, markdown, number_text

FIGURE = "differences.svg"
FACTS = "Means over seeds; a whole number that differs between seeds stands for each of them."


@dataclass(frozen=True)
class About:
    """What a page says beside its numbers.

    Attributes
    ----------
    title : str
        Of the page.
    work : str
        The source work: what, by whom, where.
    claims : tuple of Claim
        Its effects, which the page's one paragraph judges.
    published : str
        What the column of published numbers holds, with its unit.
    focus : str
        Test site, or `MEAN`, of the first table and the figure.
    method, adapted : tuple of str
        List items: how the cells were made, and what differs from the work.
    """

    title: str
    work: str
    claims: tuple[Claim, ...]
    published: str
    focus: str
    method: tuple[str, ...]
    adapted: tuple[str, ...]


def summary_table(summary: ArmSummary, about: About) -> Table:
    """Return the rows at the focus, for a terminal: what the page has, less what is too wide."""
    shown = ("accuracy", "auroc")
    table = Table("arm", "seeds", *(NAMES[m] for m in shown), "against", "AUROC over it")
    for row in summary.rows:
        values, gains = row.values[about.focus], row.differences.get(about.focus, {})
        table.add_row(
            row.arm,
            str(row.seeds),
            *(f"{values[m].value:.3f}" for m in shown),
            row.against or "",
            contrast_text(gains.get("auroc")),
        )
    return table


def write_page(summary: ArmSummary, about: About, out: Path) -> None:
    """Write the page into a folder."""
    values = json.dumps(summary.model_dump(mode="json"), indent=1)
    write_atomically(out / "table.json", f"{values}\n".encode())
    write_atomically(out / "table.csv", _csv(summary).encode())
    if _compared(summary, about):
        write_atomically(out / FIGURE, _figure(summary, about))
    write_atomically(out / "README.md", ("\n".join(_page(summary, about)) + "\n").encode())


def _page(summary: ArmSummary, about: About) -> list[str]:
    machine = summary.machine
    lines = [
        f"# {about.title}",
        "",
        f"After {about.work}.",
        "",
        findings(summary, about.claims),
        "",
        "## Beside the published numbers",
        "",
        *markdown(_header(about), (_cells(row, about) for row in summary.rows)),
        "",
        f"Our numbers ({about.focus}) are means over seeds, with intervals from 2,000 bootstrap "
        "samples of the test patients. Differences are in the same samples, on the seeds that both "
        "arms have; p is two-sided, and Holm's correction is over the column. d: Cohen's d of the "
        "seeds' AUROC differences, from three seeds on; higher: seeds in which the arm's AUROC is "
        "the higher one. The intervals hold the chance of the test patients, not that of training: "
        "read them beside d and the seeds.",
        "",
        "## By site",
        "",
        *_by_site(summary),
    ]
    if any(row.gap for row in summary.rows):
        lines += ["", "## Gap between home and the other sites", "", *_gaps(summary)]
    if _compared(summary, about):
        lines += ["", "## Differences", "", f"![Differences]({FIGURE})", "", LEGEND]
    if any(row.facts for row in summary.rows):
        lines += ["", "## What else the cells tell", "", *_facts(summary), "", FACTS]
    if summary.refused:
        lines += ["", "## Refused by the memorisation gate", ""]
        lines += [f"- {one}" for one in summary.refused]
    lines += [
        "",
        "## How it was made",
        "",
        *(f"- {item}" for item in about.method),
        f"- {summary.cells} of {summary.wanted} cells have run, {summary.seconds / 3600:.2f} hours "
        f"of training and prediction on {machine.cpu}, {machine.cores} cores, {machine.device}. "
        f"{MADE_OF}",
        "",
        "## What is adapted",
        "",
        *(f"- {item}" for item in about.adapted),
    ]
    return lines


def _header(about: About) -> tuple[str, ...]:
    names = [f"{NAMES[metric]} (95%)" for metric in METRICS]
    gains = [f"{NAMES[metric]} over it (95%), p Holm" for metric in METRICS]
    return ("arm", "seeds", about.published, *names, "against", *gains, "d", "higher")


def _cells(row: ArmRow, about: About) -> list[str]:
    values = row.values.get(about.focus, {})
    gains = row.differences.get(about.focus, {})
    auroc = gains.get("auroc")
    return [
        row.arm,
        str(row.seeds),
        row.published,
        *(interval_text(values[m]) if m in values else "" for m in METRICS),
        row.against or "",
        *(contrast_text(gains.get(metric)) for metric in METRICS),
        "" if auroc is None else number_text(auroc.effect, "+.2f"),
        "" if auroc is None else f"{auroc.higher} of {auroc.seeds}",
    ]


def _by_site(summary: ArmSummary) -> list[str]:
    header = ("arm", *(f"{site}: {NAMES[m]}" for site in summary.sites for m in METRICS))
    rows = [
        [
            row.arm,
            *(
                interval_text(row.values[site][m]) if site in row.values else ""
                for site in summary.sites
                for m in METRICS
            ),
        ]
        for row in summary.rows
    ]
    return markdown(header, rows)


def _gaps(summary: ArmSummary) -> list[str]:
    header = ("arm", *(NAMES[metric] for metric in METRICS))
    rows = [
        [row.arm, *(interval_text(row.gap[m], "+.3f") for m in METRICS)]
        for row in summary.rows
        if row.gap
    ]
    return markdown(header, rows)


def _facts(summary: ArmSummary) -> list[str]:
    names = sorted({name for row in summary.rows for name in row.facts})
    rows = [
        [row.arm, *(_fact(row.facts.get(name, ())) for name in names), f"{row.seconds:.0f}"]
        for row in summary.rows
    ]
    return markdown(("arm", *names, "seconds a cell"), rows)


def _fact(by_seed: Sequence[float]) -> str:
    if not by_seed:
        return ""
    if len(set(by_seed)) > 1 and all(float(value).is_integer() for value in by_seed):
        return ", ".join(f"{value:.0f}" for value in by_seed)
    return number_text(fmean(by_seed), ".4g")


def _compared(summary: ArmSummary, about: About) -> list[ArmRow]:
    return [row for row in summary.rows if about.focus in row.differences]


def _figure(summary: ArmSummary, about: About) -> bytes:
    rows = _compared(summary, about)
    panels = {
        f"{NAMES[metric]}, {about.focus}": [row.differences[about.focus][metric] for row in rows]
        for metric in ("accuracy", "auroc")
    }
    return forest([f"{row.arm}  -  {row.against}" for row in rows], panels, 8.6)


def _csv(summary: ArmSummary) -> str:
    """One line an arm, site and metric."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(
        ["arm", "seeds", "site", "metric", "value", "low", "high", "against", "difference",
         "difference_low", "difference_high", "p", "p_holm", "d", "seeds_higher", "seeds_paired"]
    )  # fmt: skip
    for row in summary.rows:
        for site, metrics in row.values.items():
            for metric, found in metrics.items():
                line: list[object] = [row.arm, row.seeds, site, metric]
                line += [found.value, found.low, found.high, row.against]
                gain = row.differences.get(site, {}).get(metric)
                if gain is not None:
                    line += [gain.value, gain.low, gain.high, gain.p, gain.p_holm]
                    line += [gain.effect, gain.higher, gain.seeds]
                else:
                    line += [None] * 8
                writer.writerow([f"{v:.5f}" if isinstance(v, float) else v for v in line])
    return buffer.getvalue()
