"""A project: what a coordinator writes down, and the folder that stands beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, field_validator

from sonofed_common.contract.configuration import Model, read_toml, validate
from sonofed_common.contract.enrolment import SITE_NAME
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.study import check_site_name


class Project(Model):
    """The coordinator's settings, one TOML file."""

    name: str = Field(pattern=SITE_NAME)
    address: str = Field(
        pattern=r"^[A-Za-z0-9.-]{1,253}:[0-9]{1,5}$", description="of the front, host:port"
    )
    sites: tuple[str, ...] = Field(min_length=1, description="hospitals that may enrol")
    contact: str = Field(max_length=300, description="whom a hospital calls")
    listen: str = Field(default="0.0.0.0", description="address that the front listens on")
    superlink_port: int = Field(default=8000, ge=1, le=65535, description="loopback only")
    health_port: int = Field(default=8001, ge=1, le=65535, description="loopback only")
    body_megabytes: int = Field(default=64, ge=16, description="largest request of a hospital")
    requests_per_second: int = Field(default=50, ge=1, description="of one address")

    @field_validator("sites")
    @classmethod
    def _names(cls, sites: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(sites)) != len(sites):
            raise ValueError("name each site once")
        return tuple(check_site_name(name) for name in sites)

    @property
    def host(self) -> str:
        """Name or address that the hospitals call."""
        return self.address.rpartition(":")[0]

    @property
    def port(self) -> int:
        """Port of the front."""
        return int(self.address.rpartition(":")[2])


@dataclass(frozen=True)
class Coordinator:
    """A project and the paths of its folder, which nobody else may read.

    Attributes
    ----------
    project : Project
        Settings.
    root : Path
        ``coordinator/`` beside the project's file.
    """

    project: Project
    root: Path

    @property
    def authority(self) -> Path:
        """Certificate of the project's own authority."""
        return self.root / "ca.pem"

    @property
    def authority_key(self) -> Path:
        """Its key; needed to renew only."""
        return self.root / "ca.key"

    @property
    def front(self) -> Path:
        """The front's certificate, which the hospitals see, and its key, in one file."""
        return self.root / "front.pem"

    @property
    def superlink_certificate(self) -> Path:
        """What the front and this machine's commands see; of the loopback addresses only."""
        return self.root / "superlink.pem"

    @property
    def superlink_key(self) -> Path:
        """Its key."""
        return self.root / "superlink.key"

    @property
    def signing_key(self) -> Path:
        """Signs bundles and kits."""
        return self.root / "coordinator.pem"

    @property
    def sites(self) -> Path:
        """One record of each enrolled hospital."""
        return self.root / "sites"

    @property
    def kits(self) -> Path:
        """One startup kit of each enrolled hospital."""
        return self.root / "kits"

    @property
    def studies(self) -> Path:
        """Workspaces of the studies."""
        return self.root / "studies"

    @property
    def flower(self) -> Path:
        """Flower's own files."""
        return self.root / "flower"

    @property
    def run(self) -> Path:
        """Where the supervisor keeps its state and the logs."""
        return self.root / "run"

    @property
    def front_log(self) -> Path:
        """What the front answered to whom, JSON lines."""
        return self.run / "front-access.log"


def read_coordinator(project: Path, *, new: bool = False) -> Coordinator:
    """Read a project's file and find its folder.

    Parameters
    ----------
    project : Path
        TOML file.
    new : bool
        Whether the folder is yet to be made.

    Raises
    ------
    ConfigurationError
        The file does not validate, or the folder is not there.
    """
    read = validate(Project, read_toml(project), project.name)
    root = project.resolve().parent / "coordinator"
    if not new and not (root / "ca.pem").is_file():
        raise ConfigurationError(
            f"{root} holds no keys; run 'sonofed-coordinator init {project}' first"
        )
    return Coordinator(read, root)
