"""What all tests share.

Every worker loads every file of tests, so libraries that take seconds to load are imported by the
tests that use them.
"""

import shutil
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from sonofed_common.runtime import SILENT
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.scenarios.scenario import read_scenario

pytest_plugins = ["deployed.fixtures", "two_programs"]

TINY = Path(__file__).parent / "integration" / "tiny.toml"

# Tests share the cores with each other: how long an example takes says nothing.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole studies first: a long file that starts last would leave the other core idle."""
    long = (TINY.parent, TINY.parent.parent / "simulations", TINY.parent.parent)
    order = {folder: number for number, folder in enumerate(long)}
    items.sort(key=lambda item: order.get(item.path.parent, len(long)))


@pytest.fixture(autouse=True)
def no_late_counts(tmp_path):
    """Have enclaves of this process write their counts while the test's folder is there."""
    yield
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.cancel()
            thread.function(*thread.args, **thread.kwargs)


def trained(root) -> Laboratory:
    laboratory = Laboratory(read_scenario(str(TINY)), root, None, SILENT)
    with laboratory.alone():
        laboratory.prepare_source()
        laboratory.write_phantoms()
    return laboratory


def copy_trained(laboratory: Laboratory, out: Path) -> Path:
    for part in ("source", "phantoms"):
        shutil.copytree(laboratory.root / part, out / part)
    shutil.copy(laboratory.key, out / "coordinator.pem")
    return out


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory, worker_id) -> Laboratory:
    """A laboratory whose source is trained and whose hospitals have images, once for all tests."""
    root = tmp_path_factory.mktemp("laboratory")
    if worker_id != "master":
        # The workers' folders are in one: the first of them trains, and each has its copy.
        copy_trained(trained(tmp_path_factory.getbasetemp().parent / "laboratory"), root)
    laboratory = trained(root)
    laboratory.prepare_sites(0)
    return laboratory


@pytest.fixture
def prepared(laboratory, tmp_path) -> Path:
    """An output folder that holds the laboratory's phantoms and source, to train none again."""
    return copy_trained(laboratory, tmp_path / "out")
