import hashlib
import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from sonofed_common.contract.bundle import (
    Bundle,
    BundleWriter,
    DataProvenance,
    Manifest,
    Provenance,
    check_blob,
    check_path,
    verify_manifest,
)
from sonofed_common.contract.errors import BundleError

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw().hex()
FILES = {
    "classifiers/resnet18.safetensors": b"weights" * 100,
    "diffusion/unet/config.json": b"{}",
    "diffusion/unet/model.safetensors": b"unet",
    "diffusion/twin.json": b"{}",
}


def write(folder, files=FILES, key=KEY, facts=None):
    data = DataProvenance(name="phantom", digest="0" * 64, images=4, groups=2)
    provenance = Provenance(data=data, seeds={"study": 1}, settings="1" * 64)
    writer = BundleWriter(folder, name="trial", kind="source", provenance=provenance)
    for path, content in files.items():
        writer.add(path, content)
    writer.facts.update(facts or {"image_size": 32})
    return writer.sign(key)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "bundle")
    return tmp_path / "bundle"


def resign(folder, key=KEY, **changes):
    """Sign an altered manifest as a hostile holder of the key could."""
    values = json.loads((folder / "manifest.json").read_bytes()) | changes
    data = json.dumps(values).encode()
    (folder / "manifest.json").write_bytes(data)
    (folder / "manifest.sig").write_bytes(key.sign(data))


def test_reads_back_what_was_written(folder):
    bundle = Bundle.open(folder, PUBLIC)
    assert bundle.paths == sorted(FILES)
    assert {path: bundle.read(path) for path in bundle.paths} == FILES
    assert bundle.manifest.facts == {"image_size": 32}
    assert bundle.id == hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


def test_equal_files_share_a_blob_and_no_temporary_file_stays(folder):
    digests = {hashlib.sha256(content).hexdigest() for content in FILES.values()}
    assert {p.name for p in (folder / "blobs").iterdir()} == digests
    assert len(digests) == len(FILES) - 1


def test_manifest_bytes_are_canonical(folder):
    data = (folder / "manifest.json").read_bytes()
    assert Manifest.model_validate_json(data).to_bytes() == data
    values = json.loads(data)
    assert json.dumps(values, sort_keys=True, separators=(",", ":")).encode() == data


def test_key_may_be_pinned_or_taken_from_the_manifest(folder):
    assert Bundle.open(folder).manifest.public_key == PUBLIC
    assert Bundle.open(folder, PUBLIC.upper()).manifest.public_key == PUBLIC


def test_refuses_another_key(folder):
    other = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    with pytest.raises(BundleError, match="another key"):
        Bundle.open(folder, other)


def test_refuses_a_claimed_key_that_did_not_sign(folder):
    resign(folder, key=Ed25519PrivateKey.generate())
    with pytest.raises(BundleError, match="signature does not match"):
        Bundle.open(folder, PUBLIC)


def test_refuses_a_changed_fact(folder):
    data = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(data.replace(b'"image_size":32', b'"image_size":64'))
    with pytest.raises(BundleError, match="signature does not match"):
        Bundle.open(folder, PUBLIC)


@pytest.mark.parametrize("signature", [b"", b"short", bytes(64)])
def test_refuses_a_bad_signature(folder, signature):
    (folder / "manifest.sig").write_bytes(signature)
    with pytest.raises(BundleError, match="signature does not match"):
        Bundle.open(folder)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig"])
def test_names_the_missing_part(folder, name):
    (folder / name).unlink()
    part = {"manifest.json": "no manifest", "manifest.sig": "no signature"}[name]
    with pytest.raises(BundleError, match=part):
        Bundle.open(folder, PUBLIC)


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"{not json", b"\xff\xfe"])
def test_refuses_a_malformed_manifest(folder, data):
    (folder / "manifest.json").write_bytes(data)
    (folder / "manifest.sig").write_bytes(KEY.sign(data))
    with pytest.raises(BundleError, match="malformed"):
        Bundle.open(folder, PUBLIC)


def test_finds_a_missing_blob_eagerly_and_lazily(folder):
    digest = hashlib.sha256(b"unet").hexdigest()
    (folder / "blobs" / digest).unlink()
    with pytest.raises(BundleError, match="missing"):
        Bundle.open(folder, PUBLIC)
    lazy = Bundle.open(folder, PUBLIC, check_blobs=False)
    assert lazy.read("diffusion/twin.json") == b"{}"
    with pytest.raises(BundleError, match="missing"):
        lazy.read("diffusion/unet/model.safetensors")


@pytest.mark.parametrize("content", [b"uneT", b"unet ", b""])
def test_finds_a_changed_blob_eagerly_and_lazily(folder, content):
    (folder / "blobs" / hashlib.sha256(b"unet").hexdigest()).write_bytes(content)
    with pytest.raises(BundleError, match="damaged"):
        Bundle.open(folder, PUBLIC)
    lazy = Bundle.open(folder, PUBLIC, check_blobs=False)
    with pytest.raises(BundleError, match="damaged"):
        lazy.read("diffusion/unet/model.safetensors")


