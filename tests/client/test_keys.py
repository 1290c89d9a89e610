import json
import os
import sys

import pytest
from typer.testing import CliRunner

from sonofed_client.cli import app
from sonofed_client.enclave.keys import KeyRing
from sonofed_client.enclave.master_key import MasterKey
from sonofed_client.enclave.store import Store, open_store
from sonofed_client.settings import MasterKeySource, SiteSettings
from sonofed_common.contract.errors import ConfigurationError, StoreError
from sonofed_common.security import public_hex

TEXT = "0123456789abcdef" * 4
OTHER = "f" * 64


def master(**source):
    return MasterKey(MasterKeySource(**source))


def held(path, text=TEXT):
    path.write_text(text)
    path.chmod(0o600)
    return master(file=path)


def secrets_of(ring):
    return ring.images, ring.blob_names, ring.data(ring.current), public_hex(ring.ledger)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "north" / "store"


@pytest.fixture
def default(folder):
    return folder.with_name("store.master.key")


def test_the_default_master_key_is_made_beside_a_new_store(folder, default):
    ring = KeyRing.open(folder, MasterKey.beside(folder))
    assert len({*secrets_of(ring)}) == 4
    again = KeyRing.open(folder, MasterKey.beside(folder))
    assert secrets_of(again) == secrets_of(ring)
    assert default.stat().st_mode & 0o777 == (folder / "keys.json").stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert secrets_of(KeyRing.open(folder.with_name("b"), MasterKey.beside(folder))) != secrets_of(
        ring
    )


def test_no_key_lies_on_the_disk_as_it_is(folder, default):
    ring = KeyRing.open(folder, MasterKey.beside(folder))
    on_disk = b"".join(contents(folder).values())
    keys = [ring.images, ring.blob_names, ring.data(ring.current), ring.ledger.private_bytes_raw()]
    keys.append(bytes.fromhex(default.read_text()))
    for key in keys:
        assert len(key) == 32
        assert key not in on_disk and key.hex().encode() not in on_disk
    assert default.read_text().strip() not in repr(vars(MasterKey.beside(folder)))


def test_one_key_by_every_way(folder, tmp_path, monkeypatch):
    ring = KeyRing.open(folder, held(tmp_path / "hex", f" {TEXT}\n"))
    (tmp_path / "raw").write_bytes(bytes.fromhex(TEXT))
    monkeypatch.setenv("HOSPITAL_KEY", TEXT)
    for same in (
        master(file=tmp_path / "raw"),
        master(environment="HOSPITAL_KEY"),
        master(command=(sys.executable, "-c", f"print('{TEXT}')")),
    ):
        assert secrets_of(KeyRing.open(folder, same)) == secrets_of(ring)


@pytest.mark.parametrize("text", ["", "secret", "0" * 63, "g" * 64, "0" * 66])
def test_what_is_no_key_is_refused_and_not_repeated(folder, tmp_path, monkeypatch, text):
    monkeypatch.setenv("HOSPITAL_KEY", text)
    for wrong in (
        held(tmp_path / "key", text),
        master(environment="HOSPITAL_KEY"),
        master(command=("printf", "%s", text)),
    ):
        with pytest.raises(StoreError, match="64 hex digits") as caught:
            KeyRing.open(folder, wrong)
        assert not text or text not in str(caught.value)
    assert not (folder / "keys.json").exists()


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({"file": "/nowhere/key"}, "cannot be read"),
        ({"environment": "NO_SUCH_HOSPITAL_KEY"}, "holds no NO_SUCH_HOSPITAL_KEY"),
        ({"command": ("sh", "-c", f"echo {TEXT} >&2; exit 3")}, "exit code 3"),
        ({"command": ("no-such-command",)}, "FileNotFoundError"),
    ],
)
def test_a_key_that_is_not_there_is_named_and_never_made(folder, source, sentence):
    with pytest.raises(StoreError, match=sentence) as caught:
        KeyRing.open(folder, master(**source))
    assert TEXT not in str(caught.value) and not (folder / "keys.json").exists()


