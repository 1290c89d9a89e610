from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import tomli_w
from PIL import Image
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

from sonofed_client.cli import app as site
from sonofed_client.enclave.enclave import InProcessEnclave
from sonofed_client.settings import read_site
from sonofed_common.contract.actions import Describe, request
from sonofed_common.contract.configuration import validate
from sonofed_common.contract.errors import CATALOGUE, StudyDeniedError, StudyWaitingError
from sonofed_common.contract.results import (
    SEGMENTATION_METRICS,
    SEGMENTATION_STAGES,
    ClassifierResults,
    Results,
    SiteResults,
)
from sonofed_common.contract.study import ACTIVE_LEARNING, PRESETS, SEGMENTATION, Cohort, Study
from sonofed_common.contract.study_segmentation import Strategy
from sonofed_common.data.readers import READERS, read
from sonofed_common.models.classifiers import CLASSIFIERS
from sonofed_common.models.encoders import ENCODERS
from sonofed_server.cli import app as coordinator
from sonofed_server.source.settings import PRESETS as SOURCE_PRESETS
from sonofed_server.source.settings import SourceSettings
from sonofed_simulations.cli import app as lab
from sonofed_simulations.phantoms.dataset import write_dataset
from sonofed_simulations.phantoms.scanner import SCANNERS
from sonofed_simulations.scenarios.scenario import Hospital, built_in, read_scenario

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESEARCHER = (ROOT / "docs" / "researcher.md").read_text(encoding="utf-8")
SECURITY = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
METHODS = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
PROGRAMS = {"sonofed-lab": lab, "sonofed-coordinator": coordinator, "sonofed-site": site}

RUN_EXAMPLE = "sonofed-lab run two_phantoms.toml --out runs/two_phantoms"
INTAKE_EXAMPLE = "sonofed-site intake runs/two_phantoms/sites/north/site-0.toml"
COMPARE_EXAMPLE = "sonofed-lab compare margin_or_random.toml --out runs/margin_or_random"
SEGMENTATION_EXAMPLE = "sonofed-lab run outlines.toml --out runs/two_branches"

HOSPITAL = (
    "sonofed-site intake site.toml",
    "sonofed-site policy check --site site.toml",
    "sonofed-site policy test study.toml --site site.toml",
    "sonofed-site studies list --site site.toml",
    "sonofed-site studies show trial --site site.toml",
    "sonofed-site studies approve sha256:DIGEST --site site.toml",
    "sonofed-site ledger show --site site.toml",
    "sonofed-site ledger verify --site site.toml",
    "sonofed-site ledger export ledger.jsonl --site site.toml",
    "sonofed-site studies deny trial --site site.toml",
    "sonofed-site store rotate-key site.toml",
)

FORGET = "sonofed-site studies forget trial --site site.toml"

SMALL = tuple(read_scenario("deployment").hospitals)

DEPLOYMENT = {
    "sonofed-coordinator init project.toml": "provisioning",
    "sonofed-site init north --folder site": "provisioning",
    "sonofed-coordinator enrol request.json": "provisioning",
    "sonofed-site install north.zip --folder site --data /srv/ultrasound": "provisioning",
    "sonofed-site check --folder site": "deployment",
    "sonofed-coordinator up --detach": "deployment",
    "sonofed-coordinator check": "deployment",
    "sonofed-site up --detach --folder site": "deployment",
    "sonofed-coordinator status": "deployment",
    "sonofed-site status --folder site": "deployment",
    "sonofed-coordinator study check study.toml --bundle bundle": "deployment",
    "sonofed-coordinator study run study.toml --bundle bundle --follow": "deployment",
    "sonofed-coordinator study status tiny": "deployment",
    "sonofed-coordinator study report tiny": "deployment",
    "sonofed-coordinator study list": "deployment",
    "sonofed-coordinator study stop tiny": "deployment",
    "sonofed-coordinator study resume tiny": "deployment",
    "sonofed-site down --folder site": "deployment",
    "sonofed-coordinator down": "deployment",
}
"""Commands of a deployment, and which of the integration tests runs each."""

ONE_MACHINE = (
    "sonofed-lab prepare deployment --out .",
    "sonofed-coordinator source train source.toml --data phantoms "
    "--key coordinator/coordinator.pem --out bundle",
    "sonofed-coordinator provision project.toml --all --data phantoms --simulated",
    "sonofed-coordinator study report deployment | tee report.txt",
    *(f"sonofed-site up --detach --folder sites/{name}" for name in SMALL),
    *(f"sonofed-site check --folder sites/{name}" for name in SMALL),
    *(f"sonofed-site down --folder sites/{name}" for name in SMALL),
    "make deploy-demo",
)