HOSTILE = ["/etc/passwd", "../x", "a/../b", "a//b", "", ".", "a/.", "a\\b", "C:/x", "a/", "a\0b"]


@pytest.mark.parametrize("path", HOSTILE)
def test_refuses_hostile_paths_when_writing_and_when_reading(folder, path):
    with pytest.raises(ValueError, match="logical path"):
        check_path(path)
    resign(folder, files={path: {"sha256": hashlib.sha256(b"unet").hexdigest(), "bytes": 4}})
    with pytest.raises(BundleError, match="malformed"):
        Bundle.open(folder, PUBLIC)


def test_refuses_a_path_that_is_file_and_folder(folder):
    blob = {"sha256": hashlib.sha256(b"unet").hexdigest(), "bytes": 4}
    resign(folder, files={"a": blob, "a/b": blob})
    with pytest.raises(BundleError, match="malformed"):
        Bundle.open(folder, PUBLIC)


def test_refuses_a_digest_that_is_a_path(folder):
    resign(folder, files={"a": {"sha256": "../" * 20 + "abcd", "bytes": 4}})
    with pytest.raises(BundleError, match="malformed"):
        Bundle.open(folder, PUBLIC)


path_parts = st.text("abc./\\:", min_size=1, max_size=12)


@given(path_parts)
@settings(max_examples=200)
def test_an_accepted_path_stays_inside_its_folder(path):
    try:
        check_path(path)
    except ValueError:
        return
    root = Path("/root/of/bundle")
    assert (root / path).resolve().is_relative_to(root)
    assert (root / path).resolve() != root


def test_what_add_tree_adds_is_read_back(tmp_path):
    tree = tmp_path / "tree"
    (tree / "unet" / "deep").mkdir(parents=True)
    (tree / "model_index.json").write_bytes(b"index")
    (tree / "unet" / "deep" / "w.safetensors").write_bytes(b"\0\1")
    provenance = Provenance(
        data=DataProvenance(name="p", digest="0", images=0, groups=0), settings="0"
    )
    writer = BundleWriter(tmp_path / "b", name="x", kind="final", provenance=provenance)
    writer.add_tree("diffusion", tree)
    bundle = writer.sign(KEY)
    assert bundle.paths == ["diffusion/model_index.json", "diffusion/unet/deep/w.safetensors"]
    for path in bundle.paths:
        assert bundle.read(path) == (tree / path.removeprefix("diffusion/")).read_bytes()


def test_installs_blob_by_blob_from_bytes_alone(folder):
    manifest = verify_manifest(
        (folder / "manifest.json").read_bytes(), (folder / "manifest.sig").read_bytes(), PUBLIC
    )
    store = {hashlib.sha256(b"{}").hexdigest(): b"{}"}
    missing = manifest.missing(store)
    assert set(missing) == {hashlib.sha256(c).hexdigest() for c in FILES.values()} - set(store)
    for digest in missing:
        data = (folder / "blobs" / digest).read_bytes()
        check_blob(manifest, digest, data)
        store[digest] = data
    assert manifest.missing(store) == []
    assert Bundle.open(folder).missing(store) == []


def test_check_blob_refuses_strangers_and_damage(folder):
    manifest = Bundle.open(folder).manifest
    digest = hashlib.sha256(b"unet").hexdigest()
    with pytest.raises(BundleError, match="damaged"):
        check_blob(manifest, digest, b"uneT")
    with pytest.raises(BundleError, match="not part"):
        check_blob(manifest, hashlib.sha256(b"x").hexdigest(), b"x")


def test_an_old_bundle_stays_valid_until_the_new_one_is_signed(folder):
    old = Bundle.open(folder, PUBLIC)
    writer = BundleWriter(folder, name="second", kind="source", provenance=old.manifest.provenance)
    writer.add("a", b"new")
    assert Bundle.open(folder, PUBLIC).id == old.id
    assert writer.sign(KEY).id == Bundle.open(folder, PUBLIC).id != old.id


def test_an_unsigned_bundle_is_refused(tmp_path, folder):
    provenance = Bundle.open(folder).manifest.provenance
    BundleWriter(tmp_path / "b", name="x", kind="source", provenance=provenance).add("a", b"a")
    with pytest.raises(BundleError, match="no manifest"):
        Bundle.open(tmp_path / "b")


def test_rewriting_replaces_files_and_removes_old_blobs(folder):
    bundle = write(folder, {"a": b"new"})
    assert bundle.id == Bundle.open(folder, PUBLIC).id
    assert [p.name for p in (folder / "blobs").iterdir()] == [hashlib.sha256(b"new").hexdigest()]
