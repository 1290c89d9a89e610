import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import closing, suppress

import numpy as np
import pytest

from sonofed_client.enclave.blobs import HEADER_BYTES, Blobs
from sonofed_client.enclave.keys import NONCE_BYTES
from sonofed_client.enclave.store import CataloguedImage, Store
from sonofed_common.contract.errors import StoreError
from sonofed_common.contract.records import Records
from sonofed_common.runtime import write_atomically
from sonofed_common.security import sha256


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
    assert len(blobs(store)) == 1 and store.get_bytes("b") == b"three"
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
    write, written = Blobs.write, []

    def failing(self, digest, data):
        if len(written) == 2:
            raise OSError("the disk is gone")
        written.append(digest)
        write(self, digest, data)

    monkeypatch.setattr(Blobs, "write", failing)
    with pytest.raises(OSError, match="gone"):
        store.put_many({name: records(n) for n, name in enumerate("abc", start=1)})
    assert len(written) == 2 and len(blobs(store)) == 1
    assert store.names("") == {"a"} and store.get("a").config == {"n": 0}
    monkeypatch.undo()
    store.put_many({name: records(n) for n, name in enumerate("abc", start=1)})
    assert [store.get(name).config["n"] for name in "abc"] == [1, 2, 3]


def blob_files(store):
    return sorted(p for p in (store.folder / "blobs").rglob("*") if p.is_file())


def test_nothing_private_is_on_the_disk(store):
    pixels = np.arange(4096, dtype=np.uint8).reshape(1, 64, 64) ^ 0x5A
    store.put("pixels/64", Records({"pixels": pixels}, {"note": "Müller"}))
    store.put_bytes("files", b"/scans/mueller_anna.png")
    store.catalogue([CataloguedImage("0" * 16, "mueller_anna.png", "pool", 1, "patient-4711", 0)])
    names = Store(store.folder).images()[0]
    assert (names.name, names.group) == ("mueller_anna.png", "patient-4711")
    secrets = [pixels.tobytes()[start : start + 16] for start in range(0, 256, 16)]
    secrets += [b"mueller", b"patient-4711", b"safetensors", b"note", store.image_key()]
    files = [p for p in store.folder.rglob("*") if p.is_file()]
    assert len(files) >= 5
    for path in files:
        data = path.read_bytes()
        assert not [s for s in secrets if s in data], path.name
        assert path.stat().st_mode & 0o777 == 0o600, path.name
    # Nor does a name tell what a blob holds: it is not the digest of anything in it.
    digest = store.digest("pixels/64")
    assert all(digest not in p.name and sha256(p.read_bytes()) != p.name for p in files)


def test_every_blob_has_its_own_nonce_and_every_site_its_own_names(store, tmp_path):
    twin = Store(tmp_path / "twin")
    for each in (store, twin):
        for number in range(40):
            each.put_bytes(str(number), f"content {number}".encode())
    heads = [p.read_bytes()[: HEADER_BYTES + NONCE_BYTES] for p in blob_files(store)]
    heads += [p.read_bytes()[: HEADER_BYTES + NONCE_BYTES] for p in blob_files(twin)]
    assert len(heads) == len({head[HEADER_BYTES:] for head in heads}) == 80
    assert not set(blobs(store)) & set(blobs(twin))
    # The same content once more is encrypted anew, in the same file.
    store.put_bytes("again", store.get_bytes("0"))
    assert len(blobs(store)) == 40
    news = [h for p in blob_files(store) if (h := p.read_bytes()[: len(heads[0])]) not in heads]
    assert len(news) == 1


def test_a_blob_in_the_place_of_another_is_found(store):
    store.put_bytes("a", b"one of this length")
    first = blob_files(store)[0]
    store.put_bytes("b", b"two of this length")
    second = next(p for p in blob_files(store) if p != first)
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    for name in "ab":
        with pytest.raises(StoreError, match="damaged"):
            store.get_bytes(name)
    first.write_bytes(one)
    second.write_bytes(two)
    assert store.get_bytes("a") == b"one of this length"


def test_every_flipped_bit_and_every_cut_of_a_blob_is_found(store):
    store.put_bytes("a", b"content")
    store.put_bytes("b", b"beside it")
    digest = store.digest("a")
    path = store._blobs._path(digest)
    whole = path.read_bytes()
    spoilt = [whole[:length] for length in range(len(whole))] + [whole + b"x"]
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        spoilt.append(bytes(flipped))
    for data in spoilt:
        path.write_bytes(data)
        with pytest.raises(StoreError, match="damaged"):
            store.get_bytes("a")
    assert store.get_bytes("b") == b"beside it"
    store.put_bytes("a", b"content")
    assert store.get_bytes("a") == b"content"


