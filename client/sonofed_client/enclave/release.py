"""Release: a reply is checked key by key against the policy, clipped and noised where it asks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sonofed_client.enclave.policy import Policy, Received
from sonofed_client.enclave.privacy import privatise
from sonofed_client.enclave.rules import ActionRule, ArrayRule
from sonofed_common.contract.errors import PolicyError
from sonofed_common.contract.records import Array, Records

MAX_ENTRIES = 100_000
"""Most entries of a list in a reply's configuration."""

MAX_TEXTS = 32
SMALLEST_MEASURED = 5
"""Fewest images whose metrics may leave a site: those of one are that image's own numbers."""

MEASURED = "measured"
"""Fact of a reply that never leaves: how many images there are behind the metric with the fewest;
default: ``examples``."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_TEXT = re.compile(r"[A-Za-z0-9 _.,:;()+/@#\-]{0,128}")


@dataclass(frozen=True)
class Released:
    """A reply as it may leave.

    Attributes
    ----------
    records : Records
        What leaves.
    rule : str
        Clause of the policy that let it.
    privacy : dict of str to float
        ``<key> clip`` and ``<key> noise`` of each rule that was applied; empty without.
    kept_as : str
        Artifact that gives the same noise to the same question again; empty without noise.
    """

    records: Records
    rule: str
    privacy: dict[str, float] = field(default_factory=dict)
    kept_as: str = ""


def release(policy: Policy, action: str, reply: Records, received: Received) -> Released:
    """Check a reply and make it fit to leave; metrics over too few images are taken out.

    Parameters
    ----------
    policy : Policy
        The hospital's.
    action : str
        What was asked; the policy has admitted it.
    reply : Records
        What the site would answer.
    received : callable
        The arrays that an update starts from; called only where a rule clips.

    Returns
    -------
    Released

    Raises
    ------
    PolicyError
        Something in the reply is not named, has another type or more numbers than the policy says,
        or discloses too small a count. The sentence says nothing that is not in the contract.
    """
    rule = policy.actions.get(action)
    if rule is None:
        raise PolicyError(f"this site's policy does not allow {action}", "actions")
    where = f"actions.{action}"
    try:
        config = dict(reply.config)
        measured = config.pop(MEASURED, config.get("examples"))
        _check_config(rule, config)
        metrics = _metrics(rule, reply.metrics, measured)
        arrays, privacy = _arrays(rule, reply.arrays, received)
    except _UnfitError as unfit:
        raise PolicyError(
            f"this site's policy does not let this reply of {action} leave: {unfit.sentence}",
            f"{where}.{unfit.clause}",
        ) from None
    return Released(Records(arrays, config, metrics), where, privacy)


class _UnfitError(Exception):
    def __init__(self, clause: str, sentence: str) -> None:
        super().__init__(sentence)
        self.clause, self.sentence = clause, sentence


def _check_config(rule: ActionRule, config: Mapping[str, Any]) -> None:
    for name, value in config.items():
        kind = rule.config.get(name)
        if kind is None:
            raise _UnfitError("config", "it holds a fact that the policy does not name")
        clause = f"config.{name}"
        if kind in ("count", "counts"):
            counts = [value] if kind == "count" else value
            if not (isinstance(counts, list) and len(counts) <= MAX_ENTRIES):
                raise _UnfitError(clause, f"{name} is no list of counts")
            _check_counts(clause, name, counts, rule.min_count)
        elif not _CHECKS[kind](value):
            raise _UnfitError(clause, f"{name} is no {kind}")


def _metrics(rule: ActionRule, metrics: Mapping[str, Any], measured: Any) -> dict[str, int | float]:
    kept: dict[str, int | float] = {}
    enough = type(measured) is int and measured >= max(rule.min_count, SMALLEST_MEASURED)
    for name, value in metrics.items():
        if name in rule.withheld:
            continue
        if name in rule.counted:
            whole = int(value) if type(value) is float and value.is_integer() else value
            _check_counts(f"counted.{name}", name, [whole], rule.min_count)
        elif name not in rule.metrics:
            raise _UnfitError("metrics", "it holds a metric that the policy does not name")
        # A whole number of any length could carry anything.
        if type(value) not in (int, float) or (type(value) is int and abs(value) >= 2**63):
            raise _UnfitError(f"metrics.{name}", f"{name} is no number")
        if enough or name in rule.counted:
            kept[name] = value
    return kept


def _arrays(
    rule: ActionRule, arrays: Mapping[str, Array], received: Received
) -> tuple[dict[str, Array], dict[str, float]]:
    found: dict[int, dict[str, Array]] = {}
    for name, array in arrays.items():
        number = next((n for n, r in enumerate(rule.arrays) if r.names(name)), None)
        if number is None:
            raise _UnfitError("arrays", "it holds an array that the policy does not name")
        if array.dtype.name not in rule.arrays[number].dtypes:
            raise _UnfitError(
                f"arrays.{rule.arrays[number].key}", "an array has another number type"
            )
        found.setdefault(number, {})[name] = array
    kept, privacy = dict(arrays), dict[str, float]()
    for number, group in found.items():
        own = rule.arrays[number]
        clause = f"arrays.{own.key}"
        if sum(array.size for array in group.values()) > own.numbers:
            raise _UnfitError(clause, f"{own.key} holds more numbers than the policy lets leave")
        if own.counts:
            kept |= _large_counts(clause, own, rule.min_count, group, kept)
        if own.clip is not None:
            start = received()
            if {n: (a.shape, a.dtype) for n, a in group.items()} != {
                n: (a.shape, a.dtype) for n, a in start.items() if own.names(n)
            }:
                raise _UnfitError(clause, f"{own.key} has no common start to clip the change from")
            kept |= privatise(group, start, own.clip, own.noise or 0.0)
            privacy |= {f"{own.key} clip": own.clip, f"{own.key} noise": own.noise or 0.0}
    return kept, privacy


def _large_counts(
    clause: str,
    rule: ArrayRule,
    least: int,
    group: Mapping[str, Array],
    arrays: Mapping[str, Array],
) -> dict[str, Array]:
    changed: dict[str, Array] = {}
    for name, counts in group.items():
        small = (counts > 0) & (counts < least)
        if np.any(counts < 0) or (rule.small == "refuse" and np.any(small)):
            raise _UnfitError(clause, f"{name} holds a count that is too small to disclose")
        if not np.any(small):
            continue
        hidden = _with_complement(counts, small, least)
        changed[name] = np.where(hidden, 0, counts).astype(counts.dtype)
        for other in rule.rows:
            rows = np.array(arrays.get(other, ()))
            if rows.shape[: counts.ndim] != counts.shape:
                raise _UnfitError(clause, f"{other} does not fit the counts in {name}")
            rows[hidden] = 0
            changed[other] = rows
    return changed


def _with_complement(counts: Array, small: NDArray[np.bool_], least: int) -> NDArray[np.bool_]:
    """Hide the smallest shown counts too, until those hidden are together no small count.

    Where the total is known, as that of a pool is, what is left of it would tell them.
    """
    hidden = small.copy()
    for place in np.argsort(counts, axis=None, kind="stable"):
        if counts[hidden].sum() >= least:
            break
        hidden.flat[place] |= counts.flat[place] > 0
    return hidden


def _check_counts(clause: str, name: str, counts: list[Any], least: int) -> None:
    for count in counts:
        if type(count) is not int or not 0 <= count < 2**63:
            raise _UnfitError(clause, f"{name} is no count")
        if 0 < count < least:
            raise _UnfitError(clause, f"{name} is too small a count to disclose")


def _is_digest(value: Any) -> bool:
    return value is None or (isinstance(value, str) and bool(_DIGEST.fullmatch(value)))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(_TEXT.fullmatch(value))


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "digest": _is_digest,
    "digests": lambda value: (
        isinstance(value, list) and len(value) <= MAX_ENTRIES and all(map(_is_digest, value))
    ),
    "text": _is_text,
    "texts": lambda value: (
        isinstance(value, dict)
        and len(value) <= MAX_TEXTS
        and all(_is_text(part) for pair in value.items() for part in pair)
    ),
}
