from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from scipy.special import softmax

from sonofed_common.batch_norm import adapt_batch_norm
from sonofed_common.contract.bundle import Bundle, BundleWriter
from sonofed_common.contract.errors import ConfigurationError, DataMissingError
from sonofed_common.contract.records import from_bytes
from sonofed_common.contract.study import Finetuning
from sonofed_common.models.classifiers import TWO_VIEWS as SUFFIX
from sonofed_common.runtime import SILENT, Events
from sonofed_common.security import load_or_create_signing_key
from sonofed_server.source.settings import SegmenterTraining
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.rivals import (
    CANDIDATES,
    STRATEGIES,
    STUDY_PRESET,
    TWO_VIEW_RANDOM,
    TWO_VIEWS,
    UNMIRRORED,
)
from sonofed_simulations.scenarios.scenario import read_scenario
from sonofed_simulations.tables import cells as cells_module
from sonofed_simulations.tables.adaptation_selection import run_selection_table
from sonofed_simulations.tables.archive import ARCHIVE, pack, unpack
from sonofed_simulations.tables.cells import Cell, fingerprint
from sonofed_simulations.tables.head import dropout_passes, logits
from sonofed_simulations.tables.hospitals import places_of, read_hospitals, split_of
from sonofed_simulations.tables.preset import choose, preset_cells
from sonofed_simulations.tables.records import read_records
from sonofed_simulations.tables.selection_findings import findings
from sonofed_simulations.tables.selection_summary import summarise
from sonofed_simulations.tables.settings import (
    CONTROLS,
    QUICK,
    Chain,
    Mode,
    SelectionTable,
    SplitName,
    chains,
)
from sonofed_simulations.tables.start import read_start

TINY = Path(__file__).parent.parent / "integration" / "tiny.toml"


def tiny(**changes: object) -> SelectionTable:
    values = {
        "scenario": str(TINY),
        "seeds": (0,),
        "folds": 2,
        "budgets": (0.2, 0.5),
        "strategies": ("random", "max-entropy", "feal", "dual-margin-near"),
        "draws": 2,
        "views": 2,
        "passes": 2,
        "training": Finetuning(rounds=1, local_epochs=1),
    }
    return SelectionTable.model_validate({**values, **changes})


