import tempfile
from pathlib import Path

import pytest

from deployed.deployment import Deployment
from deployed.deployment import undisturbed as in_one_process


@pytest.fixture(scope="session")
def undisturbed(laboratory, tmp_path_factory):
    return in_one_process(laboratory, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def root():
    # A short path: that of a socket may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="sonofed-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def deployment(laboratory):
    with tempfile.TemporaryDirectory(prefix="sonofed-", dir="/tmp") as folder:
        deployment = Deployment(laboratory, Path(folder))
        try:
            deployment.up()
            yield deployment
        finally:
            deployment.down()
