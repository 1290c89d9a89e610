from __future__ import annotations

import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import norm

from sonofed_common.contract.results import (
    METRICS,
    ClassifierResults,
    CurvePoint,
    Machine,
    PhaseCost,
    ReconstructionQuality,
    Results,
    SiteResults,
)
from sonofed_common.contract.study import Study
from sonofed_simulations.report.clouds import similarity, similarity_row
from sonofed_simulations.report.format import decimal, duration, signed, size
from sonofed_simulations.report.page import build_report
from sonofed_simulations.report.summary import explanation, headline
from sonofed_simulations.report.table import tabulate
from sonofed_simulations.report.view import ScoredView, SiteView, SourceView

NAMES = ("North", "St. <b>Mary</b> & Sons")
BUDGETS = (0.1, 0.2)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "br", "link"):
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


def measures(auroc: float) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in METRICS:
        value = auroc if name == "auroc" else 0.5
        found |= {name: value, f"{name}_low": value - 0.05, f"{name}_high": value + 0.05}
    return found


def results(adapted: tuple[float, ...] = (0.84, 0.88), **changes: Any) -> Results:
    study = Study.model_validate(
        {
            "name": "trial",
            "cohort": {"sites": ["North", "Mary", "Gone"]},
            "selection": {"budgets": BUDGETS},
        }
    )
    sites = {}
    for name, before, after in zip(NAMES, (0.71, 0.77), adapted, strict=True):
        curve = tuple(
            CurvePoint(budget=budget, labels=labels, metrics=measures(after))
            for budget, labels in zip(BUDGETS, (15, 29), strict=True)
        )
        found = ClassifierResults(
            source=measures(before), bn_adapted=measures(0.79), adapted=measures(after), curve=curve
        )
        sites[name] = SiteResults(
            images=145,
            test_images=40,
            selected=31,
            labelled=29,
            selected_by_budget=(15, 29),
            classifiers={"resnet18": found},
            reconstruction=ReconstructionQuality(ssim=0.8123, psnr=23.4, feature_distance=0.45),
        )
    sites["Gone"] = SiteResults(images=50, missing_reason="no answer in time")
    values: dict[str, Any] = {
        "study": "trial",
        "study_digest": study.digest(),
        "seed": 3,
        "engine": "in-process",
        "machine": Machine(python="3.11.9", torch="2.13.0", flwr="1.41.0", cores=2),
        "started": "2026-01-02T03:04:05Z",
        "seconds": 245.0,
        "phases": (
            PhaseCost(name="ship", seconds=5, bytes_to_sites=48_200_000, bytes_from_sites=700),
            PhaseCost(name="classifier", seconds=240, peak_memory_bytes=910_000_000),
        ),
        "budgets": BUDGETS,
        "sites": sites,
        "missing_sites": ("Gone",),
        "settings": study.model_dump(mode="json"),
        "notes": ("The images are phantoms.",),
    }
    return Results(**{**values, **changes})


def view(name: str, count: int = 40, **changes: Any) -> ScoredView:
    generator = np.random.default_rng(len(name))
    embeddings = generator.normal(size=(count, 8))
    values: dict[str, Any] = {
        "name": name,
        "images": generator.integers(0, 255, (count, 32, 32), dtype=np.uint8),
        "reconstructions": generator.integers(0, 255, (count, 32, 32), dtype=np.uint8),
        "embeddings": embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True),
        "features": generator.normal(1.0, 1.0, (count, 12)),
        "reconstruction_features": generator.normal(1.5, 1.0, (count, 12)),
        "uncertainty": generator.random(count),
        "representativeness": generator.random(count),
        "selected": np.arange(count) < 8,
        "labels": np.arange(count) % 4 == 0,
    }
    return ScoredView(**{**values, **changes})


def source() -> SourceView:
    return SourceView(np.random.default_rng(9).normal(2.0, 1.0, (50, 12)))


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.open, "every tag is closed"
    return page


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("full")
    return read(build_report(results(), folder, [view(name) for name in NAMES], source()))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return read(build_report(results(), tmp_path_factory.mktemp("plain")))


