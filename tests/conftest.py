from pathlib import Path

import pytest

from sonofed_common.runtime import SILENT
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.scenarios.scenario import read_scenario

TINY = Path(__file__).parent / "integration" / "tiny.toml"


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory) -> Laboratory:
    """A laboratory whose source is trained and whose hospitals have images, once for all tests."""
    root = tmp_path_factory.mktemp("laboratory")
    laboratory = Laboratory(read_scenario(str(TINY)), root, None, SILENT)
    laboratory.prepare_source()
    laboratory.prepare_sites(0)
    return laboratory
