"""The one adapter between Records and Flower's RecordDict."""

from __future__ import annotations

import json
import zipfile
from collections import OrderedDict

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.records import Records, checked

_ARRAYS, _JSON = "arrays", "json"
# The last two are what NumPy raises on empty and on zip-like bytes.
_MALFORMED = (KeyError, ValueError, TypeError, RecursionError, EOFError, zipfile.BadZipFile)


def to_recorddict(records: Records) -> RecordDict:
    """Pack records: arrays as an ArrayRecord, config and metrics as JSON in a ConfigRecord."""
    arrays = OrderedDict((k, Array(np.asarray(v, order="C"))) for k, v in records.arrays.items())
    texts = {"config": json.dumps(records.config), "metrics": json.dumps(records.metrics)}
    return RecordDict({_ARRAYS: ArrayRecord(arrays), _JSON: ConfigRecord(dict(texts))})


def from_recorddict(content: RecordDict) -> Records:
    """Unpack what `to_recorddict` packed.

    Raises
    ------
    ParameterError
        The message was not made by SonoFed.
    """
    try:
        arrays = {k: v.numpy() for k, v in content.array_records[_ARRAYS].items()}
        texts = content.config_records[_JSON]
        return checked(arrays, json.loads(str(texts["config"])), json.loads(str(texts["metrics"])))
    except _MALFORMED as error:
        raise ParameterError(
            "the message holds no SonoFed records; both sides need the same version"
        ) from error