def test_a_lost_default_key_is_not_made_anew(folder, default):
    KeyRing.open(folder, MasterKey.beside(folder))
    default.unlink()
    with pytest.raises(StoreError, match="put the key back"):
        KeyRing.open(folder, MasterKey.beside(folder))
    assert not default.exists()


def test_another_master_key_changes_nothing(folder, tmp_path):
    Store(folder, KeyRing.open(folder, held(tmp_path / "key"))).put_bytes("a", b"kept")
    before = contents(folder)
    with pytest.raises(StoreError, match="not the one of this site's store"):
        KeyRing.open(folder, held(tmp_path / "other", OTHER))
    assert contents(folder) == before
    assert Store(folder, KeyRing.open(folder, held(tmp_path / "key"))).get_bytes("a") == b"kept"


def test_every_changed_key_is_found(folder, tmp_path):
    own = held(tmp_path / "key")
    KeyRing.open(folder, own)
    path = folder / "keys.json"
    whole = json.loads(path.read_text())
    names = sorted(whole["keys"])
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        flipped = f"{int(whole['keys'][name][-1], 16) ^ 1:x}"
        for value in (whole["keys"][other], whole["keys"][name][:-1] + flipped, "", "zz"):
            path.write_text(json.dumps({**whole, "keys": {**whole["keys"], name: value}}))
            with pytest.raises(StoreError, match="damaged"):
                KeyRing.open(folder, own)
    less = {n: k for n, k in whole["keys"].items() if n != "ledger"}
    for text in (path.read_text()[:40], "", json.dumps({**whole, "keys": less})):
        path.write_text(text)
        with pytest.raises(StoreError, match="damaged"):
            KeyRing.open(folder, own)


def test_lost_keys_are_not_made_anew_over_a_store(folder):
    Store(folder).put_bytes("a", b"kept")
    (folder / "keys.json").unlink()
    with pytest.raises(StoreError, match=r"no keys\.json.*backup"):
        Store(folder)
    assert not (folder / "keys.json").exists()


def test_rotation_keeps_the_keys_and_shuts_the_old_master_out(folder, tmp_path):
    old, new = held(tmp_path / "old"), held(tmp_path / "new", OTHER)
    ring = KeyRing.open(folder, old)
    store = Store(folder, ring)
    store.put_bytes("a", b"kept")
    ring.rotate(new)
    store.put_bytes("b", b"after")
    with pytest.raises(StoreError, match="not the one"):
        KeyRing.open(folder, old)
    again = KeyRing.open(folder, new)
    assert secrets_of(again) == secrets_of(ring)
    assert [Store(folder, again).get_bytes(n) for n in "ab"] == [b"kept", b"after"]
    with pytest.raises(ConfigurationError, match="in use"):
        again.rotate(held(tmp_path / "copy", OTHER))


def test_a_key_in_a_file_is_replaced_in_its_place(folder, default):
    ring = KeyRing.open(folder, MasterKey.beside(folder))
    old = default.read_text()
    ring.rotate()
    ring.rotate()
    assert default.read_text() != old and default.stat().st_mode & 0o777 == 0o600
    assert secrets_of(KeyRing.open(folder, MasterKey.beside(folder))) == secrets_of(ring)
    assert [p.name for p in default.parent.iterdir() if p.is_file()] == [default.name]


def test_a_key_elsewhere_is_only_replaced_by_a_named_one(folder, monkeypatch):
    monkeypatch.setenv("HOSPITAL_KEY", TEXT)
    own = master(environment="HOSPITAL_KEY")
    ring = KeyRing.open(folder, own)
    with pytest.raises(ConfigurationError, match="--file"):
        ring.rotate()
    assert secrets_of(KeyRing.open(folder, own)) == secrets_of(ring)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_rotation_cut_at_any_step_leaves_a_key_that_opens(
    folder, tmp_path, monkeypatch, in_place
):
    new = None if in_place else held(tmp_path / "new", OTHER)
    own = MasterKey.beside(folder)
    keys = secrets_of(KeyRing.open(folder, own))
    cuts = 0
    for step in range(100):
        with monkeypatch.context() as patch:
            if not cut(patch, step, lambda: KeyRing.open(folder, own).rotate(new)):
                break
        cuts += 1
        try:
            opened = KeyRing.open(folder, own)
        except StoreError:
            assert new is not None
            opened = KeyRing.open(folder, new)
            opened.rotate(own)
        assert secrets_of(opened) == keys
    assert cuts >= (6 if in_place else 3)
    assert secrets_of(KeyRing.open(folder, new or own)) == keys