@pytest.mark.parametrize("damage", [b"", b"other", None])
def test_a_damaged_blob_is_named_so(store, damage):
    store.put("a", records(1))
    path = blob_files(store)[0]
    path.unlink() if damage is None else path.write_bytes(damage)
    with pytest.raises(StoreError, match="damaged"):
        store.get("a")


def test_a_damaged_catalogue_is_named_so(store):
    store.put("a", records(1))
    store._catalogue._engine.dispose()
    (store.folder / "store.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match=r"catalogue.*damaged"):
        Store(store.folder)


def test_a_private_row_in_the_place_of_another_is_found(store):
    store.catalogue([image(0), image(1)])
    with sqlite3.connect(store.folder / "store.sqlite") as connection:
        connection.execute("UPDATE images SET sealed = (SELECT max(sealed) FROM images)")
    with pytest.raises(StoreError, match="damaged"):
        store.images()


def kept(store):
    return store.images(), store.images("pool"), store.annotations()


def test_a_flipped_bit_of_an_image_or_a_label_is_found_or_says_nothing_else(store):
    store.catalogue([image(0), image(1, "test")])
    store.annotate([(image(0).id, 1)], "expert")
    before, path = kept(store), store.folder / "store.sqlite"
    store._catalogue._engine.dispose()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = path.read_bytes()
    # A label of 0 or 1 is a bit of the row's header, before what is found here.
    rows = [whole.find(f"{image(0).id}{part}".encode()) for part in ("pool", "expert")]
    places = [8 * (row + n) + bit for row in rows for n in range(-10, 26) for bit in (0, 3, 6)]
    assert min(rows) > 0
    found = 0
    for place in places:
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        for name in ("store.sqlite-wal", "store.sqlite-shm"):
            (store.folder / name).unlink(missing_ok=True)
        try:
            damaged = Store(store.folder, store.keys)
            assert kept(damaged) == before
        except StoreError:
            found += 1
        damaged._catalogue._engine.dispose()
    assert found > len(places) // 2


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE images SET label = 1",
        "UPDATE images SET label = NULL",
        "UPDATE images SET part = 'test'",
        "UPDATE images SET position = 3 - position",
        "UPDATE images SET id = 'x' || id",
        "UPDATE images SET sealed = 5",
        "DELETE FROM images WHERE position = 1",
        "UPDATE annotations SET label = 0",
        "UPDATE annotations SET author = 'somebody else'",
        "UPDATE annotations SET image = 'b'",
        "DELETE FROM annotations",
        "DELETE FROM totals",
        "INSERT INTO annotations SELECT 'b', label, author, time, sealed FROM annotations",
    ],
)
def test_an_edit_of_the_catalogue_is_found(store, edit):
    store.catalogue([image(0), image(1)])
    store.annotate([("a", 1)], "expert")
    with sqlite3.connect(store.folder / "store.sqlite") as connection:
        connection.execute(edit)
    with pytest.raises(StoreError, match=r"catalogue.*damaged"):
        kept(store)
    if "annotations" in edit:
        with pytest.raises(StoreError, match=r"catalogue.*damaged"):
            store.annotate([("c", 1)], "expert")


@pytest.mark.parametrize("what", ["images", "annotations"])
def test_rows_that_go_together_with_their_total_are_missed(store, what):
    store.catalogue([image(0), image(1)])
    store.annotate([("a", 1)], "expert")
    with sqlite3.connect(store.folder / "store.sqlite") as connection:
        connection.execute(f"DELETE FROM {what}")
        connection.execute("DELETE FROM totals WHERE name = ?", (what,))
    with pytest.raises(StoreError, match=r"catalogue.*damaged"):
        kept(Store(store.folder))


def test_a_new_store_is_empty_and_sound(store):
    assert kept(store) == kept(Store(store.folder)) == ([], [], {})


@pytest.mark.parametrize("version", [0, 2, 7])
def test_a_store_of_another_version_is_named(store, version):
    with sqlite3.connect(store.folder / "store.sqlite") as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    with pytest.raises(StoreError, match="another version"):
        Store(store.folder)


def test_an_unencrypted_store_is_refused(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "store.sqlite").write_bytes(b"")
    with pytest.raises(StoreError, match="did not encrypt"):
        Store(tmp_path / "old")


