"""Flower's Grid, with less memory, shorter pauses, larger parts and more patience.

A reply can be seen before its parts are there. Flower then waits for a second, for two, up to ten
before it asks for a part again; a part takes much less. While it puts a message together it holds
it three times, while it takes one apart, twice. It repeats a call that is not answered within
thirty seconds, although the SuperLink may have done what was asked. Nothing else is changed.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import partial
from typing import Any, cast

import numpy as np
from flwr.app import Array, ArrayRecord
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_head_values_from_object_content,
)
from flwr.supercore.inflatable.inflatable_utils import inflatable_class_registry, pull_objects
from flwr.superlink.grid import http_grid

from sonofed_common.contract.recorddict import PATIENCE, send_larger_parts, take_apart

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0
"""Seconds."""

MARGIN = 2**16
"""Bytes of an array beyond its values, at most."""


def hasten(grid: Grid) -> None:
    """Have this process's grid ask sooner, wait longer, move larger parts, and hold them once."""
    send_larger_parts()
    hasty = partial(pull_objects, initial_backoff=FIRST_PAUSE, backoff_cap=LONGEST_PAUSE)
    vars(http_grid).update(
        pull_objects=hasty, inflate_object_from_contents=put_together, push_objects=take_apart
    )
    if isinstance(grid, http_grid.HttpGrid):
        # It has a connection before the app is loaded.
        grid._runtime_client._client.timeout = PATIENCE


def put_together(name: str, contents: dict[str, bytes]) -> InflatableObject:
    """Make an object of its parts, which are given up for it one by one.

    Parameters
    ----------
    name : str
        The object's id.
    contents : dict of str to bytes
        Of the object and all that it is made of, by id; empty in the end.

    Returns
    -------
    InflatableObject
        The data of its arrays are bytearrays.
    """
    content = contents.pop(name)
    kind, children, length = get_object_head_values_from_object_content(content)
    body = content[len(content) - length :]
    if kind == Array.__qualname__:
        return _array(json.loads(body), children, contents)
    made = {child: put_together(child, contents) for child in children}
    if kind != ArrayRecord.__qualname__:
        return inflatable_class_registry[kind].inflate(content, made)
    # Flower's own takes bytes alone, and would copy them.
    record = ArrayRecord()
    for key, child in json.loads(body).items():
        record[key] = cast(Array, made[child])
    return record


def _array(facts: dict[str, Any], children: list[str], contents: dict[str, bytes]) -> Array:
    order = [children[number] for number in facts["arraychunk_ids"]]
    left, data = Counter(order), bytearray()
    most = MARGIN + math.prod(facts["shape"]) * np.dtype(facts["dtype"]).itemsize
    for part in order:
        if len(data) > most:
            raise ValueError("an array has more parts than it is large")
        content = contents[part]
        length = get_object_head_values_from_object_content(content)[2]
        data += memoryview(content)[len(content) - length :]
        left[part] -= 1
        if not left[part]:
            del contents[part]
    array = Array(facts["dtype"], tuple(facts["shape"]), facts["stype"], b"")
    vars(array)["data"] = data
    return array
