"""How records cross a socket: one safetensors file, cut into parts, its digest last.

Neither side ever holds more than one copy of a record: the sender cuts the parts from the arrays
themselves, and what the receiver returns are views of the one buffer that it filled.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from sonofed_client.enclave.room import memory
from sonofed_common.contract.enclave_pb2 import Failure, Head, Part
from sonofed_common.contract.errors import ParameterError, SonoFedError, error_from_code
from sonofed_common.contract.records import HEADER_BYTES, TYPES, Array, Records, checked, views

PART_BYTES = 1024**2
"""A part is at most twice as large: below gRPC's own limit of 4 MiB."""
DESCRIPTION_BYTES = 1024**2
"""Longest description, which crosses in one message; it is facts, and no array."""

TEXT_BYTES = 128 * 1024
"""Longest config and metrics; a study of the most sites has a quarter of it."""

ACTION_LENGTH = 64
_NAMES = {np.dtype(code): name for name, code in TYPES.items()}


@dataclass(frozen=True)
class Received:
    """A record that came in whole.

    Attributes
    ----------
    action : str
        As the head names it.
    file : memoryview
        The safetensors file.
    sha256 : str
        Of the file, hex.
    records : Records
        Their arrays are views of ``file``.
    """

    action: str
    file: memoryview
    sha256: str
    records: Records


def send(records: Records, action: str = "") -> Iterator[Part]:
    """Cut records into parts.

    Parameters
    ----------
    records : Records
        Must not change meanwhile.
    action : str
        For the head.
    """
    header, arrays = _layout(records)
    yield Part(head=Head(action=action, size=len(header) + sum(a.nbytes for a in arrays)))
    digest = hashlib.sha256()
    for data in _cut([memoryview(header), *(a.reshape(-1).view(np.uint8).data for a in arrays)]):
        digest.update(data)
        yield Part(data=data)
    yield Part(sha256=digest.digest())


def receive(parts: Iterable[Part], allocate: Callable[[int], mmap.mmap] = memory) -> Received:
    """Put parts together.

    Parameters
    ----------
    parts : iterable of Part
        What `send` made.
    allocate : callable
        Gives memory of a size, or refuses by an error of the catalogue.

    Raises
    ------
    ParameterError
        The parts are not one whole record.
    SonoFedError
        The sender ended the stream with a failure, or there is no memory for the record.
    """
    stream = iter(parts)
    first = next(stream, None)
    if first is None or first.WhichOneof("part") != "head":
        _refuse(first)
    size = first.head.size
    if size <= 8 or len(first.head.action) > ACTION_LENGTH:
        _refuse(first)
    file = memoryview(allocate(size))
    digest, filled = hashlib.sha256(), 0
    for part in stream:
        kind = part.WhichOneof("part")
        if kind == "data" and filled + len(part.data) <= size:
            data = part.data
            file[filled : filled + len(data)] = data
            filled += len(data)
            digest.update(data)
        elif kind == "sha256" and filled == size and part.sha256 == digest.digest():
            return Received(first.head.action, file, digest.hexdigest(), read(file))
        else:
            _refuse(part)
    raise ParameterError("the record ended before its last part; send it again")


def read(file: memoryview) -> Records:
    """Return the records of a safetensors file; their arrays are views of it.

    Raises
    ------
    ParameterError
        It is no such file.
    """
    try:
        size = int.from_bytes(file[:8], "little")
        if not 2 <= size <= min(len(file) - 8, HEADER_BYTES):
            raise ValueError("size of the header")
        header = json.loads(bytes(file[8 : 8 + size]))
        text = header.pop("__metadata__")["records"]
        if len(text) > TEXT_BYTES:
            raise ParameterError("the facts that come with the record are too long; send fewer")
        texts = json.loads(text)
        arrays = views(header, file[8 + size :])
        return checked(arrays, texts["config"], texts["metrics"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise ParameterError(
            "the records cannot be decoded; send safetensors as encoded by SonoFed"
        ) from None


def failure(error: SonoFedError) -> Failure:
    """Return an error of the catalogue as it crosses the socket."""
    return Failure(code=error.code, sentence=error.message)


def _layout(records: Records) -> tuple[bytes, list[Array]]:
    arrays = {
        name: np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
        for name, array in records.arrays.items()
    }
    # Wide types first: every array then lies at a multiple of its item's size.
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    texts = json.dumps({"config": records.config, "metrics": records.metrics})
    header: dict[str, Any] = {"__metadata__": {"records": texts}}
    end = 0
    for name in order:
        array = arrays[name]
        if array.dtype not in _NAMES:
            raise ParameterError(f"an array of type {array.dtype} cannot be sent; convert it")
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded, [arrays[name] for name in order]


def _cut(pieces: Iterable[memoryview]) -> Iterator[bytes]:
    held = bytearray()
    for piece in pieces:
        for start in range(0, len(piece), PART_BYTES):
            part = piece[start : start + PART_BYTES]
            if not held and len(part) == PART_BYTES:
                # Most parts: copied once, not twice.
                yield bytes(part)
                continue
            held += part
            if len(held) >= PART_BYTES:
                yield bytes(held)
                held.clear()
    if held:
        yield bytes(held)


def _refuse(part: Part | None) -> NoReturn:
    if part is not None and part.WhichOneof("part") == "failure":
        raise error_from_code(part.failure.code, part.failure.sentence)
    raise ParameterError("the parts are not those of one record; send it again")
