import os
import time

import numpy as np
import pytest

from sonofed_client.enclave import store as store_module
from sonofed_client.enclave.store import CataloguedImage, Store
from sonofed_common.contract.errors import SonoFedError
from sonofed_common.contract.records import Records
from sonofed_common.runtime import write_atomically


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def blobs(store):
    return sorted(p.name for p in (store.folder / "blobs").rglob("*") if p.is_file())


def records(number):
    return Records({"x": np.full(4, number)}, {"n": number})


def image(position, part="pool"):
    return CataloguedImage(f"{position:016x}", f"{position}.png", part, 0, f"p{position}", position)


def test_keeps_records_and_bytes_over_a_restart(store):
    store.put("a", records(1))
    store.put_bytes("b", b"raw")
    store.put_bytes("empty", b"")
    again = Store(store.folder)
    kept = again.get("a")
    assert kept.config == {"n": 1} and kept.arrays["x"].tolist() == [1] * 4
    assert again.get_bytes("b") == b"raw" and again.get_bytes("empty") == b""
    assert again.get("none") is None and again.get_bytes("none") is None


def test_a_replaced_blob_goes_and_a_shared_one_stays(store):
    store.put_bytes("a", b"one")
    store.put_bytes("b", b"one")
    assert len(blobs(store)) == 1
    store.put_bytes("a", b"two")
    assert len(blobs(store)) == 2 and store.get_bytes("b") == b"one"
    store.put_bytes("b", b"three")
    assert len(blobs(store)) == 2 and store.get_bytes("a") == b"two"
    store.remove("a")
    assert blobs(store) == [store.digest("b")]
    store.remove("")
    assert blobs(store) == [] and store.names("") == set()


def test_the_same_bytes_again_change_nothing(store):
    store.put("a", records(1))
    store.put("a", records(1))
    assert len(blobs(store)) == 1 and store.get("a").config == {"n": 1}


def test_names_are_prefixes_taken_literally(store):
    for name in ("job/1", "job/2", "jobs", "j_b/3"):
        store.put_bytes(name, name.encode())
    assert store.names("job/") == {"job/1", "job/2"}
    assert store.names("j_b") == {"j_b/3"}
    store.remove("j_b")
    assert store.names("") == {"job/1", "job/2", "jobs"}


def test_put_many_keeps_all_or_none(store, monkeypatch):
    store.put("a", records(0))
    whole = store_module.write_atomically

    def full_disk(path, data):
        if len(blobs(store)) == 2:
            raise OSError("no space left on device")
        whole(path, data)

    monkeypatch.setattr(store_module, "write_atomically", full_disk)
    with pytest.raises(OSError, match="no space"):
        store.put_many({name: records(n) for n, name in enumerate("abc", start=1)})
    assert store.names("") == {"a"} and store.get("a").config == {"n": 0}
    monkeypatch.undo()
    store.put_many({name: records(n) for n, name in enumerate("abc", start=1)})
    assert [store.get(name).config["n"] for name in "abc"] == [1, 2, 3]


@pytest.mark.parametrize("damage", [b"", b"other", None])
def test_a_damaged_blob_is_named_so(store, damage):
    store.put("a", records(1))
    path = next(p for p in (store.folder / "blobs").rglob("*") if p.is_file())
    path.unlink() if damage is None else path.write_bytes(damage)
    with pytest.raises(SonoFedError, match="damaged"):
        store.get("a")


def test_trim_drops_the_least_recently_used(store):
    for name in ("job/1", "job/2", "job/3", "kept"):
        store.put_bytes(name, name.encode() * 20)
        time.sleep(0.01)
    store.get_bytes("job/1")
    store.trim("job/", 250)
    assert store.names("") == {"job/1", "job/2", "job/3", "kept"} - {"job/2"}
    store.trim("job/", 100)
    assert store.names("") == {"job/1", "kept"}
    store.trim("job/", 100)
    store.trim("nothing/", 0)
    assert store.names("") == {"job/1", "kept"} and len(blobs(store)) == 2


def test_the_catalogue_has_one_order_and_is_replaced_whole(store):
    store.catalogue([image(2), image(0, "test"), image(1)])
    assert [i.position for i in store.images()] == [0, 1, 2]
    assert [i.position for i in store.images("pool")] == [1, 2]
    assert store.images("test") == [image(0, "test")]
    store.catalogue([image(5)])
    assert store.images() == [image(5)]


def test_a_second_label_replaces_the_first(store):
    store.annotate([("b", 0), ("a", 1)], "expert")
    store.annotate([], "nobody")
    store.annotate([("b", 1)], "second expert")
    assert store.annotations() == {"a": 1, "b": 1}
    assert list(store.annotations()) == ["a", "b"]


def test_only_the_owner_may_read_and_the_key_stays(store):
    key = store.image_key()
    assert len(key) == 32 and Store(store.folder).image_key() == key
    assert store.folder.stat().st_mode & 0o777 == 0o700
    assert (store.folder / "image.key").stat().st_mode & 0o777 == 0o600


def test_a_file_has_its_permissions_from_the_first_byte_on(tmp_path, monkeypatch):
    path, seen = tmp_path / "key", []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (seen.append(os.fstat(fd).st_mode & 0o777), fsync(fd))
    )
    write_atomically(path, b"secret", mode=0o600)
    assert seen == [0o600] and path.stat().st_mode & 0o777 == 0o600
