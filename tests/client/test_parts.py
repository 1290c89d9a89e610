"""Records that cross a socket in parts, whole or not at all."""

import gc
import hashlib
import json
import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from sonofed_client.enclave import parts
from sonofed_client.enclave.parts import TEXT_BYTES, TYPES, read, receive, send
from sonofed_client.enclave.room import Room
from sonofed_common.contract import enclave_pb2 as messages
from sonofed_common.contract.actions import Describe, parse, request
from sonofed_common.contract.errors import EngineError, ParameterError, PolicyError, SonoFedError
from sonofed_common.contract.records import Records
from sonofed_common.contract.study import MAX_SITES, Study

names = st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__")
tensors = st.sampled_from([np.dtype(code) for code in TYPES.values()]).flatmap(
    lambda dtype: arrays(dtype, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))
)
facts = st.dictionaries(names, st.one_of(st.integers(-(2**53), 2**53), st.text(max_size=20)))
records = st.builds(
    Records,
    st.dictionaries(names, tensors, max_size=4),
    facts,
    st.dictionaries(names, st.floats(allow_nan=False)),
)


def same(one, other):
    assert (one.config, one.metrics) == (other.config, other.metrics)
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        there = other.arrays[name]
        assert (array.dtype, array.shape) == (there.dtype, there.shape)
        assert array.tobytes() == there.tobytes()


@given(records, st.sampled_from([1, 7, 64, parts.PART_BYTES]))
def test_what_is_sent_arrives(sent, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_BYTES", size)
        stream = list(send(sent, "query.describe"))
    received = receive(stream)
    assert received.action == "query.describe"
    same(received.records, sent)
    assert all(len(part.data) <= 2 * size + 8 for part in stream)


@settings(max_examples=300, deadline=None)
@given(records, st.data())
def test_a_changed_stream_is_refused_or_the_same(sent, data):
    stream = list(send(sent))
    at = data.draw(st.integers(0, len(stream) - 1))
    change = data.draw(st.sampled_from(["drop", "repeat", "swap", "bytes"]))
    if change == "drop":
        del stream[at]
    elif change == "repeat":
        stream.insert(at, stream[at])
    elif change == "swap":
        to = data.draw(st.integers(0, len(stream) - 1))
        stream[at], stream[to] = stream[to], stream[at]
    else:
        encoded = bytearray(stream[at].SerializeToString())
        encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= data.draw(st.integers(1, 255))
        try:
            stream[at] = messages.Part.FromString(bytes(encoded))
        except Exception:
            return
    try:
        received = receive(stream, Room(2**20).memory)
    except SonoFedError:
        # Changed bytes may say that the sender failed.
        return
    same(received.records, sent)


@given(st.binary(max_size=200))
def test_any_bytes_are_records_or_refused(file):
    try:
        read(memoryview(file))
    except ParameterError:
        return


def test_a_failure_ends_a_stream():
    failed = parts.failure(PolicyError("not that", "rule"))
    with pytest.raises(PolicyError, match="not that"):
        receive([messages.Part(failure=failed)])


def test_room_is_for_so_much_and_comes_back_when_it_is_free():
    room = Room(600, 1000)
    with pytest.raises(ParameterError, match="601 bytes is more than this site takes") as error:
        room.memory(601)
    assert "600" not in error.value.message.replace("601", "")
    held = room.memory(600)
    with pytest.raises(EngineError, match="ask again later"):
        room.memory(401)
    other = room.memory(400)
    view = np.frombuffer(memoryview(held)[:8], np.uint8)
    del held
    gc.collect()
    with pytest.raises(EngineError):
        room.memory(1)
    del view, other
    gc.collect()
    room.memory(600)


def test_a_promise_that_is_not_kept_holds_no_room():
    room = Room(2**30, 2**30)
    large = messages.Part(head=messages.Head(size=2**30))
    for _ in range(3):
        with pytest.raises(ParameterError, match="ended before its last part"):
            receive([large], room.memory)


def file_of(text):
    header = json.dumps({"__metadata__": {"records": text}}).encode()
    header += b" " * (-len(header) % 8)
    return memoryview(len(header).to_bytes(8, "little") + header)


def peak(work):
    tracemalloc.start()
    try:
        with pytest.raises(ParameterError):
            work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def described(cohort):
    content = {"name": "t", "cohort": cohort}
    facts = {"study": "t", "seed": 1, "study_digest": "0" * 64, "content": content}
    return json.dumps({"config": facts, "metrics": {}})


WRONG = {
    "sites": {"sites": [1] * 30_000},
    "keys": {"sites": ["north"], **{f"{n:x}": 0 for n in range(9_000)}},
    "lists": {"sites": [[] for _ in range(30_000)]},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_small_message_costs_little_to_refuse(wrong):
    text = described(WRONG[wrong])
    file = file_of(text)
    assert peak(lambda: parse("query.describe", read(file))) < 200 * len(text) < 40e6
    assert peak(lambda: read(file_of(text + " " * TEXT_BYTES))) < 10 * len(text) + 10 * TEXT_BYTES
    begun = time.process_time()
    with pytest.raises(ParameterError):
        parse("query.describe", read(file))
    assert time.process_time() - begun < 3


@pytest.mark.parametrize(
    "shape",
    [[9] * 33, [2**63] * 32, [0, 2**64], [10**4000] * 200, [1] * 300_000],
    ids=["dimensions", "long", "none of a long", "very long", "many"],
)
def test_a_shape_is_refused_before_its_product(shape, monkeypatch):
    def product(_):
        raise AssertionError("a product of many or long numbers takes seconds")

    monkeypatch.setattr(math, "prod", product)
    facts = {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}
    header = json.dumps({"__metadata__": {"records": "{}"}, "w": facts}).encode()
    file = memoryview(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ParameterError, match="decoded"):
        receive(
            [
                messages.Part(head=messages.Head(action="query.missing", size=len(file))),
                messages.Part(data=bytes(file)),
                messages.Part(sha256=hashlib.sha256(file).digest()),
            ]
        )


def test_a_study_of_the_most_sites_comes_through():
    sites = [f"{n:03d}" + "x" * 61 for n in range(MAX_SITES)]
    study = Study(name="t", cohort={"sites": sites})
    facts = {"study": "t", "seed": 0, "study_digest": study.digest(), "content": study}
    sent = request(Describe(**facts))
    received = receive(send(sent, "query.describe")).records
    assert parse("query.describe", received).content == study
    assert len(json.dumps(sent.config)) < TEXT_BYTES / 3
    with pytest.raises(ValueError, match="at most"):
        Study(name="t", cohort={"sites": [*sites, "one more"]})


def test_a_long_action_or_header_is_refused_before_it_is_kept():
    with pytest.raises(ParameterError):
        receive(send(Records(), "query." + "x" * parts.ACTION_LENGTH))
    many = Records({f"{n:0200d}": np.zeros(1, np.uint8) for n in range(5_000)})
    with pytest.raises(ParameterError):
        receive(send(many, "query.missing"))