FILTER = (
    "jq -c 'select(.study == \"tiny\" and .round == 1)' site/run/enclave.log site/run/supernode.log"
)

COVERED = {
    FILTER: "tests/integration/test_deployment.py",
    **dict.fromkeys(ONE_MACHINE, "tests/integration/test_deploy_demo.py"),
    **{c: f"tests/integration/test_{name}.py" for c, name in DEPLOYMENT.items()},
    **dict.fromkeys((*HOSPITAL, FORGET), "here"),
    "sonofed-site enclave --site site.toml": "tests/integration/test_enclave_process.py",
    "make demo": "tests/integration/test_demo.py",
    "make test": "this is it",
    "sonofed-lab scenarios": "here",
    "sonofed-lab run demo --out runs/demo-inline --engine inline": (
        "options, here; a smaller scenario runs inline in tests/simulations/test_cli.py"
    ),
    "sonofed-lab run breast_three_countries --data DATA --out runs/breast": (
        "options, here; its data is read in tests/common/data"
    ),
    "sonofed-lab run breast_two_views --data DATA --out runs/two-views": (
        "options, here; validated in tests/common/test_presets.py, and a smaller one runs in "
        "tests/integration/test_two_views.py"
    ),
    "sonofed-lab compare breast_selection --data DATA --out runs/selection": (
        "options, here; validated in tests/simulations/test_comparison.py"
    ),
    "sonofed-lab table adaptation-selection --data DATA --out runs/selection-table --quick": (
        "options, here; a table of phantoms is made in tests/simulations/test_selection_table.py"
    ),
    "sonofed-lab table selection-from-rio --data DATA --out runs/selection-from-rio --quick": (
        "options, here; its scenario is read in tests/simulations/test_scenarios.py"
    ),
    "sonofed-lab table aggregation --data DATA --out runs/aggregation-table --quick": (
        "options, here; cells of phantoms are made in tests/simulations/test_aggregation_table.py"
    ),
    **dict.fromkeys(
        (
            f"sonofed-lab table {name} --data DATA --out runs/{name} --quick"
            for name in (
                "synthetic-domains",
                "synthetic-ratios",
                "synthetic-all",
                "synthetic-federated",
            )
        ),
        "options, here; tables of drawn images are made in tests/simulations/test_synthetic_*.py",
    ),
    **dict.fromkeys(
        (
            f"sonofed-lab table {name} --data DATA --out runs/{name} --quick"
            for name in ("pseudo-labels", "target-informed")
        ),
        "options, here; restricted and written in tests/simulations/test_mask_table.py",
    ),
    **dict.fromkeys(
        (
            f"sonofed-lab table {name} --data DATA --out runs/{name} --quick"
            for name in (
                "adaptation-reconstruction",
                "adaptation-homogenisation",
                "adaptation-ablation",
            )
        ),
        "options, here; made whole of phantoms in tests/simulations/test_redrawn_tables.py",
    ),
    "sonofed-lab run phantom_multiclass --out runs/organs": (
        "options, here; laid out in tests/simulations/test_scenarios.py; a smaller one runs here"
    ),
    "sonofed-lab run breast_segmentation --data DATA --out runs/outlines": (
        "options, here; validated in tests/simulations/test_scenarios.py"
    ),
    "sonofed-lab page runs/organs runs/outlines --out runs/outlines.md": (
        "options, here; runs in tests/simulations/test_report_segmentation.py"
    ),
    "sonofed-lab compare breast_segmentation --data DATA --out runs/methods": (
        "options, here; validated in tests/simulations/test_comparison.py"
    ),
    SEGMENTATION_EXAMPLE: "here",
    RUN_EXAMPLE: "here",
    INTAKE_EXAMPLE: "here",
    COMPARE_EXAMPLE: "here",
    "sonofed-coordinator source train SOURCE.toml --data DATA --out bundle": (
        "options and settings, here; runs in tests/server/test_source.py"
    ),
}
"""How each command of the pages is kept working."""


