"""The egress policy of a hospital: what may be asked, and what may leave. Deny by default."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, Field, model_validator

from sonofed_client.enclave.rules import ActionRule
from sonofed_common.contract.actions import ACTIONS, Parameters
from sonofed_common.contract.configuration import Model, read_toml, validate
from sonofed_common.contract.errors import PolicyError, StoreError
from sonofed_common.contract.records import Array, Records
from sonofed_common.security import sha256

STANDARD = Path(__file__).parent / "policies" / "standard.toml"
SYNTHETIC_RULE = Path(__file__).parent / "policies" / "synthetic_images.toml"
"""What a hospital that lets synthetic images of its own leave appends to its policy."""

RUNNING_POLICY = "policy.sha256"
"""File of a site's store: digest of the policy that the enclave read when it started."""

Received = Callable[[], Mapping[str, Array]]
"""Makes the arrays that an update starts from: what came with the request, or a common start."""


class Policy(Model):
    """An egress policy.

    Attributes
    ----------
    actions : dict of str to ActionRule
        What is not named here is not done.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    coordinators: tuple[str, ...] = Field(
        default=(), description="public keys; empty: the one of the site's settings"
    )
    received_bytes: int = Field(ge=0, description="largest request")
    message_bytes: int = Field(ge=0, description="largest reply")
    study_bytes: int = Field(ge=0, description="of all replies of a study")
    day_bytes: int = Field(ge=0, description="of all replies of 24 hours")
    actions: dict[str, ActionRule]

    @model_validator(mode="after")
    def _known(self) -> Self:
        for action, rule in self.actions.items():
            if action not in ACTIONS:
                raise ValueError(f"{action!r} is no action; known: {', '.join(ACTIONS)}")
            if rule.marked_share < 1 and action != "train.select":
                raise ValueError(f"marked_share is of train.select; {action} marks nothing")
            for path in rule.parameters:
                if not _is_parameter(ACTIONS[action], path):
                    raise ValueError(f"{path!r} is no parameter of {action}")
        return self

    def digest(self) -> str:
        """SHA-256 of the validated policy."""
        return sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode())

    def check_coordinator(self, key: str) -> None:
        """Check the coordinator's public key that a site's settings name.

        Raises
        ------
        PolicyError
            The policy names others only.
        """
        if self.coordinators and key not in self.coordinators:
            raise PolicyError(
                "the policy's coordinators do not name the coordinator_key of the site's settings",
                "coordinators",
            )

    def admit(self, parameters: Parameters, action: str, request: Records) -> None:
        """Let a request in.

        Raises
        ------
        PolicyError
            The policy does not name the action, or not with these parameters or this size.
        """
        rule = self.actions.get(action)
        if rule is None:
            raise PolicyError(f"this site's policy does not allow {action}", "actions")
        if request.nbytes > self.received_bytes:
            raise PolicyError(f"the request of {action} is too large for this site", "received")
        if rule.secure_aggregation:
            raise PolicyError(
                f"this site's policy lets {action} answer by secure aggregation only; the study "
                "does not use it",
                f"actions.{action}.secure_aggregation",
            )
        values = parameters.model_dump(mode="json")
        for path, limit in rule.parameters.items():
            if not limit.allows(_value(values, path)):
                raise PolicyError(
                    f"this site's policy refuses the {path} of {action} that the study asks for",
                    f"actions.{action}.parameters.{path}",
                )

    def check_releases(self, action: str, before: int) -> None:
        """Check whether a study may have one more noised reply of an action.

        Raises
        ------
        PolicyError
            So many left before.
        """
        most = self.actions[action].releases
        if most is not None and before >= most:
            raise PolicyError(
                f"this site's policy lets no more noised replies of {action} leave for this study",
                f"actions.{action}.releases",
            )

    def check_bytes(self, action: str, size: int, study: int, day: int) -> None:
        """Check a reply against the budgets.

        Parameters
        ----------
        action : str
            What was asked.
        size : int
            Bytes of the reply.
        study, day : int
            Bytes that left before for this study, and in the last 24 hours.

        Raises
        ------
        PolicyError
            A budget is used up.
        """
        own = self.actions[action].message_bytes
        budgets = (
            ("message", size, self.message_bytes if own is None else own),
            ("study", study + size, self.study_bytes),
            ("day", day + size, self.day_bytes),
        )
        for name, total, most in budgets:
            if total > most:
                raise PolicyError(
                    f"the reply of {action} exceeds what this site's policy lets leave per {name}",
                    f"{name}_bytes",
                )


def read_policy(path: Path | None) -> Policy:
    """Read a policy file; None reads the standard one.

    Raises
    ------
    ConfigurationError
        Unreadable file, unknown key, action or parameter, or a value out of range.
    """
    path = path or STANDARD
    return validate(Policy, read_toml(path), path.name)


def policy_of_all() -> Policy:
    """Return a policy that names every action: the standard one and what that leaves out."""
    return validate(Policy, tomllib.loads(policy_text_of_all()), SYNTHETIC_RULE.name)


def policy_text_of_all() -> str:
    """Return the TOML of `policy_of_all`: one file appended to the other, as a hospital does it."""
    parts = [path.read_text(encoding="utf-8") for path in (STANDARD, SYNTHETIC_RULE)]
    return "\n".join(parts)


def running_policy(store: Path) -> str | None:
    """Return the digest of the policy that a store's enclave started with; None before the first.

    Raises
    ------
    StoreError
        It cannot be read.
    """
    try:
        return (store / RUNNING_POLICY).read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        raise StoreError(
            f"{RUNNING_POLICY} of the site's store cannot be read; run this as the enclave's user"
        ) from None


def _is_parameter(model: type[BaseModel], path: str) -> bool:
    current: Any = model
    for part in path.split("."):
        if not (isinstance(current, type) and issubclass(current, BaseModel)):
            return False
        if part not in current.model_fields:
            return False
        current = current.model_fields[part].annotation
    return True


def _value(values: Any, path: str) -> Any:
    for part in path.split("."):
        values = values[part]
    return values
