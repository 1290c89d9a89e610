"""The one adapter between Records and Flower's RecordDict, and how its messages are sent."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import httpx
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.app.message import array as flower_array
from flwr.supercore.inflatable.inflatable_object import InflatableObject

from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.records import Records, check_header, from_bytes, to_bytes

_NAME, _FORM = "records", "safetensors"

PATIENCE = httpx.Timeout(180.0, connect=30.0)
"""How long an answer to one of Flower's calls may take; with Flower it is thirty seconds, in which
the parts that go at a time cross no slow link, and a busy SuperLink does not always answer."""

PUSHES = 2
"""Parts that are on their way to the SuperLink at a time, as with Flower."""

PART_BYTES = 7 * 1024**2
"""Largest part of an array. Flower's is 5 MB, but a request is as much work for the SuperLink as
megabytes are; larger ones cost memory where they arrive.
"""


def send_larger_parts() -> None:
    """Have this process take arrays apart into parts of `PART_BYTES`."""
    vars(flower_array)["FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE"] = PART_BYTES


def to_recorddict(records: Records) -> RecordDict:
    """Pack records as one array of bytes, encoded as by `to_bytes`.

    Notes
    -----
    Flower sends, stores and confirms each array by itself, and a network has hundreds, most of them
    tiny: one large array takes a fraction of the calls.
    """
    data = to_bytes(records)
    packed = Array(dtype="uint8", shape=(len(data),), stype=_FORM, data=data)
    return RecordDict({_NAME: ArrayRecord({_NAME: packed})})


def packed_bytes(content: RecordDict) -> int:
    """Size of what `to_recorddict` packed; 0 for a message of another form."""
    try:
        return len(content.array_records[_NAME][_NAME].data)
    except KeyError:
        return 0


def from_recorddict(content: RecordDict) -> Records:
    """Unpack what `to_recorddict` packed.

    Raises
    ------
    ParameterError
        The message was not made by SonoFed, or holds more text than a site takes.
    """
    try:
        data = content.array_records[_NAME][_NAME].data
    except KeyError:
        raise ParameterError(
            "the message holds no SonoFed records; both sides need the same version"
        ) from None
    check_header(data)
    return from_bytes(data)


def take_apart(
    objects: dict[str, InflatableObject],
    push_object_fn: Callable[[str, bytes], None],
    *,
    object_ids_to_push: set[str],
) -> None:
    """Send objects to the SuperLink, a few at a time.

    Parameters
    ----------
    objects : dict of str to InflatableObject
        By id.
    push_object_fn : callable
        Sends an object.
    object_ids_to_push : set of str
        Those that are not there yet.
    """
    running: set[Future[None]] = set()
    with ThreadPoolExecutor(PUSHES) as pool:
        for name in [n for n in objects if n in object_ids_to_push]:
            if len(running) == PUSHES:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for one in done:
                    one.result()
            running.add(pool.submit(push_object_fn, name, objects[name].deflate()))
        for one in running:
            one.result()
