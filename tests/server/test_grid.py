"""Messages that the grid takes apart and puts together are those of Flower, part for part."""

import numpy as np
import pytest
from flwr.app import Message
from flwr.app.message import array as flower_array
from flwr.app.message.array import ArrayChunk
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid, http_grid

from sonofed_common.contract.recorddict import (
    PART_BYTES,
    PATIENCE,
    from_recorddict,
    send_larger_parts,
    to_recorddict,
)
from sonofed_common.contract.records import Records
from sonofed_server.study.grid import hasten, put_together, take_apart

GENERATOR = np.random.default_rng(0)
ARRAYS = {
    "weights/random": GENERATOR.random((1500, 1000)),
    # Parts that are the same have the same id, and travel once.
    "weights/zero": np.zeros((3000, 1000)),
    "counter": np.array(3),
}


@pytest.fixture
def message(monkeypatch):
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    content = to_recorddict(Records(ARRAYS, {"round": 1}, {"loss": 0.5}))
    message = Message(content, 1, "train.classifier")
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def test_a_message_is_whole_after_its_way(message):
    objects, there = get_all_nested_objects(message), {}
    take_apart(dict(objects), there.__setitem__, object_ids_to_push=set(objects))
    assert there == {name: one.deflate() for name, one in objects.items()}
    flower = inflate_object_from_contents(message.object_id, dict(there))
    ours = put_together(message.object_id, there)
    assert not there
    assert ours.metadata.message_type == flower.metadata.message_type
    back, expected = from_recorddict(ours.content), from_recorddict(flower.content)
    assert back.digest() == expected.digest() == Records(ARRAYS).digest()
    assert (back.config, back.metrics) == (expected.config, expected.metrics)


def test_parts_are_larger_than_flowers(monkeypatch):
    name = "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE"
    monkeypatch.setattr(flower_array, name, getattr(flower_array, name))
    send_larger_parts()
    content = to_recorddict(Records({"weights": np.frombuffer(GENERATOR.bytes(25_000_000), "u1")}))
    parts = [len(o.data) for o in get_all_nested_objects(content).values() if type(o) is ArrayChunk]
    assert len(parts) == 4
    assert max(parts) == PART_BYTES and sum(parts) >= 25_000_000


def test_the_grid_of_a_running_app_gets_patience(monkeypatch):
    for name in ("pull_objects", "push_objects", "inflate_object_from_contents"):
        monkeypatch.setattr(http_grid, name, getattr(http_grid, name))
    name = "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE"
    monkeypatch.setattr(flower_array, name, getattr(flower_array, name))
    grid = HttpGrid("localhost:1", insecure=True, token="any")
    client = grid._runtime_client
    hasten(grid)
    assert client._client.timeout == PATIENCE
    grid.close()


def test_only_what_is_missing_is_sent(message):
    objects, there = get_all_nested_objects(message), {}
    take_apart(dict(objects), there.__setitem__, object_ids_to_push={message.object_id})
    assert list(there) == [message.object_id]


def test_a_part_that_cannot_be_sent_ends_it(message):
    def fail(name, content):
        raise OSError("full")

    objects = get_all_nested_objects(message)
    with pytest.raises(OSError, match="full"):
        take_apart(objects, fail, object_ids_to_push=set(objects))
