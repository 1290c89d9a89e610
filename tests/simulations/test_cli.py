import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sonofed_client.enclave.store import Store
from sonofed_client.settings import read_site
from sonofed_common.contract.results import read_results
from sonofed_simulations.cli import app

TINY = Path(__file__).parents[1] / "integration" / "tiny.toml"
REAL = "breast_three_countries"


def lab(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def sentence(result, code):
    """The one sentence of a command that failed: no traceback, nothing on stdout."""
    assert result.exit_code == code, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in result.stderr
    assert sum(text.startswith("error: ") for text in result.stderr.splitlines()) == 1
    assert result.stdout == ""
    return line


def tiny(tmp_path, old, new):
    """The tiny scenario with one change, as a file of its own."""
    text = TINY.read_text()
    assert old in text
    path = tmp_path / "scenario.toml"
    path.write_text(text.replace(old, new))
    return path


def test_help_and_no_arguments():
    assert lab("--help").exit_code == 0
    assert {"demo", "run", "compare", "scenarios"} <= set(lab("--help").stdout.split())


def test_scenarios_are_listed():
    result = lab("scenarios")
    assert result.exit_code == 0
    assert "demo" in result.stdout and REAL in result.stdout


def test_an_unknown_scenario(tmp_path):
    line = sentence(lab("run", "breast_three", "--out", tmp_path / "out"), 20)
    assert "breast_three" in line and REAL in line and "demo" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "key", "nearest"),
    [
        ("threads = 1\n\n[source]", "thread = 1\n\n[source]", "thread", "threads"),
        ("budgets", "budget", "study.selection.budget", "budgets"),
        ('scanner = "riverside"', 'scaner = "riverside"', "phantoms.scaner", "scanner"),
        ("epochs = 1, learning_rate = 1e-3, batch_size = 16", "epoch = 1", "epoch", "epochs"),
    ],
)
def test_an_unknown_key_in_a_scenario(tmp_path, old, new, key, nearest):
    scenario = tiny(tmp_path, old, new)
    line = sentence(lab("run", scenario, "--out", tmp_path / "out"), 20)
    assert "scenario.toml" in line and f"{key}'" in line and f"did you mean '{nearest}'?" in line


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('name = "tiny"', 'name = "tiny"\nhospitals = 4', "hospitals"),
        ('name = "tiny"', 'name = "tiny"\nsource = 3', "source"),
        ("cohort = { deadline_seconds = 500 }", "cohort = 3", "study.cohort"),
    ],
)
def test_a_number_where_a_section_belongs(tmp_path, old, new, key):
    text = TINY.read_text().replace(old, new)
    if "cohort" not in key:
        # TOML takes a name once: what the number replaces goes.
        text = re.sub(rf"^\[{key}[^\[]*", "", text, flags=re.M)
    scenario = tmp_path / "scenario.toml"
    scenario.write_text(text)
    line = sentence(lab("run", scenario, "--out", tmp_path / "out"), 20)
    assert key in line


def test_an_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "taken").touch()
    line = sentence(lab("run", TINY, "--out", tmp_path / "taken", "--engine", "inline"), 20)
    assert "taken is a file" in line


def test_an_unknown_comparison(tmp_path):
    line = sentence(lab("compare", "breast", "--out", tmp_path / "out"), 20)
    assert "'breast'" in line and "breast_selection" in line and "breast_segmentation" in line


def test_a_table_that_cannot_be_made(tmp_path):
    table, out = "adaptation-selection", ("--out", tmp_path / "out")
    assert table in sentence(lab("table", "selection", *out, "--quick"), 20)
    for named in (table, "aggregation", "synthetic-ratios"):
        for shard in ("5", "0/4", "5/4"):
            line = sentence(lab("table", named, *out, "--quick", "--shard", shard), 20)
            assert shard in line
    line = sentence(lab("table", table, *out, "--quick", "--shard", "1/2", "--workers", "2"), 20)
    assert "--shard" in line
    for spread in ((), ("--workers", "1")):
        assert "--data" in sentence(lab("table", table, *out, "--quick", *spread), 10)
    line = sentence(lab("table", table, *out, "--quick", "--data", tmp_path / "nowhere"), 10)
    assert "there is no folder" in line and "nowhere" in line
    (tmp_path / "taken").touch()
    for named in (table, "aggregation"):
        line = sentence(lab("table", named, "--out", tmp_path / "taken", "--quick"), 20)
        assert "taken is a file" in line