SMALL = {"encoder": "unet", "epochs": 1, "batch_size": 8}
TWO = tiny(
    strategies=("random", TWO_VIEW_RANDOM, UNMIRRORED),
    budgets=(0.2,),
    draws=1,
    pooled=False,
    lesions=SegmenterTraining(**SMALL),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("table")
    # In two shards, as two machines with one folder would.
    for number in (1, 2):
        run_selection_table(tiny(), out, None, (number, 2), SILENT)
    return out


def files(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (out / "work").rglob("*.safetensors")}


def test_a_whole_table_of_phantoms(made: Path) -> None:
    values = json.loads((made / "table.json").read_text())
    assert values["cells"] == values["wanted"] == len(list((made / "work/cells").rglob("*.safe*")))
    rows = {(r["strategy"], r["mode"], r["budget"]): r for r in values["rows"]}
    assert rows["all-labels", "federated", 1.0]["splits"] == 2
    assert rows["max-entropy", "federated", 0.2]["splits"] == 2
    # The second fold stops at the main budget; pooled cells are of the first fold.
    assert rows["max-entropy", "federated", 0.5]["splits"] == 1
    assert rows["max-entropy", "pooled", 0.2]["splits"] == 1
    assert rows["random", "federated", 0.2]["cells"] == 4
    for row in values["rows"]:
        if row["strategy"] not in (*CONTROLS, "random"):
            assert set(row["over_random"]) == {"accuracy", "auroc"}
        if row["strategy"] not in CONTROLS:
            # Two pools of ten images each.
            assert row["labels"] == pytest.approx(20 * row["budget"], abs=2)
            assert sum(row["site_share"].values()) == pytest.approx(1)
    with (made / "table.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(values["rows"])
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["data"].keys() == {"riverside", "hillview"}
    assert len(manifest["splits"]) == 2 and manifest["versions"]["scikit-activeml"]
    with (made / "splits.csv").open() as file:
        listed = list(csv.DictReader(file))
    # Two folds of one seed: each patient is tested once.
    for site in manifest["data"]:
        patients = [row["test patient"] for row in listed if row["site"] == site]
        assert len(patients) == len(set(patients)) == manifest["data"][site]["groups"]
    page = (made / "README.md").read_text()
    assert "0.8081" in page and "cannot be told from it" in page
    assert b"<svg" in (made / "budget_curves.svg").read_bytes()


def test_a_finished_table_is_not_run_again_and_an_interrupted_one_ends_the_same(made: Path) -> None:
    before, page = files(made), (made / "table.json").read_bytes()
    cell = made / "work" / "cells" / "seed-0-fold-0" / "federated" / "feal" / "0.5.safetensors"
    held = from_bytes(cell.read_bytes())
    cell.unlink()
    run_selection_table(tiny(), made, None, (1, 1), SILENT)
    again = from_bytes(cell.read_bytes())
    assert again.config == held.config and again.digest() == held.digest()
    after = files(made)
    assert {path for path in after if after[path] != before[path]} == {cell}
    values, expected = json.loads((made / "table.json").read_bytes()), json.loads(page)
    assert values["rows"] == expected["rows"] and values["curves"] == expected["curves"]


def test_another_machine_goes_on_from_the_cells_beside_the_page(made: Path, tmp_path: Path) -> None:
    pack(made, "adaptation-selection")
    shutil.move(made / ARCHIVE, tmp_path / ARCHIVE)
    shutil.copytree(made / "work", tmp_path / "work", ignore=shutil.ignore_patterns("cells"))
    (tmp_path / "work" / "cells").mkdir()
    unpack(tmp_path)
    before = files(tmp_path)
    summary = run_selection_table(tiny(), tmp_path, None, (1, 1), SILENT)
    assert summary.cells == summary.wanted and files(tmp_path) == before


def test_an_interrupted_table_is_of_what_has_finished(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "work", tmp_path / "work")
    shutil.rmtree(tmp_path / "work" / "cells")

    def stop(event: dict[str, object]) -> None:
        if event.get("task") == "chains" and event["done"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_selection_table(tiny(), tmp_path, None, (1, 1), Events(listeners=[stop]))
    values = json.loads((tmp_path / "table.json").read_text())
    # The three controls, and Random's first draw at two budgets.
    assert values["cells"] == 5 < values["wanted"]
    assert f"5 of {values['wanted']} cells have run" in (tmp_path / "README.md").read_text()


@pytest.fixture(scope="module")
def two_views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two-views")
    # The first of both splits.
    run_selection_table(TWO, out, None, (1, 2), SILENT)
    return out


def test_cells_of_two_views_start_from_the_products_classifier(two_views: Path) -> None:
    work = two_views / "work"
    single, start = (read_start(work / "source", f"shufflenet_v2{view}") for view in ("", SUFFIX))
    hospitals = read_hospitals(Laboratory(read_scenario(str(TINY)), work, None, SILENT), 32)
    folder = work / "cells" / "seed-0-fold-0" / "federated" / "two-view-bn-adapted"
    kept = from_bytes((folder / "0.safetensors").read_bytes())
    for hospital in hospitals:
        parts = places_of(hospital, split_of(hospital, TWO, SplitName(0, 0)))
        seen = start.seen(hospital, parts[0], SILENT)
        assert torch.equal(seen[:, :1], hospital.images) and seen.shape[1] == 2
        model = start.model()
        adapt_batch_norm(model, seen[parts[0]])
        with torch.inference_mode():
            expected = model(seen[parts[1]]).softmax(1)[:, 1]
        found = kept.arrays[f"probabilities/{hospital.name}"]
        assert found == pytest.approx(expected.numpy(), abs=1e-5)
    assert start.begin.head["weight"].shape == (2, 2048) != single.begin.head["weight"].shape
    rows = {row["strategy"] for row in json.loads((two_views / "table.json").read_text())["rows"]}
    assert {"two-view-random", "two-view-all-labels", "random", "all-labels"} <= rows


def test_the_mirror_image_changes_predictions_alone(two_views: Path) -> None:
    work = two_views / "work"
    folder = work / "cells" / "seed-0-fold-0" / "federated"
    mirrored, alone = (
        from_bytes((folder / f"{name}-0" / "0.2.safetensors").read_bytes())
        for name in (TWO_VIEW_RANDOM, UNMIRRORED)
    )
    assert mirrored.config["chosen"] == alone.config["chosen"]
    path = next((work / "features" / "seed-0-fold-0" / f"shufflenet_v2{SUFFIX}").iterdir())
    kept = from_bytes(path.read_bytes()).arrays
    assert not np.allclose(kept["test"], kept["unmirrored"], atol=1e-3)
    found = f"probabilities/{path.stem}"
    assert not np.allclose(mirrored.arrays[found], alone.arrays[found], atol=1e-4)


def signed_anew(folder: Path, changes: dict[str, bytes]) -> None:
    """Sign a laboratory's source again under another name, some of its files changed."""
    old = Bundle.open(folder / "source")
    facts = old.manifest
    writer = BundleWriter(old.folder, name="anew", kind=facts.kind, provenance=facts.provenance)
    writer.facts = facts.facts
    for path in old.paths:
        writer.add(path, changes.get(path) or old.read(path))
    assert writer.sign(load_or_create_signing_key(folder / "coordinator.pem")).id != old.id


def test_what_was_made_of_weights_is_kept_while_they_stay_the_same(
    two_views: Path, tmp_path: Path
) -> None:
    work, segmenter = tmp_path / "work", "segmenters/source.safetensors"
    shutil.copytree(two_views / "work", work)
    before = files(tmp_path)
    weights = load(Bundle.open(work / "source").read(segmenter))
    others = {segmenter: save({name: -tensor for name, tensor in weights.items()})}
    for changes, kept in (({}, before), (others, [path for path in before if single(path)])):
        signed_anew(work, changes)
        summary = run_selection_table(TWO, tmp_path, None, (1, 40), SILENT)
        assert summary.cells == sum("cells" in path.parts for path in kept)
    assert files(tmp_path) == before


def single(path: Path) -> bool:
    return not any(name.startswith("two-view-") for name in path.parts)


def test_cells_of_other_training_do_not_count(made: Path) -> None:
    other = tiny(training=Finetuning(rounds=1, local_epochs=1, learning_rate=0.5))
    before = files(made)
    # The last of many shards: nearly all cells are still those of the other training.
    summary = run_selection_table(other, made, None, (40, 40), SILENT)
    assert 0 < summary.cells < summary.wanted / 2
    changed = {path for path, at in files(made).items() if before[path] != at}
    assert len(changed) == summary.cells


def test_each_site_has_its_share_unless_images_are_ranked_together(made: Path) -> None:
    folder = made / "work" / "cells" / "seed-0-fold-1" / "federated"
    chosen = {
        name: from_bytes((folder / name / "0.2.safetensors").read_bytes()).config
        for name in ("max-entropy", "dual-margin-near", "random-0", "random-1")
    }
    sizes = {name: [len(v) for v in config["chosen"].values()] for name, config in chosen.items()}
    assert len(set(sizes["max-entropy"])) == 1 and sizes["random-0"] == sizes["max-entropy"]
    assert sum(sizes["dual-margin-near"]) == sum(sizes["max-entropy"])
    assert chosen["random-0"]["chosen"] != chosen["random-1"]["chosen"]


def test_a_table_of_two_classifiers_has_their_means_and_each_ones_own_rows(tmp_path: Path) -> None:
    both = ("shufflenet_v2", "resnet18")
    table = tiny(
        classifiers=both,
        epochs=1,
        strategies=("random", "max-entropy"),
        budgets=(0.2,),
        draws=1,
        views=1,
        pooled=False,
    )
    summary = run_selection_table(table, tmp_path, None, (1, 1), SILENT)
    assert summary.cells == summary.wanted == 2 * 2 * 5
    cells = tmp_path / "work" / "cells"
    assert {path.relative_to(cells).parts[0] for path in cells.rglob("*.safetensors")} == {*both}
    rows = {row.strategy: row for row in summary.rows}
    apart = {name: {row.strategy: row for row in summary.by_classifier[name]} for name in both}
    for strategy, row in rows.items():
        values = [apart[name][strategy].accuracy.value for name in both]
        assert row.accuracy.value == pytest.approx(np.mean(values)) and row.splits == 2
    assert apart[both[0]]["bn-adapted"].auroc != apart[both[1]]["bn-adapted"].auroc
    page = (tmp_path / "README.md").read_text()
    assert "2 of whole images (shufflenet_v2, resnet18; a row is their mean)" in page
    section = page.split("## Accuracy by classifier")[1].split("##")[0]
    assert "| strategy | shufflenet_v2 | resnet18 |" in section and "| max-entropy |" in section


def test_a_mean_over_classifiers_waits_for_all_of_them() -> None:
    table = tiny(classifiers=("one", "two"))
    splits = [SplitName(0, fold) for fold in range(2)]
    made = [
        replace(found, chain=replace(found.chain, classifier=name))
        for name, right in (("one", 0.9), ("two", 0.5))
        for strategy in ("random", "badge")
        for split in splits
        for found in [cell(strategy, split, right)]
    ]
    summary = summarise(table, made[:-1], 40)
    rows = {row.strategy: row for row in summary.rows}
    assert (rows["random"].splits, rows["badge"].splits, summary.cells) == (2, 1, 7)
    assert [row.splits for row in summary.by_classifier["one"]] == [2, 2]
    assert rows["badge"].accuracy.value == pytest.approx(0.7, abs=0.08)


def test_a_shard_that_does_not_exist_and_missing_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="3/2"):
        run_selection_table(tiny(), tmp_path, None, (3, 2), SILENT)
    with pytest.raises(DataMissingError, match="--data"):
        run_selection_table(QUICK, tmp_path, None, (1, 1), Events())


def test_a_test_part_of_one_class_is_refused_before_the_source_is_trained(tmp_path: Path) -> None:
    scenario = tmp_path / "few.toml"
    text = TINY.read_text(encoding="utf-8")
    scenario.write_text(text.replace("malignant_fraction = 0.5", "malignant_fraction = 0.15"))
    table = tiny(scenario=str(scenario), folds=5)
    with (
        pytest.warns(UserWarning, match="least populated class"),
        pytest.raises(
            ConfigurationError, match=r"test images of riverside in seed-0-fold-\d are of"
        ),
    ):
        run_selection_table(table, tmp_path / "out", None, (1, 1), SILENT)
    assert not (tmp_path / "out" / "work" / "source").exists()


def test_the_quick_table_has_every_strategy_and_shards_make_it_whole() -> None:
    everything = list(chains(QUICK))
    assert {chain.strategy for chain in everything} == {*STRATEGIES, *CONTROLS}
    assert len(set(everything)) == len(everything)
    main = {
        (c.strategy, c.draw, c.split)
        for c in everything
        if c.mode == "federated" and QUICK.main_budget in c.budgets
    }
    assert sum(name == "random" for name, _, _ in main) == 10 * 15
    assert sum(name == "feal" for name, _, _ in main) == 15
    full = [c for c in everything if c.strategy == "badge" and c.budgets == QUICK.budgets]
    assert {c.split.seed for c in full} == {0, 1, 2} and {c.split.fold for c in full} == {0}
    # Every split has run with few draws before one has more, and pooled ones wait for all.
    order = [(c.mode == "pooled", c.mode == "federated" and c.draw >= 3) for c in everything]
    assert order == sorted(order) and len(set(order)) == 3


def test_a_draw_of_dropout_is_one_of_the_weights() -> None:
    draws = np.random.default_rng(0)
    features = draws.uniform(size=(5, 64)).astype(np.float32)
    head = {"weight": torch.from_numpy(draws.normal(size=(2, 64)).astype(np.float32))}
    head["bias"] = torch.zeros(2)
    north, south = (dropout_passes(head, x, 0.5, 6, 3) for x in (features, features[[4, 4, 0]]))
    # The same features are dropped of every image, at every site.
    assert np.allclose(south, north[:, [4, 4, 0]], atol=1e-6)
    assert len(np.unique(north[:, 0, 0].round(5))) == 6
    assert not np.allclose(dropout_passes(head, features, 0.5, 6, 4), north, atol=1e-3)
    plain = softmax(logits(head, features), axis=1)
    assert np.allclose(dropout_passes(head, features, 0.0, 2, 3), plain[None], atol=1e-5)


def test_a_strategys_fingerprint_is_of_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fingerprint("feal") == fingerprint("logo") != fingerprint("badge")
    before = {name: fingerprint(name) for name in ("bald", "batch-bald", "clue")}
    fingerprint.cache_clear()
    monkeypatch.setattr(cells_module, "dropout_passes", fingerprint.__wrapped__)
    after = {name: fingerprint(name) for name in before}
    fingerprint.cache_clear()
    assert {name for name in before if before[name] != after[name]} == {"bald", "batch-bald"}
    assert fingerprint("all-labels") == ""


def cell(strategy: str, split: SplitName, right: float, mode: Mode = "federated") -> Cell:
    draws = np.random.default_rng([split.seed, split.fold])
    predictions = {}
    for site in ("north", "south"):
        labels = np.arange(60) % 2
        correct = draws.random(60) < right
        groups = np.array([f"{split.fold}-{n // 2}" for n in range(60)])
        predictions[site] = (labels, np.where(correct, labels, 1 - labels) * 0.8 + 0.1, groups)
    chosen = {"north": [0, 1, 2], "south": [0]}
    chain = Chain(strategy, mode, 0, split, (0.2,))
    return Cell(chain, 0.2, chosen, {"north": 1, "south": 0}, predictions, 0.5, 1.0)


def test_summary_pairs_finds_the_better_and_claims_nothing_of_the_equal() -> None:
    splits = [SplitName(0, fold) for fold in range(3)]
    rights = {"random": 0.6, "max-entropy": 0.6, "badge": 0.9, "dual-margin-near": 0.6}
    made = [cell(name, split, right) for name, right in rights.items() for split in splits]
    summary = summarise(tiny(), made, 20)
    rows = {row.strategy: row for row in summary.rows}
    expected = np.mean(
        [
            np.mean((p >= 0.5) == y)
            for c in made
            if c.chain.strategy == "badge"
            for y, p, _ in c.predictions.values()
        ]
    )
    assert rows["badge"].accuracy.value == pytest.approx(expected)
    gain = rows["badge"].over_random["accuracy"]
    assert gain.low > 0.1 and gain.p_holm is not None and gain.p_holm < 0.05
    assert rows["badge"].p_permutation is not None and rows["badge"].p_permutation < 0.001
    assert rows["badge"].p_delong is not None and rows["badge"].p_delong < 0.001
    # The same draws decide what max-entropy and Random get right: no difference at all.
    assert rows["max-entropy"].over_random["accuracy"].value == 0
    assert rows["max-entropy"].p_permutation == 1
    assert rows["badge"].malignant_share == pytest.approx(0.25)
    assert rows["badge"].site_share == {"north": 0.75, "south": 0.25}
    assert summary.best_rival == "badge" and not rows["badge"].over_best
    assert rows["dual-margin-near"].over_best["accuracy"].high < 0
    said = "\n".join(findings(summary))
    assert "better badge" in said and "2 of 3 strategies cannot be told from it" in said
    assert "below dual-margin-near" in said and "This is 60% of the table" in said


def test_rows_of_two_views_are_set_against_random_of_two_views() -> None:
    splits = [SplitName(0, fold) for fold in range(3)]
    rights = dict.fromkeys(["random", "badge", *TWO_VIEWS], 0.6) | {"two-view-badge": 0.9}
    made = [cell(name, split, right) for name, right in rights.items() for split in splits]
    rows = {row.strategy: row for row in summarise(tiny(), made, len(made)).rows}
    gain = rows["two-view-badge"].over_two_view_random["accuracy"]
    of_random = rows["two-view-badge"].over_random["accuracy"]
    # Here Random of two views gets right what Random does.
    assert gain.low > 0.1 and (gain.value, gain.low) == (of_random.value, of_random.low)
    # Corrected over the rows of two views, and not over all.
    assert gain.p_holm is not None and gain.p_holm == pytest.approx(len(TWO_VIEWS) * gain.p)
    assert rows["two-view-clue"].over_two_view_random["accuracy"].value == 0
    assert "accuracy" in rows["sonofed"].over_two_view_random
    alone = ("random", "badge", "two-view-random")
    assert not any(rows[name].over_two_view_random for name in alone)


def test_ours_are_set_against_random_and_the_best_rival_at_each_site() -> None:
    rights = {name: {"north": 0.6, "south": 0.6} for name in ("random", *CANDIDATES)}
    rights["badge"] = {"north": 0.8, "south": 0.7}
    rights[STUDY_PRESET] = {"north": 0.9, "south": 0.5}
    made = [
        at_sites(name, SplitName(0, fold), right)
        for name, right in rights.items()
        for fold in range(5)
    ]
    summary = summarise(tiny(), made, len(made))
    found = {(g.strategy, g.site, g.against): g.gains["accuracy"] for g in summary.at_sites}
    assert summary.best_rival == "badge" and len(found) == 3 * 2 * 2
    for against in ("random", "badge"):
        for site, base in rights[against].items():
            gain = found[STUDY_PRESET, site, against]
            assert gain.value == pytest.approx(rights[STUDY_PRESET][site] - base)
            assert gain.p_holm is not None and gain.p_holm >= gain.p
            assert found[TWO_VIEW_RANDOM, site, against].value == pytest.approx(0.6 - base)
    said = "\n".join(findings(summary))
    # Means over the sites: .70 and .75.
    assert f"`{STUDY_PRESET}` -5.0 (missed), one interval above zero" in said
    assert "above none; below" in said
    assert "The best mean is that of `badge` (0.750)" in said


def test_each_budget_has_its_own_best_rival() -> None:
    rights = {
        0.2: {"random": 0.5, "clue": 0.6, "badge": 0.7, "two-view-feal": 0.9},
        0.5: {"random": 0.5, "clue": 0.8, "badge": 0.7, "two-view-feal": 0.9},
    }
    made = [
        replace(at_sites(name, SplitName(0, 0), {"a": right, "b": right}), budget=budget)
        for budget, found in rights.items()
        for name, right in found.items()
    ]
    summary = summarise(tiny(), made, len(made))
    assert summary.best_rivals == {0.2: "badge", 0.5: "clue"} and summary.best_rival == "badge"
    gains = {r.budget: r.over_best for r in summary.rows if r.strategy == "two-view-feal"}
    assert gains[0.2]["accuracy"].value == pytest.approx(0.2)
    assert gains[0.5]["accuracy"].value == pytest.approx(0.1)


def test_a_damaged_cell_counts_as_none(made: Path, tmp_path: Path) -> None:
    cell = next((made / "work" / "cells").rglob("*.safetensors"))
    data = cell.read_bytes()
    origin = from_bytes(data).config["origin"]
    copy = tmp_path / "cell.safetensors"
    for part, there in ((data, True), (data[: len(data) // 2], False), (b"", False)):
        copy.write_bytes(part)
        assert (read_records(copy, origin) is not None) == there


def test_accuracy_at_prevalence_knows_no_threshold() -> None:
    labels, patients = np.array([1, 1, 0, 0, 0]), np.arange(5).astype(str)
    # All below one half, and the two likeliest are the malignant ones.
    predicted = {"north": (labels, np.array([0.4, 0.3, 0.2, 0.1, 0.05]), patients)}
    chain = Chain("badge", "federated", 0, SplitName(0, 0), (0.2,))
    made = Cell(chain, 0.2, {"north": [0]}, {"north": 1}, predicted, 0.5, 1)
    row = summarise(tiny(), [made], 1).rows[0]
    assert row.accuracy.value == pytest.approx(3 / 5)
    assert row.points["accuracy_at_prevalence"] == 1
    assert row.points["balanced_accuracy"] == pytest.approx(1 / 2)


def at_sites(strategy: str, split: SplitName, right: dict[str, float]) -> Cell:
    """A cell that gets a share of each site's images right, spread over patients."""
    predictions = {}
    for site, share in right.items():
        labels = np.arange(20) % 2
        probabilities = np.where(np.arange(20) < 20 * share, labels, 1 - labels) * 0.8 + 0.1
        predictions[site] = (labels, probabilities, np.array([f"{split.fold}-{n}" for n in labels]))
    counts = {site: n for n, site in enumerate(right)}
    chosen = {site: list(range(n)) for site, n in counts.items()}
    chain = Chain(strategy, "federated", 0, split, (0.2,))
    return Cell(chain, 0.2, chosen, counts, predictions, 0.5, 1)


def test_the_preset_is_chosen_at_the_other_sites_alone() -> None:
    base = dict.fromkeys(("a", "b", "c"), 0.5)
    rights = {name: dict(base) for name in CANDIDATES}
    # The best at its own site, and poor elsewhere: no other site's test may choose it for "a".
    rights["two-view-badge"] = {"a": 1.0, "b": 0.4, "c": 0.4}
    rights["two-view-feal"] = {"a": 0.6, "b": 0.6, "c": 0.6}
    rights["two-view-clue"] = {"a": 0.3, "b": 0.8, "c": 0.7}
    splits = [SplitName(0, fold) for fold in range(2)]
    made = [at_sites(name, split, right) for name, right in rights.items() for split in splits]
    chosen = choose(made, tiny())
    # Means over the others: at "a" clue .75, at "b" badge .70, at "c" badge .70.
    assert chosen == {"a": "two-view-clue", "b": "two-view-badge", "c": "two-view-badge"}
    one, two = preset_cells(made, tiny())
    assert {one.chain.split, two.chain.split} == set(splits)
    for site, name in chosen.items():
        source = next(c for c in made if c.chain.strategy == name and c.chain.split == splits[0])
        assert one.predictions[site] is source.predictions[site]
        assert one.chosen[site] == source.chosen[site]
    assert choose(made[:-2], tiny()) == {} and preset_cells(made[:-2], tiny()) == []


def test_scanners_of_one_data_set_do_not_choose_for_each_other() -> None:
    rights = {name: {"rio-aplio": 0.5, "rio-logiq5": 0.5, "poland": 0.5} for name in CANDIDATES}
    rights["two-view-badge"] = {"rio-aplio": 0.9, "rio-logiq5": 0.9, "poland": 0.4}
    rights["two-view-feal"] = {"rio-aplio": 0.4, "rio-logiq5": 0.4, "poland": 0.6}
    made = [at_sites(name, SplitName(0, 0), right) for name, right in rights.items()]
    table = SelectionTable(scenario="breast_three_countries", budgets=(0.2,))
    chosen = choose(made, table)
    assert chosen == dict.fromkeys(("rio-aplio", "rio-logiq5"), "two-view-feal") | {
        "poland": "two-view-badge"
    }


def test_a_strategy_is_compared_on_the_splits_that_both_have() -> None:
    made = [cell("random", SplitName(0, fold), 0.5) for fold in range(2)]
    made.append(cell("badge", SplitName(0, 1), 0.9))
    row = next(r for r in summarise(tiny(), made, 4).rows if r.strategy == "badge")
    one, other = (
        np.mean([np.mean((p >= 0.5) == y) for y, p, _ in c.predictions.values()])
        for c in (made[2], made[1])
    )
    assert row.splits == 1
    assert row.over_random["accuracy"].value == pytest.approx(one - other)


def test_the_best_rival_is_picked_on_splits_that_random_has_too() -> None:
    hard, easy = SplitName(0, 0), SplitName(0, 1)
    rights = {hard: {"random": 0.5, "badge": 0.7}, easy: {"random": 0.9, "clue": 0.92}}
    made = [
        at_sites(name, split, {"north": right, "south": right})
        for split, found in rights.items()
        for name, right in found.items()
    ]
    summary = summarise(tiny(), made, 4)
    means = {row.strategy: row.accuracy.value for row in summary.rows}
    assert means["clue"] > means["badge"] and summary.best_rival == "badge"


def test_two_views_save_what_random_needs_where_they_need_no_label() -> None:
    rights = {
        ("bn-adapted", 0.0): 0.5,
        ("random", 0.2): 0.6,
        ("random", 0.5): 0.7,
        ("all-labels", 1.0): 0.8,
        ("two-view-bn-adapted", 0.0): 0.9,
        ("two-view-badge", 0.2): 0.95,
        ("two-view-badge", 0.5): 0.95,
        ("two-view-random", 0.2): 0.9,
        ("two-view-random", 0.5): 0.9,
        ("two-view-all-labels", 1.0): 0.95,
    }
    made = [
        replace(at_sites(name, SplitName(0, 0), {"a": right, "b": right}), budget=budget)
        for (name, budget), right in rights.items()
    ]
    curves = {curve.strategy: curve for curve in summarise(tiny(), made, 10).curves}
    saving, none = curves["two-view-badge"].saving, curves["random"].saving
    # Random's curve passes 0.8 less a point between half of the labels, 0.7, and all, 0.8.
    assert saving is not None and none is None
    assert saving.value == pytest.approx(0.95)
    # Of two views Random passes 0.95 less a point at 90% of the labels, badge at 16%.
    of_two_views = curves["two-view-badge"].two_view_saving
    assert of_two_views is not None and curves["two-view-random"].two_view_saving is None
    assert of_two_views.value == pytest.approx(0.74)
