"""From nothing to installed startup kits, with the two programs' own commands."""

import io
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from two_programs import coordinator, enrol, run, site, words

from sonofed_client.enclave.store import open_store
from sonofed_client.enclave.wall import open_ledger
from sonofed_client.provisioning.place import Hospital
from sonofed_client.provisioning.programs import programs
from sonofed_client.provisioning.request import read_node_key
from sonofed_client.settings import read_site
from sonofed_common.contract.bundle import BundleWriter
from sonofed_common.contract.enrolment import EnrolmentRequest, canonical, node_public_text
from sonofed_common.contract.errors import ConfigurationError, EnrolmentError
from sonofed_common.contract.manifest import DataProvenance, Provenance
from sonofed_common.fingerprint import WORDS, compare_words, words_of
from sonofed_common.security import load_or_create_signing_key, public_hex
from sonofed_server.provisioning.certificates import expiry


def private_parts(folder):
    """Every private key of an installation, in the encodings that it could be leaked in."""
    texts = [p.read_bytes() for p in folder.glob("*.key")]
    bodies = [b"".join(t.split(b"-----")[2].split()) for t in texts if b"PRIVATE" in t]
    return [b for b in bodies if b] + [t.strip() for t in texts if b"PRIVATE" not in t]


def a_bundle(project, *classifiers):
    data = DataProvenance(name="phantoms", digest="0" * 64, images=1, groups=1)
    provenance = Provenance(data=data, settings="0" * 64)
    folder = project / "-".join(classifiers)
    writer = BundleWriter(folder, name="cairo", kind="source", provenance=provenance)
    for name in classifiers:
        writer.add(f"classifiers/{name}.safetensors", name.encode())
    writer.sign(load_or_create_signing_key(Path("coordinator/coordinator.pem")))
    return folder.name


def test_a_study_is_told_before_it_starts_that_the_bundle_lacks_its_classifier(project):
    run(coordinator, "init project.toml")
    enrol()
    Path("study.toml").write_text('name = "two"\npreset = "sonofed"\n[cohort]\nsites = ["north"]\n')
    two = "efficientnet_lite0_two_views"
    plain, both = a_bundle(project, "efficientnet_lite0"), a_bundle(project, "resnet18", two)
    said = run(coordinator, f"study check study.toml --bundle {plain}", 20)
    assert f"bundle cairo holds no classifier '{two}'" in said and "train the source" in said
    assert "all enrolled" in run(coordinator, f"study check study.toml --bundle {both}")
    # A study that classifies nothing needs none.
    Path("study.toml").write_text(
        'name = "chance"\npreset = "sonofed"\nphases = ["enrol", "ship", "select"]\n'
        'selection = { strategy = "random" }\n[cohort]\nsites = ["north"]\n'
    )
    assert "all enrolled" in run(coordinator, f"study check study.toml --bundle {plain}")


@pytest.mark.parametrize(
    ("asked", "lacking"),
    [
        ('phases = ["enrol", "ship", "reconstruct"]', "diffusion stack"),
        ("finetuning = { replay = 0.5 }", "synthetic images"),
        ('phases = ["enrol", "ship", "evaluate"]', "segmenter"),
    ],
)
def test_a_study_is_told_before_it_starts_what_else_the_bundle_lacks(project, asked, lacking):
    run(coordinator, "init project.toml")
    enrol()
    cohort = '[cohort]\nsites = ["north"]\n'
    plain = a_bundle(project, "efficientnet_lite0")
    trained = (
        'phases = ["enrol", "ship", "select", "annotate", "classifier"]\n'
        'selection = { strategy = "random" }'
    )
    first = asked if "phases" in asked else f"{trained}\n{asked}"
    Path("study.toml").write_text(f'name = "one"\n{first}\n{cohort}')
    said = " ".join(run(coordinator, f"study check study.toml --bundle {plain}", 20).split())
    assert f"bundle cairo holds no {lacking}, which" in said and "train the source" in said
    Path("study.toml").write_text(f'name = "one"\n{trained}\n{cohort}')
    assert "all enrolled" in run(coordinator, f"study check study.toml --bundle {plain}")


