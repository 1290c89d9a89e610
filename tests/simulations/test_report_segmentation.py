from __future__ import annotations

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.results import (
    METRICS,
    SEGMENTATION_METRICS,
    ClassifierResults,
    Results,
    SegmentationStage,
    SiteResults,
    gain,
    write_results,
)
from sonofed_common.contract.study import SEGMENTATION, Study
from sonofed_simulations.cli import app
from sonofed_simulations.report.masks import branch_colours, cases, choose, class_colours
from sonofed_simulations.report.outlines import outlines, write_outlines
from sonofed_simulations.report.page import build_report
from sonofed_simulations.report.segmentation import (
    compared_hospitals,
    key_stages,
    mask_comparisons,
    worst_hospital,
)
from sonofed_simulations.report.segmentation_summary import mask_explanation, mask_headline
from sonofed_simulations.report.table import tabulate
from sonofed_simulations.report.view import SegmentationView

NAMES = ("North", "St. <b>Mary</b> & Sons")
LIFTS = {"source": (0.52, 0.61), "bn_adapted": (0.6, 0.64), "ensemble": (0.73, 0.7)}


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


def measures(dice: float) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    values = {"dice": dice, "nsd": 0.456, "hd95": 12.34, "ece": 0.078}
    for name in SEGMENTATION_METRICS:
        value = values[name]
        found |= {name: value, f"{name}_low": value - 0.02, f"{name}_high": value + 0.02}
    return found


def results(
    dice: dict[Any, tuple[float, ...]] = LIFTS, names: tuple[str, ...] = NAMES, **changes: Any
) -> Results:
    study = Study.model_validate(
        {"name": "organs", "phases": SEGMENTATION, "cohort": {"sites": ["North", "Mary", "Gone"]}}
    )
    sites = {
        name: SiteResults(
            images=145,
            test_masks=37,
            segmentation={stage: measures(values[i]) for stage, values in dice.items()},
        )
        for i, name in enumerate(names)
    }
    sites["Gone"] = SiteResults(images=50, missing_reason="no answer in time")
    values: dict[str, Any] = {
        "study": "organs",
        "study_digest": study.digest(),
        "seed": 3,
        "engine": "in-process",
        "started": "2026-01-02T03:04:05Z",
        "seconds": 245.0,
        "sites": sites,
        "missing_sites": ("Gone",),
        "settings": study.model_dump(mode="json"),
    }
    return Results(**{**values, **changes})


def view(name: str = "North", count: int = 9, size: int = 32, **changes: Any) -> SegmentationView:
    generator = np.random.default_rng(len(name))
    truth = np.zeros((count, size, size), dtype=np.uint8)
    truth[:, 8:20, 8:20] = 1
    values: dict[str, Any] = {
        "name": name,
        "images": generator.integers(0, 255, truth.shape, dtype=np.uint8),
        "truth": truth,
        "source": np.roll(truth, 6, axis=2),
        "ours": np.roll(truth, 2, axis=2),
        "confidence": generator.random(truth.shape),
        "weights": generator.random((2, *truth.shape)),
        "branches": ("source", "target"),
        "dice_source": np.full(count, 0.31),
        "dice_ours": np.linspace(0.1, 0.9, count),
    }
    return SegmentationView(**{**values, **changes})


def page(tmp_path: Path, found: Results, views: list[SegmentationView] | None = None) -> Page:
    return Page(build_report(found, tmp_path, (), None, views or ()))


def test_a_study_of_masks_only_has_a_page_of_its_own(tmp_path: Path) -> None:
    found = page(tmp_path, results())
    for fact in (*NAMES, "Gone", "no answer in time", "1 Segmentation", "2 How it ran", "37"):
        assert fact in found.text
    for number in (".52", ".50 to .54", ".73", "+.21", ".46", "12.3", ".08", ".56", ".72"):
        assert number in found.text
    for absent in ("AUROC", "Labelled by experts", "redraw", "Which images were chosen"):
        assert absent not in found.text
    assert "1/64 of the image's side (2 px)" in found.text
    assert "counts Dice 0, surface Dice 0 and a Hausdorff distance of the image's" in found.text
    assert len(found.images) == 1
    assert "stay in the hospitals" in found.text


def test_page_is_one_file_that_needs_nothing_else(tmp_path: Path) -> None:
    found = page(tmp_path, results(), [view(name) for name in NAMES])
    assert not {tag for tag, _ in found.tags} & {"link", "script", "iframe"}
    for tag, attributes in found.tags:
        address = attributes.get("src") or attributes.get("href") or "#"
        assert address.startswith("data:" if tag == "img" else "#")
    assert all(image["alt"] for image in found.images)
    assert all(suffix not in found.text for suffix in (".png", ".jpg", ".tif", ".dcm"))
    assert len(found.images) == 1 + len(NAMES) * 4 * 6
    assert "stay in the hospitals" not in found.text
    assert "target-informed" in found.text and "Dice .31 → .90" in found.text


