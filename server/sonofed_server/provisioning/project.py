"""A project: what a coordinator writes down, and the folder that stands beside it."""

from __future__ import annotations

import ipaddress
import os
import pwd
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from sonofed_common.contract.configuration import Model, read_toml, validate
from sonofed_common.contract.enrolment import SITE_NAME
from sonofed_common.contract.errors import ConfigurationError, DeploymentError
from sonofed_common.contract.study import check_site_name

LAST_PORT = 65535
HOST_PART = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
"""Between the dots of a name (RFC 1123)."""


class Project(Model):
    """The coordinator's settings, one TOML file."""

    name: str = Field(pattern=SITE_NAME)
    address: str = Field(
        pattern=r"^[A-Za-z0-9.-]{1,253}:[0-9]{1,5}$", description="of the front, host:port"
    )
    sites: tuple[str, ...] = Field(min_length=1, description="hospitals that may enrol")
    contact: str = Field(max_length=300, description="whom a hospital calls")
    listen: str = Field(default="0.0.0.0", description="IP address that the front listens on")
    superlink_port: int = Field(default=8000, ge=1, le=65535, description="loopback only")
    health_port: int = Field(default=8001, ge=1, le=65535, description="loopback only")
    body_megabytes: int = Field(default=64, ge=16, description="largest request of a hospital")
    requests_per_second: int = Field(default=50, ge=1, description="of one address")

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        return check_site_name(name)

    @field_validator("address")
    @classmethod
    def _address(cls, address: str) -> str:
        host, _, port = address.rpartition(":")
        if not 1 <= int(port) <= LAST_PORT:
            raise ValueError(f"{port} is no port; use 1 to {LAST_PORT}")
        if not all(map(HOST_PART.fullmatch, host.split("."))):
            raise ValueError(f"{host!r} is no name or IPv4 address of a machine")
        return address

    @field_validator("listen")
    @classmethod
    def _listen(cls, listen: str) -> str:
        try:
            return str(ipaddress.ip_address(listen.removeprefix("[").removesuffix("]")))
        except ValueError:
            raise ValueError(
                f"{listen[:64]!r} is no IP address; use that of a card of this machine, or 0.0.0.0"
            ) from None

    @model_validator(mode="after")
    def _ports(self) -> Self:
        if len({self.port, self.superlink_port, self.health_port}) < 3:
            raise ValueError(
                "the ports of address, superlink_port and health_port are the same for two; give "
                "each its own"
            )
        return self

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
        return run_folder(self.root)

    @property
    def registered(self) -> Path:
        """There once the SuperLink knows who is enrolled; gone when the conductor starts anew."""
        return self.run / "conductor.registered"

    @property
    def conductor_sign(self) -> Path:
        """Touched by the conductor at each piece of work, and gone when it starts anew."""
        return self.run / "conductor.sign"

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
    DeploymentError
        The superuser asks, and the folder is another account's.
    """
    read = validate(Project, read_toml(project), project.name)
    return Coordinator(read, find_root(project, new=new))


def find_root(project: Path, *, new: bool = False) -> Path:
    """Find a project's folder, whatever its file says.

    Parameters
    ----------
    project, new
        See `read_coordinator`.

    Raises
    ------
    ConfigurationError
        The folder is not there.
    """
    root = project.resolve().parent / "coordinator"
    _refuse_superuser(root)
    if not new and not (root / "ca.pem").is_file():
        raise ConfigurationError(
            f"{root} holds no keys; run 'sonofed-coordinator init {project}' first"
        )
    return root


def run_folder(root: Path) -> Path:
    """Where in a project's folder the supervisor keeps its state and the logs."""
    return root / "run"


def _refuse_superuser(root: Path) -> None:
    # What it writes is closed to the account that the processes run under.
    owner = root.stat().st_uid if root.exists() else 0
    if os.geteuid() != 0 or owner == 0:
        return
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = str(owner)
    raise DeploymentError(
        f"{root} belongs to {name}, to whom what root writes there is closed; run this as that "
        f"account: runuser -u {name} -- sonofed-coordinator ..."
    )
