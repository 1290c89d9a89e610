"""Settings of a site: its name, its data, its store and whom it trusts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from sonofed_common.contract.configuration import Model, read_toml, validate

PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", description="Ed25519 public key, hex")]


class SiteData(Model):
    """Where a site's images are and how they are read."""

    kind: str = Field(description="reader: busi, busbra, breast, usgra_seg or table")
    path: Path
    devices: tuple[str, ...] = Field(default=(), description="scanner name prefixes; empty for all")
    test_fraction: float = Field(default=0.1, gt=0, lt=1)
    split_seed: int = Field(default=0, ge=0)


class MasterKeySource(Model):
    """Where the master key of a site's store comes from: exactly one of the three."""

    file: Path | None = None
    environment: str | None = Field(default=None, description="name of a variable, hex")
    command: tuple[str, ...] = Field(default=(), description="prints the key, hex: a KMS client")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(map(bool, (self.file, self.environment, self.command))) != 1:
            raise ValueError("give exactly one of file, environment and command")
        return self


class SiteSettings(Model):
    """Everything an enclave needs to know of its hospital.

    Notes
    -----
    ``oracle`` answers the labelling of selected images with the data set's own labels. It exists
    for simulations; a hospital's labels come from its experts.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    store: Path
    data: SiteData
    coordinator_key: PublicKey
    image_key: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="hex; default: made on site, kept in the store",
    )
    oracle: bool = False
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads; default: torch's choice"
    )
    policy: Path | None = Field(default=None, description="egress policy; default: the standard")
    master_key: MasterKeySource | None = Field(
        default=None, description="default: a file beside the store, made on first use"
    )
    socket: Path | None = Field(
        default=None, description="unix socket of the enclave's process; default: in this process"
    )
    auto_approve: tuple[PublicKey, ...] = Field(
        default=(), description="coordinators whose studies need no person's word"
    )


def read_site(path: Path) -> SiteSettings:
    """Read a site's settings file.

    Raises
    ------
    ConfigurationError
        Unreadable file, unknown key or a value out of range.
    """
    return validate(SiteSettings, read_toml(path), path.name)
