"""Records: what crosses between site and coordinator, and its codec (safetensors + JSON)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sonofed_common.contract.errors import ParameterError

HEADER_BYTES = 1024**2
"""Most of a record that is text: some eight thousand arrays. Read, JSON takes 24 times its size."""

Json = Any
Array = NDArray[Any]


@dataclass(frozen=True)
class Records:
    """Arrays, configuration and metrics of one message.

    Attributes
    ----------
    arrays : dict of str to ndarray
        Named arrays of any shape; weights are stored as ``"<group>/<parameter>"``.
    config : dict of str to JSON value
        Parameters of an action, or facts about a reply.
    metrics : dict of str to int or float
        Numbers that a reply discloses.
    """

    arrays: dict[str, Array] = field(default_factory=dict)
    config: dict[str, Json] = field(default_factory=dict)
    metrics: dict[str, int | float] = field(default_factory=dict)

    def group(self, name: str) -> dict[str, Array]:
        """Return the arrays under ``name/``, without that prefix."""
        prefix = f"{name}/"
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    @property
    def nbytes(self) -> int:
        """Size of the arrays in bytes."""
        return sum(a.nbytes for a in self.arrays.values())

    def digest(self) -> str:
        """SHA-256 of the arrays, by name, dtype, shape and content."""
        digest = hashlib.sha256()
        for name in sorted(self.arrays):
            array = np.asarray(self.arrays[name], order="C")
            digest.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()


def grouped(name: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Prefix array names with ``name/``: the inverse of `Records.group`."""
    return {f"{name}/{k}": v for k, v in arrays.items()}


def is_named(name: str, key: str) -> bool:
    """Whether a key, an exact name or ``group/*``, is about an array of this name."""
    return name.startswith(key[:-1]) if key.endswith("/*") else name == key


def check_header(data: bytes) -> None:
    """Refuse records of a stranger whose text alone would take the reader's memory.

    Raises
    ------
    ParameterError
        The text is longer than `HEADER_BYTES`.
    """
    if int.from_bytes(data[:8], "little") > HEADER_BYTES:
        raise ParameterError("the text of the records is too long; send fewer arrays and facts")


def to_bytes(records: Records) -> bytes:
    """Encode records as one safetensors file whose metadata holds the JSON parts.

    Parameters
    ----------
    records : Records
        Non-finite metrics are allowed; arrays are copied to C order.
    """
    arrays = {k: np.asarray(v, order="C") for k, v in records.arrays.items()}
    # One metadata key: safetensors writes several in random order, and digests must repeat.
    parts = json.dumps({"config": records.config, "metrics": records.metrics})
    return save(arrays, {"records": parts})


def from_bytes(data: bytes) -> Records:
    """Decode what `to_bytes` wrote.

    Parameters
    ----------
    data : bytes
        A safetensors file.

    Raises
    ------
    ParameterError
        The bytes are not such a file.
    """
    try:
        arrays = load(data)
        size = int.from_bytes(data[:8], "little")
        parts = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["records"])
        return checked(arrays, parts["config"], parts["metrics"])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ParameterError(
            "the records cannot be decoded; send safetensors as encoded by SonoFed"
        ) from error


def checked(arrays: dict[str, Array], config: Json, metrics: Json) -> Records:
    """Make records of decoded parts.

    Raises
    ------
    TypeError
        A part has not the type that it was encoded from.
    """
    if not (isinstance(config, dict) and isinstance(metrics, dict)):
        raise TypeError("config and metrics are not objects")
    if any(array.dtype.kind not in "biuf" for array in arrays.values()):
        raise TypeError("an array holds no numbers")
    return Records(arrays, config, metrics)
