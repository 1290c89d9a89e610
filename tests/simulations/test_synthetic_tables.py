from __future__ import annotations

import inspect
import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sonofed_common.runtime import SILENT, Events
from sonofed_common.synthesis import synthetic
from sonofed_common.synthesis.memorisation import RefusedError
from sonofed_server.source.settings import SourceData, WganTraining
from sonofed_simulations.tables import mixtures, synthetic_all, synthetic_ratios, synthetic_sets
from sonofed_simulations.tables.arm_page import About
from sonofed_simulations.tables.arm_table import make_arm_table
from sonofed_simulations.tables.arms import Arm
from sonofed_simulations.tables.breast_sites import parts_facts, read_site
from sonofed_simulations.tables.code import code_of
from sonofed_simulations.tables.equal_steps import Steps, train_steps
from sonofed_simulations.tables.mixtures import (
    NETWORKS,
    SOURCE,
    TARGET,
    Mixture,
    MixtureSettings,
    MixtureTable,
)
from sonofed_simulations.tables.request import Request
from sonofed_simulations.tables.synthetic_domains import DomainSettings, DomainTable
from sonofed_simulations.tables.synthetic_sets import SyntheticSet

torch.set_num_threads(1)

SIZE = 16
SITES = {name: SourceData(kind="table", path=Path(name)) for name in (SOURCE, TARGET)}
STEPS = Steps(steps=3, batch_size=4)
BASE = Arm("base", home=SOURCE)
MIXTURES = {
    BASE: Mixture("shufflenet_v2", 12),
    Arm("more", "base", home=SOURCE): Mixture("shufflenet_v2", 12, synthetic=3),
    Arm("flips", "base", home=SOURCE): Mixture("shufflenet_v2", None, flips=True),
}
SETTINGS = MixtureSettings(
    image_size=SIZE,
    seeds=(0,),
    test_fraction=0.3,
    training=STEPS,
    # Long enough that images differ from each other: the gate refuses those that do not.
    wgan=WganTraining(steps=100, batch_size=8, width=16, learning_rate=2e-3, critic_steps=1),
    synthetic=3,
)
ABOUT = About("Mixtures", "a work", (), "published", TARGET, (), ())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites of noise with a dark disc (benign, two of three) or a dark bar; two images each."""
    root = tmp_path_factory.mktemp("data")
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    for number, site in enumerate(SITES):
        draws = np.random.default_rng(number)
        (root / site).mkdir()
        rows = ["image,label,patient"]
        for n in range(36):
            malignant = n // 2 % 3 == 0
            # Contrast differs from patient to patient, or images would be too like each other.
            pixels = draws.integers(0, 255, (SIZE, SIZE)) * draws.uniform(0.3, 1)
            pixels[abs(x - y) < 3 if malignant else x**2 + y**2 < 16] //= 5
            Image.fromarray(pixels.astype(np.uint8)).save(root / site / f"{n}.png")
            rows.append(f"{n}.png,{'malignant' if malignant else 'benign'},p{n // 2}")
        (root / site / "table.csv").write_text("\n".join(rows))
    return root


def request(data: Path, out: Path) -> Request:
    return Request("mixtures", True, out, data, (1, 1), SILENT)


def test_a_table_of_mixtures(data: Path, tmp_path: Path) -> None:
    table = MixtureTable(MIXTURES, SETTINGS, ABOUT, request(data, tmp_path), SITES)
    made = make_arm_table(table, request(data, tmp_path))
    assert made.cells == made.wanted == 3
    values = json.loads((tmp_path / "table.json").read_text())
    rows = {row["arm"]: row for row in values["rows"]}
    assert rows["base"]["facts"] == {"real images": [12]}
    assert 1 < rows["more"]["facts"]["synthetic images"][0] <= 3
    assert rows["more"]["facts"]["distance to nearest real, median"][0] > 0
    assert rows["flips"]["facts"]["real images"][0] > 20
    assert all(
        set(row["gap"]) == {"accuracy", "balanced_accuracy", "auroc"} for row in rows.values()
    )
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["data"].keys() == {SOURCE, TARGET}
    assert manifest["splits"]["seed-0"][SOURCE]["test"] > 4
    sets = list((tmp_path / "work" / "synthetic" / "seed-0").glob("*-images.safetensors"))
    assert [path.name for path in sets] == ["3-images.safetensors"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    again = MixtureTable(MIXTURES, SETTINGS, ABOUT, request(data, tmp_path), SITES)
    make_arm_table(again, request(data, tmp_path))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == before


def test_other_gans_make_other_cells_of_the_synthetic_arms_alone(
    data: Path, tmp_path: Path
) -> None:
    longer = SETTINGS.model_copy(update={"wgan": SETTINGS.wgan.model_copy(update={"steps": 101})})
    one, other = (
        MixtureTable(MIXTURES, settings, ABOUT, request(data, tmp_path), SITES)
        for settings in (SETTINGS, longer)
    )
    changed = {arm.name for arm in one.arms if one.origin(arm, 0) != other.origin(arm, 0)}
    assert changed == {"more"}
    assert json.loads(json.dumps(one.origin(BASE, 0))) == one.origin(BASE, 0)


def test_code_is_told_apart_by_what_it_does_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def code(number: int, text: str) -> str:
        (tmp_path / f"told_{number}.py").write_text(text)
        return code_of(import_module(f"told_{number}"))

    monkeypatch.syspath_prepend(tmp_path)
    text = Path(inspect.getfile(synthetic)).read_text()
    check = "        _check_membership(training, held_out, released, drawn_of, of_class)\n"
    keep = "                kept.append(image)\n"
    assert text.count(check) == text.count(keep) == 1
    whole = code(0, text)
    assert whole == code_of(synthetic) == code(1, f"# A comment.\n{text}")
    assert whole == code(2, text.replace('"""Draw labelled images, and keep', '"""Keep'))
    assert whole != code(3, text.replace(check, "        pass\n"))
    assert whole != code(4, text.replace(keep, keep.replace("image", "drawn[0]")))


def test_another_gate_judges_images_of_the_same_generator(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> tuple[object, list[Path]]:
        table = MixtureTable(MIXTURES, SETTINGS, ABOUT, request(data, tmp_path), SITES)
        make_arm_table(table, request(data, tmp_path))
        work = tmp_path / "work"
        sets = [p.stat().st_mtime_ns for p in work.rglob("*-images.safetensors")]
        return sets, sorted(work.rglob("wgan-*.safetensors"))

    images, generators = made()
    monkeypatch.setattr(synthetic_sets, "_gate", lambda: "another")
    redrawn, kept = made()
    assert redrawn != images and kept == generators and len(kept) == 2


def test_a_refused_cell_is_kept_as_refused_and_the_rest_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def refuse(*_: Any) -> SyntheticSet:
        asked.append(1)
        raise RefusedError("too little passes")

    monkeypatch.setattr(mixtures, "synthetic_set", refuse)
    for _ in range(2):
        table = MixtureTable(MIXTURES, SETTINGS, ABOUT, request(data, tmp_path), SITES)
        made = make_arm_table(table, request(data, tmp_path))
        assert made.cells == made.wanted == 2 and len(asked) == 1
    page = (tmp_path / "README.md").read_text()
    assert "- more, seed 0: too little passes" in page and "| flips |" in page


def test_a_smaller_set_is_part_of_a_larger_one_with_the_same_shares() -> None:
    images = torch.arange(30.0).view(30, 1, 1, 1)
    labels = (torch.arange(30) % 3 == 0).long()
    whole = SyntheticSet(images, labels, {})
    small, classes = whole.first(9, 1 / 3)
    larger, _ = whole.first(21, 1 / 3)
    assert classes.tolist() == [0] * 6 + [1] * 3
    assert set(small.flatten().tolist()) < set(larger.flatten().tolist())
    assert len(whole.first(90, 1 / 3)[1]) == 30


def test_sites_are_split_by_patient(data: Path) -> None:
    site = read_site(SOURCE, SITES[SOURCE], data, SIZE)
    parts = site.split(0.3, 0)
    pool, test = ({sample.group for sample in part.samples} for part in (parts.pool, parts.test))
    assert not pool & test and len(pool | test) == 18
    assert parts_facts(parts) != parts_facts(site.split(0.3, 1))
    for part in (parts.pool, parts.test):
        assert part.labels.tolist() == [sample.label for sample in part.samples]
        whole = {sample.name: image for sample, image in
                 zip(site.whole.samples, site.whole.images, strict=True)}  # fmt: skip
        for sample, image in zip(part.samples, part.images, strict=True):
            assert torch.equal(image, whole[sample.name])


def test_steps_are_as_many_whatever_the_images() -> None:
    images, labels = torch.rand(9, 1, SIZE, SIZE), torch.arange(9) % 2
    weights = []
    for count in (5, 9):
        seen: list[dict[str, Any]] = []
        model = train_steps(
            "shufflenet_v2", images[:count], labels[:count], STEPS, 0, flips=False,
            events=Events(listeners=[seen.append]),
        )  # fmt: skip
        assert seen[-1]["done"] == seen[-1]["total"] == 3
        weights.append(model.head.weight)
    again = train_steps("shufflenet_v2", images, labels, STEPS, 0, flips=False)
    mirrored = train_steps("shufflenet_v2", images, labels, STEPS, 0, flips=True)
    assert torch.equal(again.head.weight, weights[1])
    assert not torch.equal(mirrored.head.weight, weights[1])


def test_vit_is_trained_at_a_rate_of_its_own_and_a_cell_knows_it(
    data: Path, tmp_path: Path
) -> None:
    mixtures = {Arm(name): Mixture(network, 12) for name, network in NETWORKS.items()}
    table = MixtureTable(mixtures, SETTINGS, ABOUT, request(data, tmp_path), SITES)
    rates = {arm.name: table.origin(arm, 0)["training"]["learning_rate"] for arm in table.arms}
    assert rates == {"ResNet-50": 3e-4, "ViT-16": 3e-5, "CNN-Transformer": 3e-4}


def test_a_table_of_domains_tests_every_row_on_the_same_images(data: Path, tmp_path: Path) -> None:
    settings = DomainSettings(
        image_size=SIZE, seeds=(0,), test_fraction=0.3, training=Steps(steps=1)
    )
    table = DomainTable(settings, request(data, tmp_path), SITES)
    arms = [arm for arm in table.arms if arm.name.startswith("ViT-16")]
    abroad, home = (table.run(arm, 0) for arm in arms)
    assert [arm.home for arm in arms] == [SOURCE, TARGET] and arms[0].against == arms[1].name
    for site in (SOURCE, TARGET):
        for one, other in zip(
            abroad.predictions[site][::2], home.predictions[site][::2], strict=True
        ):
            assert np.array_equal(one, other)
        assert not np.array_equal(abroad.predictions[site][1], home.predictions[site][1])


@pytest.mark.parametrize(
    ("table", "arms", "published"), [(synthetic_ratios, 7, 5), (synthetic_all, 4, 3)]
)
def test_the_published_rows_and_the_claims_are_of_rows_that_there_are(
    table: ModuleType, arms: int, published: int
) -> None:
    rows = table.arms()
    names = {arm.name for arm in rows}
    assert {mixture.network for mixture in rows.values()} == set(NETWORKS.values())
    assert len(rows) == arms * len(NETWORKS)
    assert sum(bool(arm.published) for arm in rows) == published * len(NETWORKS)
    assert all(arm.against is None or arm.against in names for arm in rows)
    assert all(set(claim.arms) <= names for claim in table.about(table.QUICK).claims)
    assert {mixture.synthetic for mixture in rows.values()} <= set(range(table.QUICK.synthetic + 1))
