"""The egress policy of a hospital: what may be asked, and what may leave. Deny by default."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from sonofed_common.contract.actions import ACTIONS, Parameters
from sonofed_common.contract.configuration import Model, read_toml, validate
from sonofed_common.contract.errors import PolicyError
from sonofed_common.contract.records import Array, Records
from sonofed_common.security import sha256

STANDARD = Path(__file__).parent / "policies" / "standard.toml"
Kind = Literal["count", "counts", "digest", "digests", "text", "texts"]
Received = Callable[[], Mapping[str, Array]]
"""Makes the arrays that an update starts from: what came with the request, or a common start."""


class Limit(Model):
    """What a parameter may be; of a list, each of its entries."""

    least: float | None = None
    most: float | None = None
    values: tuple[str | int | float | bool, ...] | None = None

    def allows(self, value: Any) -> bool:
        """Whether a value, or each value of a list, is inside the limit."""
        if isinstance(value, list | tuple):
            return all(self.allows(v) for v in value)
        if self.values is not None and value not in self.values:
            return False
        if self.least is None and self.most is None:
            return True
        if not isinstance(value, int | float):
            return False
        low = self.least is None or value >= self.least
        return low and (self.most is None or value <= self.most)


class ArrayRule(Model):
    """Arrays that may leave.

    Notes
    -----
    With ``clip`` the enclave limits the L2 norm of the arrays' common change from what the site
    received, and with ``noise`` it adds Gaussian noise of standard deviation ``noise * clip``.
    """

    key: str = Field(min_length=1, description="exact name, or 'group/*'")
    dtypes: tuple[str, ...] = Field(min_length=1)
    numbers: int = Field(ge=1, description="most numbers in all arrays of this rule together")
    counts: bool = Field(default=False, description="they count images; min_count holds")
    small: Literal["refuse", "zero"] = Field(default="refuse", description="counts < min_count")
    rows: tuple[str, ...] = Field(default=(), description="arrays whose rows go with small counts")
    clip: float | None = Field(default=None, gt=0, description="largest L2 norm of the change")
    noise: float | None = Field(default=None, gt=0, description="standard deviation over clip")

    @field_validator("key")
    @classmethod
    def _star_last(cls, key: str) -> str:
        if "*" in key and not (key.endswith("/*") and key.count("*") == 1 and len(key) > 2):
            raise ValueError("a key is an exact name or ends in '/*'")
        return key

    @model_validator(mode="after")
    def _noise_needs_clip(self) -> Self:
        if self.noise is not None and self.clip is None:
            raise ValueError("noise needs a clip: without one it bounds nothing")
        return self

    def names(self, name: str) -> bool:
        """Whether the rule is about an array of this name."""
        return name.startswith(self.key[:-1]) if self.key.endswith("*") else name == self.key


class ActionRule(Model):
    """What one action may be asked for, and what its reply may hold."""

    parameters: dict[str, Limit] = Field(default_factory=dict, description="by dotted name")
    secure_aggregation: bool = Field(default=False, description="its arrays leave as sums only")
    min_count: int = Field(default=1, ge=1, description="smallest count, but 0, to disclose")
    message_bytes: int | None = Field(default=None, ge=0, description="default: the policy's")
    arrays: tuple[ArrayRule, ...] = ()
    config: dict[str, Kind] = Field(default_factory=dict)
    metrics: tuple[str, ...] = ()
    counted: tuple[str, ...] = Field(default=(), description="metrics that count images")
    withheld: tuple[str, ...] = Field(default=(), description="metrics that are taken out")

    @model_validator(mode="after")
    def _one_fate(self) -> Self:
        names = [*self.metrics, *self.counted, *self.withheld]
        if len(set(names)) != len(names):
            raise ValueError("name each metric once, in metrics, counted or withheld")
        return self


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
            for path in rule.parameters:
                if not _is_parameter(ACTIONS[action], path):
                    raise ValueError(f"{path!r} is no parameter of {action}")
        return self

    def digest(self) -> str:
        """SHA-256 of the validated policy."""
        return sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode())

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
