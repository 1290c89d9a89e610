"""Settings of a site: its name, its data, its store and whom it trusts."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from sonofed_common.contract.configuration import Model, read_toml, validate


class SiteData(Model):
    """Where a site's images are and how they are read."""

    kind: str = Field(description="reader: busi, busbra, breast, usgra_seg or table")
    path: Path
    devices: tuple[str, ...] = Field(default=(), description="scanner name prefixes; empty for all")
    test_fraction: float = Field(default=0.1, gt=0, lt=1)
    split_seed: int = Field(default=0, ge=0)


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
    coordinator_key: str = Field(pattern=r"^[0-9a-f]{64}$", description="Ed25519 public key, hex")
    image_key: str | None = Field(
        default=None,
        pattern=r"^[0-9a-f]{64}$",
        description="hex; default: made on site, kept in the store",
    )
    oracle: bool = False
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads; default: torch's choice"
    )


def read_site(path: Path) -> SiteSettings:
    """Read a site's settings file.

    Raises
    ------
    ConfigurationError
        Unreadable file, unknown key or a value out of range.
    """
    return validate(SiteSettings, read_toml(path), path.name)
