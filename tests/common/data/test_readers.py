"""Readers: official layouts, tables, and bad input."""

from __future__ import annotations

import csv
import os
from collections import Counter
from pathlib import Path

import numpy as np
import openpyxl
import pytest
from PIL import Image

from sonofed_common.contract.errors import (
    ConfigurationError,
    DataMissingError,
    DataUnreadableError,
    SiteEmptyError,
)
from sonofed_common.data.readers import READERS, read

RANDOM = np.random.default_rng(0)


def write_image(path: Path, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = RANDOM.integers(0, 256, (40, 60), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(path)
    return path


def write_table(folder: Path, text: str) -> Path:
    path = folder / "table.csv"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", sorted(READERS))
def test_missing_folder(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataMissingError):
        read(kind, tmp_path / "nowhere")


@pytest.mark.parametrize("kind", sorted(READERS))
def test_folder_without_the_set(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataMissingError):
        read(kind, tmp_path)


def test_unknown_kind_names_the_known(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="busbra"):
        read("busy", tmp_path)


def test_busi_layout(tmp_path: Path) -> None:
    root = tmp_path / "Dataset_BUSI_with_GT"
    write_image(root / "benign/benign (1).png")
    for suffix in ("_mask", "_mask_1", "_mask_2"):
        write_image(root / f"benign/benign (1){suffix}.png", "1")
    write_image(root / "malignant/malignant (1).png")
    write_image(root / "malignant/malignant (2)_mask.png", "1")
    write_image(root / "normal/normal (1).png", "RGB")
    for place in (root, tmp_path):
        reading = read("busi", place)
        assert [(s.name, s.label, len(s.masks)) for s in reading.samples] == [
            ("benign/benign (1)", 0, 3),
            ("malignant/malignant (1)", 1, 0),
            ("normal/normal (1)", 2, 0),
        ]
        assert [(s.name, s.reason) for s in reading.skipped] == [
            ("malignant/malignant (2)", "a mask without an image")
        ]


def test_busbra_layout(tmp_path: Path) -> None:
    root = tmp_path / "BUSBRA"
    for name in ("0001-l", "0001-r", "0002-l"):
        write_image(root / f"Images/bus_{name}.png")
    write_image(root / "Masks/mask_0001-l.png", "1")
    (root / "Masks/mask_0001-r.png").write_bytes(b"not a png")
    write_image(root / "Masks/mask_0002-l.png", "1")
    (root / "bus_data.csv").write_text(
        "ID,Case,Pathology,Device\n"
        "bus_0001-l,1,malignant,GE Logiq 7\n"
        "bus_0001-r,1,malignant,GE Logiq 7\n"
        "bus_0002-l,2,benign,U-Systems\n"
        "bus_0003-l,3,benign,U-Systems\n"
        "bus_0004-l,4,unclear,U-Systems\n"
    )
    reading = read("busbra", tmp_path)
    assert [(s.name, s.label, s.group, s.device, len(s.masks)) for s in reading.samples] == [
        ("bus_0001-l", 1, "1", "GE Logiq 7", 1),
        ("bus_0001-r", 1, "1", "GE Logiq 7", 0),
        ("bus_0002-l", 0, "2", "U-Systems", 1),
    ]
    assert {s.name: s.reason for s in reading.skipped} == {
        "bus_0001-r": "kept without its masks: the file is not a readable image",
        "bus_0003-l": "the file is missing",
        "bus_0004-l": "the class is unknown",
    }


def test_breast_layout(tmp_path: Path) -> None:
    images = tmp_path / "BrEaST/BrEaST-Lesions_USG-images_and_masks"
    for name in ("case001", "case001_tumor", "case002"):
        write_image(images / f"{name}.png")
    workbook = openpyxl.Workbook()
    workbook.active.append(["type", "description"])
    sheet = workbook.create_sheet("clinical data")
    sheet.append(["CaseID", "Image_filename", "Mask_tumor_filename", "Classification", "BIRADS"])
    sheet.append([1, "case001.png", "case001_tumor.png", "malignant", "4b"])
    sheet.append([2, "case002.png", None, "normal", 1])
    sheet.append([None] * 5)
    workbook.save(tmp_path / "BrEaST/clinical.xlsx")
    samples = read("breast", tmp_path / "BrEaST").samples
    assert [(s.name, s.label, s.group, len(s.masks)) for s in samples] == [
        ("case001", 1, "1", 1),
        ("case002", 2, "2", 0),
    ]


def test_breast_with_a_broken_workbook(tmp_path: Path) -> None:
    (tmp_path / "clinical.xlsx").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(DataUnreadableError):
        read("breast", tmp_path)


def test_table(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        write_image(tmp_path / f"images/{name}.png")
    write_image(tmp_path / "masks/a.png", "1")
    table = write_table(
        tmp_path,
        "\ufeffimage,mask,label,patient,device\n"
        "images/a.png,masks/a.png,Benign,p1,Aplio\n"
        "images/b.png,,1,p1,\n"
        "images/c.png,,2\n"
        "images/d.png,,,p2,\n"
        "images/a.png,,0,p3,\n"
        "images/e.png,,0,p3,\n"
        ",,0,p3,\n"
        "images/d2.png,,cyst,p3,\n",
    )
    for root in (table, tmp_path):
        reading = read("table", root)
        assert [(s.name, s.label, s.group, s.device) for s in reading.samples] == [
            ("images/a.png", 0, "p1", "Aplio"),
            ("images/b.png", 1, "p1", ""),
            ("images/c.png", 2, "images/c.png", ""),
            ("images/d.png", None, "p2", ""),
        ]
        assert reading.samples[0].masks == (tmp_path / "masks/a.png",)
        assert {s.name: s.reason for s in reading.skipped} == {
            "images/a.png": "the image is listed twice",
            "images/e.png": "the file is missing",
            "line 8": "no image is named",
            "images/d2.png": "the class is unknown",
        }


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", DataMissingError),
        ("file,label\na.png,0\n", DataMissingError),
        ("image,label\n", SiteEmptyError),
        ("image,label\na.png,cyst\n", SiteEmptyError),
        ("image,label\nmissing.png,0\n", DataUnreadableError),
    ],
)
def test_unusable_tables(text: str, error: type[Exception], tmp_path: Path) -> None:
    write_table(tmp_path, text)
    with pytest.raises(error):
        read("table", tmp_path)


def test_table_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_bytes(b"\xff\xfe\x00\x81\x00image")
    with pytest.raises(DataUnreadableError, match="UTF-8"):
        read("table", tmp_path)


def test_a_table_that_cannot_be_opened_is_not_called_badly_saved(tmp_path: Path) -> None:
    """A link to itself: root may open whatever a mode forbids."""
    (tmp_path / "table.csv").symlink_to(tmp_path / "table.csv")
    with pytest.raises(DataUnreadableError, match=r"cannot be opened; let the user"):
        read("table", tmp_path)


@pytest.mark.parametrize("kind", ["busi", "table"])
def test_a_folder_without_permission(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", forbidden)
    with pytest.raises(DataUnreadableError, match="may not be read"):
        read(kind, tmp_path)


def test_messages_hold_no_file_names(tmp_path: Path) -> None:
    write_table(tmp_path, "image\nanna-schmidt-1960.png\n")
    with pytest.raises(DataUnreadableError) as caught:
        read("table", tmp_path)
    assert "anna" not in str(caught.value)


@pytest.fixture(scope="module")
def public() -> Path:
    folder = os.environ.get("SONOFED_DATA")
    if not folder:
        pytest.skip("SONOFED_DATA is not set")
    return Path(folder)


@pytest.mark.data
def test_busi_counts_and_duplicates(public: Path) -> None:
    reading = read("busi", public)
    reasons = Counter(s.reason for s in reading.skipped)
    assert set(reasons) == {"duplicates bear different labels"}
    assert len(reading.samples) + len(reading.skipped) == 780
    dropped = Counter(s.name.split("/")[0] for s in reading.skipped)
    kept = Counter(s.label for s in reading.samples)
    assert kept[0] + dropped["benign"] == 437
    assert kept[1] + dropped["malignant"] == 210
    assert kept[2] + dropped["normal"] == 133
    assert sum(len(s.masks) > 1 for s in reading.samples) == 17

    # The list was made by a perceptual hash alone: 116 groups, 7 of them across classes.
    group = {s.name: s.group for s in reading.samples}
    out = {s.name for s in reading.skipped}
    with (public / "Dataset_BUSI_with_GT/near_duplicates.csv").open(newline="") as file:
        pairs = [
            (r["file_a"].removesuffix(".png"), r["file_b"].removesuffix(".png"))
            for r in csv.DictReader(file)
        ]
    agreed = [{a, b} <= out or (a in group and group[a] == group.get(b)) for a, b in pairs]
    assert np.mean(agreed) >= 0.95
    across = [pair for pair in pairs if len({name.split("/")[0] for name in pair}) > 1]
    assert across
    assert all(name in out for pair in across for name in pair)
    groups = Counter(group.values())
    assert 110 <= sum(size > 1 for size in groups.values()) <= 150
    assert max(groups.values()) <= 10


@pytest.mark.data
def test_busbra_counts(public: Path) -> None:
    reading = read("busbra", public / "BUSBRA")
    assert not reading.skipped
    assert Counter(s.label for s in reading.samples) == {0: 1268, 1: 607}
    assert len({s.group for s in reading.samples}) == 1064
    assert sorted(Counter(s.device for s in reading.samples).values()) == [25, 139, 809, 902]
    assert all(s.masks for s in reading.samples)


@pytest.mark.data
def test_breast_counts(public: Path) -> None:
    reading = read("breast", public)
    assert not reading.skipped
    assert Counter(s.label for s in reading.samples) == {0: 154, 1: 98, 2: 4}
    assert all(bool(s.masks) == (s.label != 2) for s in reading.samples)


@pytest.mark.data
def test_usgra_seg_counts(public: Path) -> None:
    reading = read("usgra_seg", public)
    assert not reading.skipped
    assert Counter(s.name.startswith("test/") for s in reading.samples) == {False: 204, True: 40}
    assert {s.label for s in reading.samples} == {None}