@pytest.mark.parametrize("kind", ["full", "plain"])
def test_page_is_one_file_that_needs_nothing_else(
    kind: str, request: pytest.FixtureRequest
) -> None:
    page: Page = request.getfixturevalue(kind)
    assert not {tag for tag, _ in page.tags} & {"link", "script", "iframe"}
    for tag, attributes in page.tags:
        address = attributes.get("src") or attributes.get("href") or "#"
        assert address.startswith(("data:", "#") if tag == "img" else "#")
    assert all(image["alt"] for image in page.images)
    assert all(suffix not in page.text for suffix in (".png", ".jpg", ".tif", ".dcm"))


@pytest.mark.parametrize("kind", ["full", "plain"])
def test_page_names_every_site_and_holds_the_numbers(
    kind: str, request: pytest.FixtureRequest
) -> None:
    text = request.getfixturevalue(kind).text
    for fact in (*NAMES, "Gone", "no answer in time", "The images are phantoms."):
        assert fact in text
    for number in (".71", ".66 to .76", ".84", ".79 to .89", "+.13", ".812", "48.2 MB", "910 MB"):
        assert number in text
    assert "With 58 labels of 290 images, AUROC at the worst hospital rose" in text
    assert "rose from .79 (re-normalised without labels) to .84" in text


def test_pictures_appear_only_with_views(full: Page, plain: Page) -> None:
    assert len(plain.images) == 2
    assert "they stay in the hospitals" in plain.text
    assert len(full.images) == 2 + 3 * len(NAMES) + 4
    assert "they stay in the hospitals" not in full.text
    assert "2 of 8 (25%)" in full.text


def test_same_study_gives_the_same_bytes(tmp_path: Path) -> None:
    paths = [
        build_report(results(), tmp_path / run, [view("North")], source()) for run in ("a", "b")
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_views_may_lack_what_the_study_did_not_make(tmp_path: Path) -> None:
    nothing = np.full(40, np.nan)
    bare = view(
        "North",
        reconstructions=None,
        reconstruction_features=None,
        labels=None,
        uncertainty=nothing,
        representativeness=nothing,
        selected=np.zeros(40, dtype=bool),
    )
    page = read(build_report(results(), tmp_path, [bare, view("None", 0)], None))
    assert "Nearer to the source?" not in page.text
    assert "among the chosen" not in page.text


def unscored(name: str) -> SiteView:
    scores = ("embeddings", "uncertainty", "representativeness")
    values = {k: v for k, v in vars(view(name)).items() if k not in scores}
    return SiteView(**{**values, "reconstructions": None, "reconstruction_features": None})


def of_the_preset(strategy: str) -> Results:
    study = Study.model_validate(
        {
            "name": "trial",
            "preset": "sonofed",
            "cohort": {"sites": ["North", "Mary"]},
            "selection": {"budgets": BUDGETS, "strategy": strategy},
        }
    )
    own = results(settings=study.model_dump(mode="json"))
    sites = {n: site.model_copy(update={"reconstruction": None}) for n, site in own.sites.items()}
    return own.model_copy(update={"sites": sites})


def test_a_study_without_an_embedding_has_no_part_about_one(tmp_path: Path) -> None:
    found = of_the_preset("typiclust")
    page = read(build_report(found, tmp_path, [unscored(name) for name in NAMES], source()))
    # Two curves, two sheets a hospital, the map.
    assert len(page.images) == 2 + 2 * len(NAMES) + 1
    assert "2 of 8 (25%)" in page.text and "they stay in the hospitals" not in page.text
    assert "most typical image of each group" in page.text and "TypiClust." in page.text
    assert "A budget is a share of each hospital's own images." in page.text
    anchors = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert anchors == {"#before-after", "#labels", "#chosen", "#run", "#limits"}
    for absent in ("The sphere", "The scores", "ADAptation", "SDEdit", "Paired contrastive"):
        assert absent not in page.text


def test_entropy_is_told_as_the_one_score_that_it_is(tmp_path: Path) -> None:
    text = read(build_report(of_the_preset("entropy"), tmp_path)).text
    assert "one score, the entropy of what the source's model predicts" in text
    assert "rank all their images together" in text and "Settles" in text
    assert "ADAptation" not in text


def test_view_with_uneven_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="site 'North' has 3 rows of 'uncertainty' for 40 images"):
        view("North", uncertainty=np.zeros(3))


