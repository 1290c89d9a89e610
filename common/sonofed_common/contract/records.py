"""Records: what crosses between site and coordinator, and its codec (safetensors + JSON)."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from sonofed_common.contract.errors import ParameterError

HEADER_BYTES = 1024**2
"""Most of a record that is text: some eight thousand arrays. Read, JSON takes 24 times its size."""

TYPES = {
    "BOOL": "?",
    "I8": "i1",
    "U8": "u1",
    "I16": "<i2",
    "U16": "<u2",
    "F16": "<f2",
    "I32": "<i4",
    "U32": "<u4",
    "F32": "<f4",
    "I64": "<i8",
    "U64": "<u8",
    "F64": "<f8",
}
_NAMES = {np.dtype(kind): name for name, kind in TYPES.items()}
DIMENSIONS = 32
_END_OF_SIZES = 2**63

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


def check_header(data: bytes | bytearray) -> None:
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

    Raises
    ------
    ParameterError
        An array holds no numbers.
    """
    arrays = {name: _little(np.asarray(v, order="C")) for name, v in records.arrays.items()}
    # Wide values first, so that all are aligned; names next, for digests must repeat.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    parts = json.dumps({"config": records.config, "metrics": records.metrics})
    if any(array.dtype not in _NAMES for array in arrays.values()):
        raise ParameterError("an array of the records holds no numbers; send text in the config")
    header: dict[str, Any] = {"__metadata__": {"records": parts}}
    end = 0
    for name in order:
        begin, end = end, end + arrays[name].nbytes
        header[name] = {
            "dtype": _NAMES[arrays[name].dtype],
            "shape": arrays[name].shape,
            "data_offsets": (begin, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # Joined at once: safetensors' own writer holds every array twice beside what it returns.
    values = (arrays[name].reshape(-1).view(np.uint8).data for name in order)
    return b"".join([len(text).to_bytes(8, "little"), text, *values])


def _little(array: Array) -> Array:
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def from_bytes(data: bytes | bytearray) -> Records:
    """Decode what `to_bytes` wrote.

    Parameters
    ----------
    data : bytes or bytearray
        A safetensors file. Of a bytearray the arrays are views.

    Raises
    ------
    ParameterError
        The bytes are not such a file.
    """
    with _decoding():
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        parts = json.loads(header.pop("__metadata__")["records"])
        body = memoryview(data)[8 + size :]
        arrays = load(data) if isinstance(data, bytes) else views(header, body)
        return checked(arrays, parts["config"], parts["metrics"])


def read_config(path: Path) -> dict[str, Json]:
    """Read the configuration of a file of records, and none of its arrays.

    Parameters
    ----------
    path : Path
        Holds what `to_bytes` wrote.

    Raises
    ------
    OSError
        The file cannot be read.
    ParameterError
        It does not begin as such a file.
    """
    with path.open("rb") as file, _decoding():
        size = int.from_bytes(file.read(8), "little")
        # Before it is read: room for a damaged size is more than there is.
        if size > os.fstat(file.fileno()).st_size:
            raise ValueError("a header beyond the file's end")
        parts = json.loads(json.loads(file.read(size))["__metadata__"]["records"])
        return checked({}, parts["config"], parts["metrics"]).config


@contextmanager
def _decoding() -> Iterator[None]:
    try:
        yield
    except (
        *(SafetensorError, ValueError, KeyError, TypeError),
        *(AttributeError, OverflowError, RecursionError),
    ) as error:
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


def views(header: dict[str, Any], body: memoryview) -> dict[str, Array]:
    """Return the arrays of a safetensors file as views of it.

    Parameters
    ----------
    header : dict
        Of the file, without its metadata.
    body : memoryview
        What follows the header.

    Raises
    ------
    ValueError, KeyError, TypeError
        The header does not describe the body.
    """
    arrays, end = {}, 0
    for name, facts in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = np.dtype(TYPES[facts["dtype"]]), facts["shape"]
        begin, stop = facts["data_offsets"]
        # Before their product: that of many or long numbers takes seconds.
        if len(shape) > DIMENSIONS:
            raise ValueError("dimensions")
        if any(type(n) is not int or not 0 <= n < _END_OF_SIZES for n in (*shape, begin, stop)):
            raise ValueError("a size that is no count")
        if begin != end or stop - begin != math.prod(shape) * dtype.itemsize or stop > len(body):
            raise ValueError("offsets")
        arrays[name], end = np.frombuffer(body[begin:stop], dtype).reshape(shape), stop
    if end != len(body):
        raise ValueError("bytes of no array")
    return arrays