def test_from_nothing_to_an_installed_site(project):
    told = words(run(coordinator, "init project.toml"))
    run(site, enrol())
    settings = read_site(Path("north/site.toml"))
    assert settings.name == "north" and not settings.auto_approve and not settings.oracle
    signing = load_or_create_signing_key(Path("coordinator/coordinator.pem"))
    assert settings.coordinator_key == public_hex(signing)
    request = EnrolmentRequest.read(Path("north/request.json").read_bytes())
    # The enrolled ledger key is the one that the installed site's ledger signs with.
    assert open_ledger(open_store(settings)).public_key == request.enrolment.ledger_key
    assert run(coordinator, "init project.toml", 20)
    assert told == words(run(coordinator, f"enrol north/request.json --words '{request.words}'"))
    authority = Path("coordinator/ca.pem").read_bytes()
    assert Path("north/kit/ca.pem").read_bytes() == authority
    leaf = Path("coordinator/front.pem")
    verified = subprocess.run(
        [
            *("openssl", "verify", "-x509_strict", "-verify_hostname", "localhost"),
            *("-purpose", "sslserver", "-CAfile", "coordinator/ca.pem", leaf),
        ],
        capture_output=True,
        text=True,
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr


def test_no_private_key_leaves_and_none_is_readable_by_others(project):
    run(coordinator, "init project.toml")
    run(site, enrol())
    sent = [Path("north/request.json").read_bytes()]
    with zipfile.ZipFile("coordinator/kits/north.zip") as kit:
        assert sorted(kit.namelist()) == ["ca.pem", "kit.json", "kit.sig"]
        sent += [kit.read(name) for name in kit.namelist()]
    secrets = private_parts(Path("north")) + private_parts(Path("coordinator"))
    assert len(secrets) >= 4
    for content in sent:
        assert b"PRIVATE" not in content
        assert not [s for s in secrets if s in b"".join(content.split())]
    for folder in ("north", "coordinator"):
        assert Path(folder).stat().st_mode & 0o077 == 0
        for file in [*Path(folder).glob("*.key"), *Path(folder).glob("*.pem")]:
            if b"PRIVATE" in file.read_bytes() or file.name == "master.key":
                assert file.stat().st_mode & 0o077 == 0, file


def changed(text, **values):
    content = json.loads(text)
    content["enrolment"].update(values)
    return json.dumps(content).encode()


def test_a_request_is_signed_by_both_of_its_keys(project):
    run(site, "init north --folder north")
    genuine = Path("north/request.json").read_bytes()
    request = EnrolmentRequest.read(genuine)
    other = node_public_text(ec.generate_private_key(ec.SECP384R1()).public_key())
    smaller = node_public_text(ec.generate_private_key(ec.SECP256R1()).public_key())
    stranger = public_hex(Ed25519PrivateKey.generate())
    for forged in (
        changed(genuine, site="south"),
        changed(genuine, node_key=other),
        changed(genuine, node_key=smaller),
        changed(genuine, ledger_key=stranger),
        changed(genuine, ledger_key="0" * 64),
        genuine[:-20],
        b"\x00" * 10,
        b"[]",
        genuine + b" " * 100_000,
    ):
        with pytest.raises(EnrolmentError):
            EnrolmentRequest.read(forged)
    # The signature of one key does not stand for that of the other.
    swapped = request.model_copy(update={"node_signature": request.ledger_signature})
    with pytest.raises(EnrolmentError):
        EnrolmentRequest.read(canonical(swapped))


def test_who_may_enrol(project):
    run(coordinator, "init project.toml")
    run(site, "init elsewhere --folder elsewhere")
    request = EnrolmentRequest.read(Path("elsewhere/request.json").read_bytes())
    said = f"--words '{request.words}'"
    assert "names no site" in run(coordinator, f"enrol elsewhere/request.json {said}", 90)
    enrol()
    said = words(run(site, "init north --folder impostor"))
    output = run(coordinator, f"enrol impostor/request.json --words '{said}'", 90)
    assert "another key" in output
    said = words(run(site, "init south --folder south"))
    wrong = " ".join(reversed(said.split()))
    assert "words" in run(coordinator, f"enrol south/request.json --words '{wrong}'", 90)
    assert "--words" in run(coordinator, "enrol south/request.json", 90)
    assert sorted(p.name for p in Path("coordinator/sites").iterdir()) == ["north.json"]


def test_a_revoked_key_is_refused_and_new_keys_are_not(project):
    run(coordinator, "init project.toml")
    run(site, enrol())
    run(coordinator, "revoke north")
    assert not Path("coordinator/kits/north.zip").exists()
    said = words(run(site, "init north --folder north"))
    assert "revoked" in run(coordinator, f"enrol north/request.json --words '{said}'", 90)
    said = words(run(site, "init north --folder north --new-node-key"))
    run(coordinator, f"enrol north/request.json --words '{said}'")
    # The same coordinator's kit needs no phone call, and leaves the site's own files alone.
    before = Path("north/site.toml").read_bytes()
    run(site, "install coordinator/kits/north.zip --folder north")
    assert Path("north/site.toml").read_bytes() == before
    run(coordinator, "revoke nobody", 90)


def test_a_revoked_key_does_not_come_back_under_another_name(project):
    run(coordinator, "init project.toml")
    enrol()
    shutil.copytree("north", "thief")
    run(coordinator, "revoke north")
    said = words(run(site, "init north --folder north --new-node-key"))
    run(coordinator, f"enrol north/request.json --words '{said}'")
    said = words(run(site, "init south --folder thief"))
    refused = f"enrol thief/request.json --words '{said}'"
    assert "key of site north was revoked" in run(coordinator, refused, 90)
    # Nor while nobody can see which keys were revoked.
    record = Path("coordinator/sites/north.json")
    record.write_text("{")
    output = run(coordinator, refused, 20)
    assert str(record) in output and "restore it from its backup" in output
    assert not Path("coordinator/sites/south.json").exists()
    assert not Path("coordinator/kits/south.zip").exists()


def test_a_key_has_one_text(project):
    run(site, "init north --folder north")
    request = EnrolmentRequest.read(Path("north/request.json").read_bytes())
    node, ledger = read_node_key(Hospital(Path("north"))), Ed25519PrivateKey.generate()
    for more in (" x", "\n"):
        key = request.enrolment.node_key + more
        keys = {"node_key": key, "ledger_key": public_hex(ledger)}
        enrolment = request.enrolment.model_copy(update=keys)
        disguised = EnrolmentRequest.sign(enrolment, node, ledger)
        with pytest.raises(EnrolmentError, match="more to it"):
            EnrolmentRequest.read(canonical(disguised))


def test_a_kit_is_for_one_site_and_of_one_coordinator(project, tmp_path):
    run(coordinator, "init project.toml")
    install = enrol()
    enrol("south", "south")
    assert "other keys" in run(site, install.replace("kits/north", "kits/south"), 90)
    wrong = " ".join(["aardvark"] * WORDS)
    there = f"install coordinator/kits/north.zip --folder north --data images --words '{wrong}'"
    assert "words" in run(site, there, 90)
    assert not Path("north/site.toml").exists() and not Path("north/kit").exists()
    run(site, install)
    Path("coordinator").rename("first")
    run(coordinator, "init project.toml")
    said = EnrolmentRequest.read(Path("north/request.json").read_bytes()).words
    run(coordinator, f"enrol north/request.json --words '{said}'")
    kit = Path("north/kit/kit.json").read_bytes()
    assert "another coordinator" in run(site, install, 90)
    assert Path("north/kit/kit.json").read_bytes() == kit


@pytest.mark.parametrize("name", ["kit.json", "kit.sig", "ca.pem"])
def test_a_changed_kit_is_refused(project, name):
    run(coordinator, "init project.toml")
    install = enrol()
    path = Path("coordinator/kits/north.zip")
    with zipfile.ZipFile(path) as kit:
        files = {n: kit.read(n) for n in kit.namelist()}
    at = files[name].index(b"localhost") if name == "kit.json" else len(files[name]) // 2
    other = b"Y" if files[name][at : at + 1] == b"X" else b"X"
    files[name] = files[name][:at] + other + files[name][at + 1 :]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as kit:
        for n, content in files.items():
            kit.writestr(n, content)
    path.write_bytes(packed.getvalue())
    assert "changed" in run(site, install, 90)
    path.write_bytes(packed.getvalue()[:50])
    assert "no startup kit" in run(site, install, 90)
    assert not Path("north/kit").exists()


def test_renewal_keeps_the_authority(project):
    run(coordinator, "init project.toml")
    before = Path("coordinator/front.pem").read_bytes()
    run(coordinator, "renew")
    after = Path("coordinator/front.pem").read_bytes()
    one, other = (x509.load_pem_x509_certificate(c) for c in (before, after))
    assert one.public_key() != other.public_key() and one.serial_number != other.serial_number
    other.verify_directly_issued_by(
        x509.load_pem_x509_certificate(Path("coordinator/ca.pem").read_bytes())
    )
    assert expiry(after) >= expiry(before)


def test_one_machine_is_provisioned_at_once(project):
    for name in ("north", "south"):
        (project / "images" / name).mkdir()
    for _ in range(2):
        run(coordinator, "provision project.toml --all --data images --simulated")
    settings = [read_site(Path(f"sites/{name}/site.toml")) for name in ("north", "south")]
    assert [s.name for s in settings] == ["north", "south"]
    assert all(s.auto_approve and s.oracle for s in settings)
    assert len({s.coordinator_key for s in settings}) == 1


def test_a_relay_needs_nothing_of_the_enclave_but_its_socket(project):
    run(coordinator, "init project.toml")
    run(site, enrol())
    hospital = Hospital(Path("north").resolve())
    assert [p.name for p in programs(hospital)] == ["enclave", "supernode"]
    assert hospital.run.stat().st_mode & 0o777 == 0o700
    for file in ("site.toml", "policy.toml", "master.key"):
        (hospital.root / file).unlink()
    with pytest.raises(ConfigurationError, match="names no socket"):
        programs(hospital, relay_only=True)
    with hospital.relay.open("a") as file:
        file.write('socket = "/run/sonofed/enclave.sock"\n')
    (supernode,) = programs(hospital, relay_only=True)
    assert 'enclave="/run/sonofed/enclave.sock"' in supernode.command
    assert supernode.name == "supernode"


@given(st.binary(), st.binary())
def test_words_tell_data_apart(one, other):
    assert (words_of(one) == words_of(other)) == (one == other)
    compare_words(f"  {words_of(one).upper()} ", one, "this")