def commands() -> list[str]:
    pages = [page.read_text(encoding="utf-8") for page in PAGES]
    blocks = [b for page in pages for b in re.findall(r"```(?:console|sh)\n(.*?)```", page, re.S)]
    return [line for block in blocks for line in block.splitlines() if line]


def blocks(language: str) -> list[str]:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", RESEARCHER, re.S)
    return found


def example(line: str) -> str:
    (block,) = [block for block in blocks("toml") if line in block.splitlines()]
    return block


def invoke(command: str) -> str:
    program, *words = shlex.split(command)
    result = CliRunner().invoke(PROGRAMS[program], words)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_command_is_covered() -> None:
    assert set(commands()) == set(COVERED)


def test_options_are_known() -> None:
    for command in commands():
        program, *words = shlex.split(command)
        if program not in PROGRAMS:
            continue
        verbs = [w for w in words if not w.startswith("-")]
        depth = 1 if program == "sonofed-lab" else 2
        arguments = [*verbs[:depth], "--help"]
        help_text = CliRunner().invoke(PROGRAMS[program], arguments, env={"COLUMNS": "200"})
        assert help_text.exit_code == 0, command
        for option in (w for w in words if w.startswith("--")):
            assert option in re.sub(r"\x1b\[[0-9;]*m", "", help_text.output), command


def test_scenarios_are_listed() -> None:
    output = invoke("sonofed-lab scenarios")
    rows = re.findall(r"^\| `(\w+)` \|", RESEARCHER.split("## Read the results")[0], re.M)
    assert sorted(rows) == sorted(built_in()) and all(name in output for name in rows)


@pytest.mark.slow
def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("two_phantoms", "margin_or_random"):
        (tmp_path / f"{name}.toml").write_text(example(f'name = "{name}"'), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    invoke(RUN_EXAMPLE)
    out = tmp_path / "runs" / "two_phantoms"
    assert (out / "report.html").is_file() and (out / "results.json").is_file()
    assert "images of" in invoke(INTAKE_EXAMPLE)
    assert "margin" in invoke(COMPARE_EXAMPLE)
    out = tmp_path / "runs" / "margin_or_random"
    assert (out / "comparison.md").is_file() and (out / "comparison.json").is_file()


@pytest.mark.slow
def test_the_example_of_segmentation_and_of_its_ensemble_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "outlines.toml").write_text(example('name = "outlines"'), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert "Dice" in invoke(SEGMENTATION_EXAMPLE)
    (code,) = blocks("python")
    names: dict[str, Any] = {}
    exec(code, names)
    assert "torch.Size([4, 32, 32])" in capsys.readouterr().out
    assert len(names["ensemble"].branches) == len(names["prediction"].weights) == 2
    assert int(names["prediction"].mask.max()) <= 1


def test_a_hospital_can_do_what_its_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = re.findall(r"```toml\n(name = \"north\".*?)```", SECURITY, re.S)
    for path in ("/var/lib", "/run", "/etc", "/srv"):
        block = block.replace(f'"{path}/', f'"{tmp_path}{path}/')
    images = tmp_path / "srv" / "ultrasound"
    write_dataset(images, SCANNERS["riverside"], 20, 5, 64, 0.4)
    monkeypatch.chdir(tmp_path)
    Path("site.toml").write_text(block, encoding="utf-8")
    key = tmp_path / "etc" / "sonofed" / "master.key"
    key.parent.mkdir(parents=True)
    key.write_text("ab" * 32, encoding="utf-8")
    study = Study(name="trial", cohort=Cohort(sites=("north",)), classifiers=("shufflenet_v2",))
    values = study.model_dump(mode="json", exclude_none=True)
    Path("study.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
    settings = read_site(Path("site.toml"))
    facts = {"study": "trial", "seed": study.seed, "study_digest": study.digest()}
    asked = request(Describe(**facts, content=study))
    with pytest.raises(StudyWaitingError):
        InProcessEnclave(settings).perform("query.describe", asked)
    said = {c: invoke(c.replace("DIGEST", study.digest())) for c in HOSPITAL}
    assert "to choose from" in said[HOSPITAL[0]]
    assert "trial" in said["sonofed-site studies list --site site.toml"]
    assert "labels asked" in said["sonofed-site studies show trial --site site.toml"]
    assert "refused" in said["sonofed-site ledger show --site site.toml"]
    assert Path("ledger.jsonl").read_text(encoding="utf-8").count("\n") > 2
    assert key.read_text(encoding="utf-8").strip() != "ab" * 32
    with pytest.raises(StudyDeniedError):
        InProcessEnclave(settings).perform("query.describe", asked)
    assert "is forgotten" in invoke(FORGET)
    with pytest.raises(StudyWaitingError):
        InProcessEnclave(settings).perform("query.describe", asked)


def test_the_example_of_own_images_is_read(tmp_path: Path) -> None:
    (table,) = blocks("csv")
    (tmp_path / "table.csv").write_text(table, encoding="utf-8")
    for file in re.findall(r"\w+/\d+\.png", table):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / file)
    reading = read("table", tmp_path)
    assert reading.skipped == () and [s.label for s in reading.samples] == [0, 1, None]
    values = tomllib.loads(example("[hospitals.mine]"))["hospitals"]["mine"]
    hospital = validate(Hospital, values, "mine")
    assert {s.device for s in reading.samples} >= set(hospital.devices)


def test_the_example_of_a_source_is_valid() -> None:
    validate(SourceSettings, tomllib.loads(example('name = "cairo"')), "cairo")


def test_the_example_of_our_own_method_is_valid() -> None:
    values = tomllib.loads(example('preset = "sonofed"'))
    validate(SourceSettings, {"name": "cairo", **values["source"]}, "source")
    cohort = {"sites": ["north"]}
    study = validate(Study, {"name": "ours", "cohort": cohort, **values["study"]}, "study")
    assert set(study.classifiers) <= set(values["source"]["classifiers"])
    assert study.selection.strategy == "typiclust" and f"`{study.preset}`" in METHODS


def test_names_that_can_be_chosen_are_documented() -> None:
    assert all(f"`{name}`" in RESEARCHER for name in (*READERS, *SCANNERS))
    assert all(f"`{name}`" in METHODS for name in (*CLASSIFIERS, *ENCODERS))
    section = METHODS.split("## 8. ")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.M)[1:] == list(get_args(Strategy))


