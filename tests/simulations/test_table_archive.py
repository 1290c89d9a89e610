from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import pytest

from sonofed_common.contract.errors import ConfigurationError
from sonofed_simulations.tables.archive import ARCHIVE, pack, unpack


@pytest.fixture
def table(tmp_path: Path) -> Path:
    out = tmp_path / "table"
    for name in (
        "cells/seed-0/FedAvg, two.safetensors",
        "cells/seed-1/FedAvg.safetensors",
        "redrawn/seed-1/blur/site.safetensors",
    ):
        path = out / "work" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(name.encode())
    (out / "work" / "source").mkdir()
    (out / "work" / "source" / "weights.safetensors").write_bytes(b"large")
    return out


def held(out: Path) -> dict[str, bytes]:
    work = out / "work"
    return {p.relative_to(work).as_posix(): p.read_bytes() for p in work.rglob("*.safetensors")}


def test_cells_go_to_another_machine_and_what_is_there_stays(table: Path, tmp_path: Path) -> None:
    pack(table, "aggregation")
    first = (table / ARCHIVE).read_bytes()
    other = tmp_path / "other"
    (other / "work" / "cells" / "seed-0").mkdir(parents=True)
    (other / "work" / "cells" / "seed-0" / "FedAvg, two.safetensors").write_bytes(b"own")
    shutil.copy(table / ARCHIVE, other)
    unpack(other)
    assert held(other) == {
        "cells/seed-0/FedAvg, two.safetensors": b"own",
        "cells/seed-1/FedAvg.safetensors": b"cells/seed-1/FedAvg.safetensors",
    }
    shutil.copy(table / "work/cells/seed-0/FedAvg, two.safetensors", other / "work/cells/seed-0")
    pack(other, "aggregation")
    assert (other / ARCHIVE).read_bytes() == first


def test_tables_that_share_their_work_pack_their_own_cells(table: Path) -> None:
    pack(table, "adaptation-reconstruction")
    with tarfile.open(table / ARCHIVE) as archive:
        assert archive.getnames() == ["redrawn/seed-1/blur/site.safetensors"]


def test_a_table_without_cells_writes_no_archive(tmp_path: Path) -> None:
    unpack(tmp_path)
    pack(tmp_path, "aggregation")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../cells.safetensors", "cells/../../x", "/cells/x", "source/x"])
def test_what_is_no_cell_is_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / ARCHIVE, mode="w:xz") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(ConfigurationError, match="no cell"):
        unpack(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [ARCHIVE]


def test_a_damaged_archive_is_said(table: Path) -> None:
    pack(table, "aggregation")
    whole = (table / ARCHIVE).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no archive"):
        (table / ARCHIVE).write_bytes(damaged)
        with pytest.raises(ConfigurationError, match="delete it"):
            unpack(table)
