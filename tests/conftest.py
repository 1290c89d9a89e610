from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from sonofed_common.runtime import SILENT
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.scenarios.scenario import read_scenario

TINY = Path(__file__).parent / "integration" / "tiny.toml"

# Tests share the cores with each other: how long an example takes says nothing.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole studies first: a long file that starts last would leave the other core idle."""
    long = (TINY.parent, TINY.parent.parent / "simulations", TINY.parent.parent)
    order = {folder: number for number, folder in enumerate(long)}
    items.sort(key=lambda item: order.get(item.path.parent, len(long)))


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory) -> Laboratory:
    """A laboratory whose source is trained and whose hospitals have images, once for all tests."""
    root = tmp_path_factory.mktemp("laboratory")
    laboratory = Laboratory(read_scenario(str(TINY)), root, None, SILENT)
    laboratory.prepare_source()
    laboratory.prepare_sites(0)
    return laboratory