def test_same_study_gives_the_same_bytes(tmp_path: Path) -> None:
    paths = [build_report(results(), tmp_path / run, (), None, [view()]) for run in ("a", "b")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_both_tracks_stand_on_one_page(tmp_path: Path) -> None:
    auroc: dict[str, float | None] = dict.fromkeys(METRICS, 0.87)
    classifier = ClassifierResults(source=dict.fromkeys(METRICS, 0.66), adapted=auroc)
    masks = results()
    sites = dict(masks.sites)
    sites["North"] = sites["North"].model_copy(update={"classifiers": {"resnet18": classifier}})
    both = masks.model_copy(update={"sites": sites})
    found = page(tmp_path, both, [view()])
    for fact in ("1 Before and after", "4 Segmentation", "see section 5", ".87", "rose from .52"):
        assert fact in found.text
    printed = printout(both)
    assert "Source AUROC" in printed and "Over BN" in printed


@given(
    st.lists(
        st.one_of(st.just(float("nan")), st.floats(0, 1).map(lambda v: round(v, 2))), max_size=30
    )
)
def test_pictures_are_chosen_by_rank(values: list[float]) -> None:
    dice = np.array(values, dtype=np.float64)
    chosen = choose(dice)
    known = np.sort(dice[np.isfinite(dice)])
    indices = [index for _, index in chosen]
    assert len(set(indices)) == len(indices) == min(4, len(known))
    assert np.isfinite(dice[indices]).all()
    places = {label: dice[index] for label, index in chosen}
    if len(known):
        assert places["worst"] == known[0]
        assert dice[indices].max() == known[-1]
    if len(known) > 4:
        ranks = {"lower quartile": 0.25, "median": 0.5}
        for label, share in ranks.items():
            nearest = known[np.abs(np.arange(len(known)) - share * (len(known) - 1)) <= 0.5]
            assert places[label] in nearest


def test_cases_tell_the_dice_of_the_images_that_they_show() -> None:
    dice = np.array([0.5, np.nan, 0.9, 0.1, 0.3])
    shown = cases(view(count=5, dice_ours=dice, dice_source=np.array([0, 1, np.nan, 3, 4])), 1)
    told = [(case.label, case.dice_source, case.dice_ours) for case in shown]
    expected = [("worst", 3, 0.1), ("lower quartile", 4, 0.3), ("median", 0, 0.5)]
    assert told == [*expected, ("best", None, 0.9)]


def tile(case: Any, column: str) -> np.ndarray[Any, Any]:
    encoded = dict(case.tiles)[column].removeprefix("data:image/jpeg;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded)))).astype(int)


def test_tiles_show_outlines_and_the_trusted_branch() -> None:
    weights = np.zeros((2, 1, 32, 32))
    weights[0, :, :, :16] = 3.0
    weights[1, :, :, 16:] = 0.2
    black = np.zeros((1, 32, 32), dtype=np.uint8)
    (case,) = cases(view(count=1, images=black, weights=weights), 1)
    assert tile(case, "Image").max() < 8
    expert = np.argwhere(tile(case, "Expert").sum(axis=2) > 200) / 8
    assert np.abs(expert.min(axis=0) - 8).max() < 0.6
    assert np.abs(expert.max(axis=0) - 20).max() < 0.6
    trusted = tile(case, "Trusted")
    colours = [colour for colour, _ in branch_colours(("source", "target"))]
    for colour, columns in zip(colours, (slice(8, 100), slice(150, 248)), strict=True):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert np.abs(trusted[:, columns].mean(axis=(0, 1)) - rgb).max() < 4


def test_one_branch_leaves_nothing_to_trust(tmp_path: Path) -> None:
    single = view(weights=np.ones((1, 9, 32, 32)), branches=("source",))
    assert [name for name, _ in cases(single, 1)[0].tiles][-1] == "Confidence"
    assert "trusted:" not in page(tmp_path, results(), [single]).text


def test_classes_have_names_and_colours_of_their_own(tmp_path: Path) -> None:
    assert len(set(class_colours(12))) == 12
    three = view(truth=np.repeat(view().truth * 3, 1, axis=0))
    text = page(tmp_path, results(), [three]).text
    assert "class 3" in text and "class 4" not in text
    assert "class 1" not in page(tmp_path, results(), [view()]).text


def test_views_may_hold_nothing_to_outline(tmp_path: Path) -> None:
    empty = view(dice_ours=np.full(9, np.nan), truth=np.zeros((9, 32, 32), dtype=np.uint8))
    found = page(tmp_path, results(), [empty, view("None", 0)])
    assert len(found.images) == 1
    assert "Not ranked, as nothing is there to outline: 9." in found.text


def test_view_of_uneven_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"site 'North' has 'weights' of shape \(3, 9, 32, 32\)"):
        view(weights=np.zeros((3, 9, 32, 32)))


def test_gains_and_worst_match_their_definition() -> None:
    found = results()
    *_, mean, worst = mask_comparisons(found)
    assert mean.gain is not None and mean.gain.value == pytest.approx(0.715 - 0.565)
    assert mean.gain_over_control is not None
    assert mean.gain_over_control.value == pytest.approx(0.715 - 0.62)
    assert [e.value for e in worst.dice.values() if e] == [0.52, 0.6, 0.7]
    assert worst_hospital(found, "bn_adapted", "hd95") is not None
    first = next(mask_comparisons(found))
    assert first.gain == gain(first.dice["source"], first.dice["ensemble"])


def test_result_is_the_last_stage_even_where_another_did_better() -> None:
    found = results({"source": (0.7, 0.7), "infusion": (0.8, 0.8), "adapted": (0.6, 0.79)})
    assert key_stages(found) == ("source", "adapted")
    assert "fell from .70 to .60" in mask_headline(found)
    told = " ".join(mask_explanation(found))
    assert "worse than the source's weights at North" in told
    assert "this may be chance" in told


@pytest.mark.parametrize(
    ("dice", "told"),
    [
        ({"source": (0.5, 0.6)}, "Nothing was adapted; Dice at the worst hospital is .50."),
        ({"source": (0.5, 0.6), "bn_adapted": (0.6, 0.6)}, "rose from .50 to .60"),
        ({"bn_adapted": (0.5, 0.6), "ensemble": (0.6, 0.6)}, "rose from .50 to .60"),
        ({"source": (float("nan"), float("nan"))}, "no masks that could be compared"),
    ],
)
def test_any_stages_make_a_page(
    dice: dict[SegmentationStage, tuple[float, ...]], told: str, tmp_path: Path
) -> None:
    found = results(dice)
    assert told in page(tmp_path, found).text
    assert told.split(" ")[0] in printout(found)


def test_a_site_without_the_last_stage_is_shown_but_not_averaged(tmp_path: Path) -> None:
    found = results()
    sites = dict(found.sites)
    sites["Half"] = SiteResults(segmentation={"source": measures(0.11)})
    half = found.model_copy(update={"sites": sites})
    assert compared_hospitals(half) == NAMES
    text = page(tmp_path, half).text
    assert ".11" in text and "Mean Dice over 2 hospitals: .56 with" in text


def printout(found: Results) -> str:
    output = io.StringIO()
    Console(file=output, width=80).print(tabulate(found))
    return output.getvalue()


def test_table_for_the_terminal() -> None:
    text = printout(results(names=("North", "South")))
    assert "AUROC" not in text and "Ensemble" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    north = " ".join(rows["North"].split())
    assert north == "North .52 (.50–.54) .60 (.58–.62) .73 (.71–.75) +.13"
    assert "lost" in rows["Gone"]
    assert ".56" in rows["Mean"] and "+.09" in rows["Mean"]
    assert ".52" in rows["Worst"] and ".70" in rows["Worst"] and "+.10" in rows["Worst"]
    assert max(map(len, text.splitlines())) <= 80


def test_runs_side_by_side_show_what_their_files_hold(tmp_path: Path) -> None:
    runs = [results(names=("North", "South")), results(names=("East",), seed=4, study="nerves")]
    for number, run in enumerate(runs):
        write_results(run, tmp_path / str(number) / "results.json")
    out = tmp_path / "pages" / "outlines.md"
    folders = [str(tmp_path / str(number)) for number in range(2)]
    made = CliRunner().invoke(app, ["page", *folders, "--out", str(out)])
    assert made.exit_code == 0, made.output
    kept = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert [Results.model_validate(run) for run in kept] == runs
    text = out.read_text(encoding="utf-8")
    assert text.splitlines() == outlines([Results.model_validate(run) for run in kept])
    organs, nerves = text.split("\n## ")[1:]
    assert organs.startswith("organs, seed 3") and nerves.startswith("nerves, seed 4")
    rows = {
        (cells[0], cells[1]): cells[2:]
        for line in organs.splitlines()
        if line.startswith("| ")
        for cells in [line.strip("| ").split(" | ")]
    }
    assert rows["North", "ensemble"][:3] == [
        "0.730 (0.710 to 0.750)",
        "0.456 (0.436 to 0.476)",
        "12.3 (12.3 to 12.4)",
    ]
    # Independent errors of .02 each: the difference's is .02 times the root of 2.
    assert rows["North", "ensemble"][-1] == "+0.130 (+0.102 to +0.158)"
    assert rows["North", "re-normalised"][-1].endswith("(0.058 to 0.098)")
    assert rows["Mean of the hospitals", "ensemble"][0].startswith("0.715 (")
    assert mask_headline(runs[0]) in organs and "Mean of the hospitals" not in nerves


def test_a_page_of_no_outlines_is_refused(tmp_path: Path) -> None:
    classified = results(names=(), missing_sites=())
    for runs, file, sentence in (
        ([results()], "page.html", "must end in .md"),
        ([], "page.md", "needs one"),
        ([results(), classified], "page.md", "study organs has no segmentation"),
    ):
        with pytest.raises(ConfigurationError, match=sentence):
            write_outlines(runs, tmp_path / file)
    assert not list(tmp_path.iterdir())


def test_the_committed_page_of_scenarios_is_of_its_numbers() -> None:
    file = Path(__file__).parents[2] / "docs" / "results" / "segmentation_scenarios.md"
    kept = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    runs = [Results.model_validate(run) for run in kept]
    assert file.read_text(encoding="utf-8").splitlines() == outlines(runs)
