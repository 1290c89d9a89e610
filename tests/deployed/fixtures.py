"""What tests of a deployment share; `tests/conftest.py` gives it to all of them."""

import tempfile
from pathlib import Path

import pytest

from deployed.deployment import Deployment
from deployed.deployment import undisturbed as in_one_process


@pytest.fixture
def root():
    # A short path: that of a socket may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="sonofed-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def undisturbed(laboratory, tmp_path_factory):
    """The outcome of the deployment's study in one process."""
    return in_one_process(laboratory, tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def deployment(laboratory):
    """A coordinator and two hospitals that are up."""
    with tempfile.TemporaryDirectory(prefix="sonofed-", dir="/tmp") as folder:
        deployment = Deployment(laboratory, Path(folder))
        try:
            deployment.up()
            yield deployment
        finally:
            deployment.down()
