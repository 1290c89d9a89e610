"""Rules of an egress policy: limits of parameters, arrays that may leave, and all of one action."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.records import is_named

Kind = Literal["count", "counts", "digest", "digests", "text", "texts"]


class Limit(Model):
    """What a parameter may be; of a list, each of its entries."""

    least: float | None = None
    most: float | None = None
    values: tuple[str | int | float | bool, ...] | None = None

    @model_validator(mode="after")
    def _limits(self) -> Self:
        if self.least is None and self.most is None and not self.values:
            raise ValueError("a limit names least, most or values; one without them limits nothing")
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ValueError("least is above most; no value would pass")
        return self

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

    @model_validator(mode="after")
    def _small_counts(self) -> Self:
        if not self.counts and (self.small == "zero" or self.rows):
            raise ValueError("small and rows are about counts; say counts = true")
        if self.rows and self.small != "zero":
            raise ValueError("rows go with counts that are set to zero; say small = 'zero'")
        return self

    def names(self, name: str) -> bool:
        """Whether the rule is about an array of this name."""
        return is_named(name, self.key)


class ActionRule(Model):
    """What one action may be asked for, and what its reply may hold."""

    parameters: dict[str, Limit] = Field(default_factory=dict, description="by dotted name")
    secure_aggregation: bool = Field(default=False, description="its arrays leave as sums only")
    min_count: int = Field(default=1, ge=1, description="smallest count, but 0, to disclose")
    message_bytes: int | None = Field(default=None, ge=0, description="default: the policy's")
    releases: int | None = Field(
        default=None, ge=1, description="noised replies that may leave for one study"
    )
    marked_share: float = Field(
        default=1.0, gt=0, le=1, description="of the pool, that a study may have labelled"
    )
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

    @model_validator(mode="after")
    def _fitting_arrays(self) -> Self:
        keys = [rule.key for rule in self.arrays]
        if len(set(keys)) != len(keys):
            raise ValueError("give one rule for each key of arrays")
        if self.is_noised != (self.releases is not None):
            raise ValueError(
                "noise and releases go together: fresh noise on replies without number averages out"
            )
        for rule in self.arrays:
            others = {key for key in keys if key != rule.key and not key.endswith("*")}
            if strange := [name for name in rule.rows if name not in others]:
                raise ValueError(f"rows name {strange[0]!r}, which no other rule of arrays has")
            if rule.small == "zero" and others and not rule.rows:
                raise ValueError(f"small counts in {rule.key} go to zero; name what goes with them")
            if rule.small == "zero" and self.min_count == 1:
                raise ValueError(f"no count in {rule.key} is small; give the action a min_count")
        return self

    @property
    def is_noised(self) -> bool:
        """Whether noise is added to any of its arrays."""
        return any(rule.noise is not None for rule in self.arrays)