def test_summary_is_honest_when_it_fell_and_when_it_may_be_chance() -> None:
    worse = results((0.66, 0.79))
    fell = "fell from .79 (re-normalised without labels) to .66 (North, the worst before and after)"
    assert fell in headline(worse)
    told = " ".join(explanation(worse))
    assert "it fell from .79 to .73" in told and "as shipped has .74 on average, .71 at" in told
    assert "did worse than re-normalised without labels at North." in told
    assert "did worse than the source model at North." in told
    assert "Gone" in told
    assert "stayed at .79, as re-normalised" in headline(results((0.79, 0.79)))


def test_more_than_the_source_but_less_than_the_control_is_no_gain() -> None:
    found = results((0.74, 0.82))
    assert "fell from .79" in headline(found)
    told = " ".join(explanation(found))
    assert f"did worse than re-normalised without labels at {NAMES[0]}." in told
    assert "this may be chance" in told
    assert "worse than the source model" not in told


def test_without_the_control_the_source_is_what_a_gain_counts_over() -> None:
    full = results((0.66, 0.79))
    sites = {
        name: site.model_copy(
            update={
                "classifiers": {
                    key: found.model_copy(update={"bn_adapted": None})
                    for key, found in site.classifiers.items()
                }
            }
        )
        for name, site in full.sites.items()
    }
    bare = full.model_copy(update={"sites": sites})
    assert "fell from .71 to .66 (North, the worst before and after)" in headline(bare)
    told = " ".join(explanation(bare))
    assert "did worse than the source model at North." in told and "e-normalised" not in told
    output = io.StringIO()
    Console(file=output, width=100).print(tabulate(bare))
    assert "Over source" in output.getvalue() and "−.05" in output.getvalue()


def test_summary_without_an_adapted_model_claims_nothing(tmp_path: Path) -> None:
    empty = results(sites={name: SiteResults(images=10) for name in NAMES})
    assert "no adapted model that could be tested" in headline(empty)
    assert explanation(empty) == ["Not in these numbers, because lost on the way: Gone."]
    assert "there is no curve" in read(build_report(empty, tmp_path)).text


def test_several_classifiers_get_their_own_rows(tmp_path: Path) -> None:
    one = results()
    sites = {
        name: site.model_copy(
            update={
                "classifiers": {**site.classifiers, "densenet121": site.classifiers["resnet18"]}
            }
        )
        for name, site in one.sites.items()
        if site.classifiers
    }
    page = read(build_report(one.model_copy(update={"sites": sites}), tmp_path))
    assert "mean of 2 classifiers" in page.text
    assert page.text.count("densenet121") >= len(NAMES)


def test_table_for_the_terminal() -> None:
    output = io.StringIO()
    Console(file=output, width=100).print(tabulate(results()))
    lines = [line for line in output.getvalue().splitlines() if " of " in line]
    north, lost, mean = lines[0], lines[2], lines[3]
    for cell in ("North", "29 of 145", ".71 (.66–.76)", ".79", "+.05"):
        assert cell in north
    assert "Over BN" in output.getvalue()
    assert "lost" in lost
    assert ".74" in mean and ".86" in mean and "58" in mean


def test_similarity_matches_its_definition() -> None:
    generator = np.random.default_rng(0)
    reference = SourceView(generator.normal(size=(30, 6)))
    features = generator.normal(size=(20, 6))
    mean = reference.features.mean(0)
    expected = [row @ mean / (np.linalg.norm(row) * np.linalg.norm(mean)) for row in features]
    assert similarity(features, reference) == pytest.approx(expected)
    quantiles = norm.ppf((np.arange(4000) + 0.5) / 4000)
    row = similarity_row(quantiles + 0.3, quantiles)
    assert row["distance"] == pytest.approx(0.3)
    assert row["std"] == pytest.approx(1.0, abs=0.01)


def test_numbers_are_formatted_for_readers() -> None:
    assert [decimal(v) for v in (0.841, 1.0, -0.034, -0.001, None)] == [
        ".84",
        "1.00",
        "−.03",
        ".00",
        "–",
    ]
    assert [signed(v) for v in (0.13, -0.02, 0.001, -0.001)] == ["+.13", "−.02", ".00", ".00"]
    assert [size(v) for v in (0, 999, 1500, 48_200_000)] == [
        "0 bytes",
        "999 bytes",
        "1.5 kB",
        "48.2 MB",
    ]
    assert [duration(v) for v in (0.42, 38.2, 245, 7800)] == [
        "0.4 s",
        "38 s",
        "4 min 05 s",
        "2 h 10 min",
    ]