def cut(patch, step, work):
    """Do the work, but stop before its ``step``-th sync or rename; return whether it stopped."""
    left = [step]

    class CutError(BaseException):
        pass

    def counted(call):
        def done(*arguments, **options):
            if left[0] == 0:
                raise CutError
            left[0] -= 1
            return call(*arguments, **options)

        return done

    for name in ("fsync", "rename", "replace", "unlink", "link"):
        patch.setattr(os, name, counted(getattr(os, name)))
    try:
        work()
    except CutError:
        return True
    return False


def test_a_successor_that_never_came_into_use_does_not_matter(folder, default):
    keys = secrets_of(KeyRing.open(folder, MasterKey.beside(folder)))
    default.with_name(f"{default.name}.next").write_text(OTHER)
    assert secrets_of(KeyRing.open(folder, MasterKey.beside(folder))) == keys
    assert default.read_text().strip() != OTHER


def test_sealed_texts_open_in_their_own_place_only(folder):
    ring = KeyRing.open(folder, MasterKey.beside(folder))
    sealed = ring.seal("Müller, Anna", "image 1")
    assert ring.unseal(sealed, "image 1") == "Müller, Anna"
    assert "Müller".encode() not in sealed and sealed != ring.seal("Müller, Anna", "image 1")
    for wrong, context in (
        (sealed, "image 2"),
        (sealed[:-1], "image 1"),
        (b"", "image 1"),
        (bytes([sealed[0] ^ 1]) + sealed[1:], "image 1"),
    ):
        with pytest.raises(StoreError, match="damaged"):
            ring.unseal(wrong, context)


def settings(folder, extra=""):
    path = folder.with_name("site.toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'name = "north"\nstore = "{folder}"\ncoordinator_key = "{"0" * 64}"\n{extra}\n'
        f'[data]\nkind = "table"\npath = "{folder}"\n'
    )
    return path


def rotate(path, *options):
    return CliRunner().invoke(app, ["store", "rotate-key", str(path), *options])


def test_the_command_rotates_in_place_and_to_another_key(folder, default, tmp_path, capfd):
    path = settings(folder)
    Store(folder).put_bytes("a", b"kept")
    old = default.read_text()
    done = rotate(path)
    assert done.exit_code == 0 and "north" in done.output and default.read_text() != old
    assert Store(folder).get_bytes("a") == b"kept"
    assert rotate(path, "--file", str(held(tmp_path / "new").source.file)).exit_code == 0
    assert rotate(path).exit_code == StoreError.exit_code
    path = settings(folder, f'master_key = {{ file = "{tmp_path / "new"}" }}')
    assert rotate(path, "--command", f"printf %s {OTHER}").exit_code == 0
    assert rotate(path, "--file", "a", "--environment", "B").exit_code != 0
    KeyRing.open(folder, master(command=("printf", "%s", OTHER)))


def test_the_settings_name_the_master_key(folder, tmp_path, caplog):
    values = {
        "name": "north",
        "store": folder,
        "data": {"kind": "table", "path": folder},
        "coordinator_key": "0" * 64,
    }
    held(tmp_path / "key")
    named = SiteSettings(**values, master_key={"file": tmp_path / "key"})
    open_store(named).put_bytes("a", b"kept")
    assert open_store(named).get_bytes("a") == b"kept" and not caplog.records
    with pytest.raises(StoreError):
        open_store(SiteSettings(**values))
    assert "beside the store" in caplog.text