def test_phases_of_segmentation_are_documented() -> None:
    line = METHODS.split("Phases of segmentation: ")[1].split(". ")[0]
    assert re.findall(r"`(\w+)`", line) == list(SEGMENTATION)


def test_exit_codes_are_the_catalogue() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d+) \|", RESEARCHER, re.M)
    assert {code: int(number) for code, number in rows} == {
        code: error.exit_code for code, error in CATALOGUE.items()
    }


def test_fields_of_the_results_are_the_schema() -> None:
    section = RESEARCHER.split("## Read the results")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", section, re.M)
    documented = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(documented) == sorted(Results.model_fields)
    for model in (SiteResults, ClassifierResults):
        assert all(f"`{name}`" in section for name in model.model_fields)
    assert all(f"`{name}`" in section for name in (*SEGMENTATION_STAGES, *SEGMENTATION_METRICS))


def fields(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every option of a model and of the models inside it, by its dotted key."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        listed = get_origin(field.annotation) is tuple
        kinds = [] if listed else [field.annotation, *get_args(field.annotation)]
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        if inner:
            found |= fields(inner[0], f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


@pytest.mark.parametrize(
    ("title", "model", "presets"),
    [
        ("Of the study", Study, PRESETS),
        ("Of the source", SourceSettings, SOURCE_PRESETS),
        ("Of a scenario's hospital", Hospital, {"paper": {}}),
    ],
)
def test_option_tables_are_the_models(
    title: str, model: type[BaseModel], presets: dict[str, Any]
) -> None:
    table = METHODS.split(f"\n{title}")[1].split("\n\n")[1]
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \|(?: (.*?) ?\|)?$", table, re.M)
    known = fields(model)
    assert [key for key, _, _ in rows] == list(dict.fromkeys(key for key, _, _ in rows))
    assert {key for key, _, _ in rows} == known.keys()
    paper = {f"{s}.{k}": v for s, values in presets["paper"].items() for k, v in values.items()}
    assert paper.keys() <= known.keys()
    for key, default, by_paper in rows:
        field = known[key]
        if key == "phases":
            assert re.findall(r"`(\w+)`", default) == list(field.default)
            assert field.default == ACTIVE_LEARNING
        elif field.is_required() or field.default_factory or field.default is None:
            assert "`" not in default or "with" in default, key
        else:
            assert default == f"`{field.default}`", key
        assert by_paper == (f"`{paper[key]}`" if key in paper else ""), key


def test_links_resolve() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
