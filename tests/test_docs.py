from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sonofed_common.contract.errors import CATALOGUE
from sonofed_common.contract.study import PRESETS, Cohort, Study
from sonofed_common.models.classifiers import CLASSIFIERS
from sonofed_server.cli import app as coordinator
from sonofed_simulations.cli import app as lab

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESEARCHER = (ROOT / "docs" / "researcher.md").read_text(encoding="utf-8")
METHODS = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")

COVERED = {
    "make demo": "tests/integration/test_study.py runs both engines on a smaller scenario",
    "make test": "this is it",
    "sonofed-lab scenarios": "here",
    "sonofed-lab run demo --out runs/demo-inline --engine inline": "options, here",
    "sonofed-lab run breast_three_countries --data DATA --out runs/breast": "options, here",
    "sonofed-lab compare breast_selection --data DATA --out runs/selection": "options, here",
    "sonofed-lab run two_phantoms.toml --out runs/two_phantoms": "here",
    "sonofed-coordinator source train SOURCE.toml --data DATA --out bundle": (
        "options, here; runs in tests/server/test_source.py"
    ),
}


def commands() -> list[str]:
    blocks = [
        b for page in PAGES for b in re.findall(r"```console\n(.*?)```", page.read_text(), re.S)
    ]
    return [line for block in blocks for line in block.splitlines() if line]


def test_every_command_is_covered() -> None:
    assert set(commands()) == set(COVERED)


def test_options_are_known() -> None:
    for command in commands():
        program, *words = shlex.split(command)
        app = {"sonofed-lab": lab, "sonofed-coordinator": coordinator}.get(program)
        if app is None:
            continue
        verbs = [w for w in words if not w.startswith("-")]
        depth = 2 if program == "sonofed-coordinator" else 1
        help_text = CliRunner().invoke(app, [*verbs[:depth], "--help"], env={"COLUMNS": "200"})
        assert help_text.exit_code == 0, command
        for option in (w for w in words if w.startswith("--")):
            assert option in re.sub(r"\x1b\[[0-9;]*m", "", help_text.output), command


def test_scenarios_are_listed() -> None:
    result = CliRunner().invoke(lab, ["scenarios"])
    assert result.exit_code == 0
    assert "demo" in result.output and "breast_three_countries" in result.output


@pytest.mark.slow
def test_the_example_scenario_runs(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", RESEARCHER, re.S)
    (tmp_path / "two_phantoms.toml").write_text(example, encoding="utf-8")
    out = tmp_path / "runs"
    result = CliRunner().invoke(
        lab, ["run", str(tmp_path / "two_phantoms.toml"), "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert (out / "report.html").is_file() and (out / "results.json").is_file()


def test_exit_codes_are_the_catalogue() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d+) \|", RESEARCHER, re.M)
    assert {code: int(number) for code, number in rows} == {
        code: error.exit_code for code, error in CATALOGUE.items()
    }


def test_option_table_is_the_model() -> None:
    rows = re.findall(r"^\| `([a-z_]+)\.([a-z_]+)` \| (.*?) \| (.*?) ?\|$", METHODS, re.M)
    study = Study(name="x", cohort=Cohort(sites=("a",)))
    sections = {section: getattr(study, section) for section in dict.fromkeys(r[0] for r in rows)}
    documented = {(section, key) for section, key, _, _ in rows}
    assert documented == {
        (s, key) for s, model in sections.items() for key in type(model).model_fields
    }
    for section, key, default, paper in rows:
        value: Any = getattr(sections[section], key)
        if value is not None:
            assert default == f"`{value}`", (section, key)
        assert paper == (
            f"`{PRESETS['paper'][section][key]}`"
            if key in PRESETS["paper"].get(section, {})
            else ""
        ), (section, key)


def test_classifiers_are_documented() -> None:
    assert all(f"`{name}`" in METHODS for name in CLASSIFIERS)


def test_links_resolve() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
