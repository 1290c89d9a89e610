"""The one adapter between Records and Flower's RecordDict."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, RecordDict

from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.records import Records, check_header, from_bytes, to_bytes

_NAME, _FORM = "records", "safetensors"


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