def test_an_unknown_scanner(tmp_path):
    scenario = tiny(tmp_path, 'scanner = "riverside"', 'scanner = "riverbank"')
    line = sentence(lab("run", scenario, "--out", tmp_path / "out"), 20)
    assert "riverbank" in line and "riverside" in line


def test_a_hospital_without_a_plain_name(tmp_path):
    scenario = tiny(tmp_path, "[hospitals.riverside]", '[hospitals."St. Mary/2"]')
    line = sentence(lab("run", scenario, "--out", tmp_path / "out"), 20)
    assert "'St. Mary/2' is no plain site name" in line


def test_real_data_that_was_not_given(tmp_path):
    line = sentence(lab("run", REAL, "--out", tmp_path / "out"), 10)
    assert "--data" in line and REAL in line


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_data_that_is_not_there(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    line = sentence(lab("run", REAL, "--out", tmp_path / "out", "--data", tmp_path / folder), 10)
    assert "Dataset_BUSI_with_GT" in line
    assert not (tmp_path / "out" / "coordinator.pem").exists()


@pytest.mark.parametrize("arguments", [("--engine", "magic"), ("--seed", "-1"), ()])
def test_arguments_that_do_not_fit(tmp_path, arguments):
    out = ("--out", tmp_path / "out") if arguments else ()
    result = lab("run", TINY, *out, *arguments)
    assert result.exit_code == 2 and "Traceback" not in result.stderr


def test_the_program_is_installed_and_exits_with_the_code(tmp_path):
    program = Path(sys.executable).with_name("sonofed-lab")
    if not program.exists():
        pytest.skip("the package is not installed")
    done = subprocess.run(
        [program, "run", "nowhere", "--out", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 20
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and line.endswith("[configuration]") and not done.stdout


@pytest.mark.slow
def test_a_run_survives_a_corrupt_image_and_reports_it_on_site(tmp_path, prepared):
    images = prepared / "phantoms" / "hillview" / "images"
    bad = sorted(images.glob("*.png"))[2]
    bad.write_bytes(b"no image")
    few = 'phases = ["enrol", "ship", "select", "annotate", "classifier"]'
    scenario = tiny(
        tmp_path,
        "selection = { budgets = [0.3, 0.6] }",
        f'{few}\nselection = {{ strategy = "random", budgets = [0.5] }}',
    )
    result = lab("run", scenario, "--out", prepared)
    assert result.exit_code == 0, result.output
    store = Store(read_site(prepared / "sites" / "hillview" / "site-0.toml").store)
    (skipped,) = store.get("intake").config["skipped"]
    assert skipped["name"] == f"images/{bad.name}"
    results = read_results(prepared / "results.json")
    hillview = results.sites["hillview"]
    assert hillview.images + hillview.test_images == 19 and results.engine == "inline"
    assert (prepared / "report.html").stat().st_size > 0
    events = [json.loads(line) for line in result.stderr.splitlines()]
    assert "study-completed" in {event["event"] for event in events}
    assert bad.name not in result.output


def test_a_changed_bundle_ends_the_run_with_its_sentence(prepared):
    blob = sorted((prepared / "source" / "blobs").iterdir())[0]
    blob.write_bytes(blob.read_bytes() + b"x")
    line = sentence(lab("run", TINY, "--out", prepared), 30)
    assert "delete the folder" in line and blob.exists()


def test_an_empty_site_ends_the_run_with_its_sentence(prepared):
    table = prepared / "phantoms" / "hillview" / "table.csv"
    rows = table.read_text().splitlines()
    normals = [",".join([*(c := r.split(","))[:2], "normal", *c[3:]]) for r in rows[1:]]
    table.write_text("\n".join([rows[0], *normals]))
    assert "hillview" in sentence(lab("run", TINY, "--out", prepared), 11)


def test_a_site_of_one_class_ends_the_run_with_its_sentence(prepared):
    table = prepared / "phantoms" / "hillview" / "table.csv"
    rows = table.read_text().splitlines()
    table.write_text("\n".join([rows[0], *(r for r in rows[1:] if r.split(",")[2] == "0")]))
    assert "hillview" in sentence(lab("run", TINY, "--out", prepared), 12)
    assert not (prepared / "results.json").exists()
