"""The folder of a hospital's installation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from sonofed_common.contract.configuration import Model, read_toml, validate
from sonofed_common.contract.errors import ConfigurationError


class RelaySettings(Model):
    """How this machine runs the hospital's processes; ``relay.toml``."""

    socket: Path | None = Field(
        default=None, description="of the enclave; default: what site.toml says"
    )
    health_port: int = Field(default=9095, ge=1, le=65535, description="supervisor's, loopback")


@dataclass(frozen=True)
class Hospital:
    """Paths of a hospital's installation.

    Attributes
    ----------
    root : Path
        Absolute.
    """

    root: Path

    @property
    def site(self) -> Path:
        """Settings of the enclave."""
        return self.root / "site.toml"

    @property
    def policy(self) -> Path:
        """The hospital's egress policy."""
        return self.root / "policy.toml"

    @property
    def relay(self) -> Path:
        """Settings of the relay."""
        return self.root / "relay.toml"

    @property
    def node_key(self) -> Path:
        """Private key by which Flower knows the node, OpenSSH."""
        return self.root / "node.key"

    @property
    def master_key(self) -> Path:
        """Wraps the store's keys; better kept elsewhere."""
        return self.root / "master.key"

    @property
    def store(self) -> Path:
        """The encrypted store."""
        return self.root / "store"

    @property
    def request(self) -> Path:
        """The signed enrolment request."""
        return self.root / "request.json"

    @property
    def kit(self) -> Path:
        """Link to the kit in use."""
        return self.root / "kit"

    @property
    def authority(self) -> Path:
        """Certificate of the coordinator's authority."""
        return self.kit / "ca.pem"

    @property
    def run(self) -> Path:
        """Where the supervisor keeps its state and the logs."""
        return self.root / "run"

    @property
    def heartbeat(self) -> Path:
        """Touched by each answered heartbeat of the node, and gone when it starts anew."""
        return self.run / "supernode.heartbeat"

    @property
    def socket(self) -> Path:
        """Of the enclave."""
        return self.run / "enclave.sock"

    @property
    def relay_settings(self) -> RelaySettings:
        """What ``relay.toml`` says.

        Raises
        ------
        ConfigurationError
            It is absent or does not validate.
        """
        if not self.relay.is_file():
            raise ConfigurationError(
                f"{self.root} holds no installed kit; run 'sonofed-site install KIT' there first"
            )
        return validate(RelaySettings, read_toml(self.relay), self.relay.name)