def test_what_a_dead_process_left_unfinished_goes_in_time(store):
    store.put_bytes("a", b"whole")
    old, fresh = (store.folder / "blobs" / "unfinished" / f".{n}.tmp" for n in ("old", "fresh"))
    for path in (old, fresh):
        path.write_bytes(b"half of")
    os.utime(old, (0, 0))
    again = Store(store.folder)
    assert not old.exists() and fresh.exists() and again.get_bytes("a") == b"whole"


def test_a_killed_writer_leaves_one_of_two_whole_states(store):
    store.put_bytes("kept", b"kept")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from sonofed_client.enclave.store import Store\n"
        "from sonofed_common.contract.records import Records\n"
        "store = Store(Path(sys.argv[1]))\n"
        "print('ready', flush=True)\n"
        "for n in range(10**6):\n"
        "    store.put_many({name: Records(config={'n': n, 'of': name}) for name in 'ab'})\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(store.folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout.readline() == "ready\n"
        for _ in range(20):
            kept = [store.get(name) for name in "ab"]
            assert all(k is None or k.config["of"] == n for k, n in zip(kept, "ab", strict=True))
            time.sleep(0.02)
    finally:
        writer.kill()
        writer.communicate()
    again = Store(store.folder)
    assert again.get_bytes("kept") == b"kept"
    first, second = again.get("a"), again.get("b")
    assert (first is None) == (second is None)
    assert first is None or first.config["n"] == second.config["n"]


def test_threads_and_a_second_store_share_one_folder(store):
    twin = Store(store.folder)
    failures = []

    def work(own, number):
        try:
            for turn in range(6):
                own.put_bytes(f"of {number}", f"{number} {turn}".encode())
                own.put_bytes("shared", b"the same" if turn % 2 else b"another")
                assert own.get_bytes(f"of {number}") == f"{number} {turn}".encode()
                assert own.get_bytes("shared") in (b"the same", b"another")
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=(own, number))
        for number, own in enumerate((store, twin, store, twin))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(blobs(store)) == 5


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB, mounted for the test."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    options = ["-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    done = subprocess.run(["mount", *options], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        for size in (65536, 4096):
            with suppress(OSError):
                while file.write(b"\1" * size):
                    pass
    return filler


def test_a_full_disk_is_named_and_costs_nothing_that_was_there(small_disk):
    store = Store(small_disk / "store")
    store.put_many({"a": records(1), "b": records(2)})
    store.catalogue([image(0)])
    with pytest.raises(StoreError, match="disk of the site's store is full"):
        store.put_bytes("a", os.urandom(3 * 1024**2))
    with pytest.raises(StoreError, match="full"):
        store.put_many({"b": records(3), "c": Records({"x": np.ones(10**6)})})
    assert len(blobs(store)) == 2
    filler = fill(small_disk)
    assert shutil.disk_usage(small_disk).free == 0
    for attempt in (
        lambda: store.put("a", records(4)),
        lambda: store.catalogue([image(n) for n in range(1, 6000)]),
        lambda: store.keys.rotate(),
    ):
        with pytest.raises(StoreError, match="full"):
            attempt()
    assert [store.get(name).config["n"] for name in "ab"] == [1, 2]
    assert store.images() == [image(0)] and store.names("") == {"a", "b"}
    filler.unlink()
    again = Store(small_disk / "store")
    assert [again.get(name).config["n"] for name in "ab"] == [1, 2]
    assert again.images() == [image(0)] and len(blobs(again)) == 2
    again.put("a", records(4))
    again.keys.rotate()
    assert Store(small_disk / "store").get("a").config == {"n": 4}


def test_a_new_store_on_a_full_disk_is_made_later(small_disk):
    filler = fill(small_disk)
    with pytest.raises(StoreError, match="full"):
        Store(small_disk / "store")
    filler.unlink()
    Store(small_disk / "store").put_bytes("a", b"a")


def test_a_large_blob_is_not_held_twice(store):
    size = 32 * 1024**2
    data = os.urandom(size)
    tracemalloc.start()
    try:
        store.put_bytes("large", data)
        written = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        read = store.get_bytes("large")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert read == data
    assert written < 0.5 * size and peak < 1.5 * size


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


def test_a_file_has_its_permissions_from_the_first_byte_on(tmp_path, monkeypatch):
    path, seen = tmp_path / "key", []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (seen.append(os.fstat(fd).st_mode & 0o777), fsync(fd))
    )
    write_atomically(path, b"secret", mode=0o600)
    assert seen == [0o600] and path.stat().st_mode & 0o777 == 0o600
