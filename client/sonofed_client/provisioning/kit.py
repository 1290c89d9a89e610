"""Check a startup kit and lay it out."""

from __future__ import annotations

import io
import json
import lzma
import shutil
import zipfile
import zlib
from pathlib import Path

from pydantic import ValidationError

from sonofed_client.admission import refusal
from sonofed_client.enclave.policy import STANDARD
from sonofed_client.provisioning.place import Hospital, RelaySettings
from sonofed_client.provisioning.request import read_node_key
from sonofed_client.settings import SiteSettings, read_site
from sonofed_common.contract.enrolment import MOST_BYTES, Kit, node_public_text
from sonofed_common.contract.errors import BundleError, EnrolmentError
from sonofed_common.runtime import write_atomically
from sonofed_common.security import sha256, verify

FILES = ("kit.json", "kit.sig", "ca.pem")
UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError),
    *(KeyError, ValueError, RuntimeError),
)
"""What a damaged or foreign zip is met with; `ValidationError` is a `ValueError`."""


def read_kit(path: Path) -> tuple[Kit, dict[str, bytes]]:
    """Read a kit and check its signature and its files.

    Parameters
    ----------
    path : Path
        The zip. Only the three files of a kit are read from it, and none is unpacked.

    Returns
    -------
    Kit
        What it says.
    dict of str to bytes
        Its files.

    Raises
    ------
    EnrolmentError
        It is no kit, or was changed.
    """
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise EnrolmentError(f"{path} cannot be read ({error.strerror})") from None
    try:
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            if any(archive.getinfo(name).file_size > MOST_BYTES for name in FILES):
                raise EnrolmentError(f"{path.name} is too large for a startup kit")
            files = {name: archive.read(name) for name in FILES}
        kit = Kit.model_validate_json(files["kit.json"])
    except UNREADABLE:
        raise EnrolmentError(
            f"{path.name} is no startup kit; ask the coordinator to send it again"
        ) from None
    try:
        verify(kit.public_key, files["kit.sig"], files["kit.json"])
    except BundleError:
        files["ca.pem"] = b""
    if sha256(files["ca.pem"]) != kit.authority:
        raise EnrolmentError(
            f"{path.name} was changed on its way; ask the coordinator to send it again"
        )
    return kit, files


def check_kit(hospital: Hospital, kit: Kit) -> bool:
    """Check that a kit is for this installation.

    Returns
    -------
    bool
        Whether it is of the coordinator that is installed already, so that no words need be
        compared.

    Raises
    ------
    EnrolmentError
        It is for other keys, or of another coordinator than the one that is installed.
    """
    own = node_public_text(read_node_key(hospital).public_key())
    if kit.node_key != sha256(own.encode()):
        raise EnrolmentError(
            f"the kit is for other keys of site {kit.site} than those here; send the coordinator "
            f"{hospital.request} and ask for its kit"
        )
    try:
        installed = Kit.model_validate_json((hospital.kit / "kit.json").read_bytes())
    except (OSError, ValidationError):
        return False
    if installed.coordinator != kit.coordinator:
        raise EnrolmentError(
            f"the kit is of another coordinator than the one of project {installed.project}, which "
            "is installed; install it in another folder, with keys of its own"
        )
    return True


def install_kit(
    hospital: Hospital,
    kit: Kit,
    files: dict[str, bytes],
    settings: SiteSettings,
    relay: RelaySettings,
) -> None:
    """Lay out a checked kit; what the hospital has written itself stays as it is.

    Parameters
    ----------
    hospital : Hospital
        Gets the kit and, where they are not there, ``policy.toml``, ``site.toml`` and
        ``relay.toml``.
    kit : Kit
        Checked.
    files : dict of str to bytes
        Its files.
    settings : SiteSettings
        For a new ``site.toml``.
    relay : RelaySettings
        For a new ``relay.toml``.
    """
    if hospital.site.exists() and read_site(hospital.site).coordinator_key != kit.public_key:
        raise EnrolmentError(
            f"{hospital.site} names another coordinator_key than the kit's; correct it first"
        )
    digest = sha256(files["kit.sig"])[:16]
    folder = hospital.root / "kits" / digest
    for name, content in files.items():
        write_atomically(folder / name, content)
    link = hospital.root / ".kit.new"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.relative_to(hospital.root))
    # The kit changes at once or not at all.
    link.replace(hospital.kit)
    for old in folder.parent.iterdir():
        if old.name != digest:
            shutil.rmtree(old, ignore_errors=True)
    # It was of an earlier enrolment.
    refusal(hospital.heartbeat).unlink(missing_ok=True)
    # The policy is what limits the coordinator: it is never the coordinator's.
    if not hospital.policy.exists():
        write_atomically(hospital.policy, STANDARD.read_bytes())
    if not hospital.site.exists():
        write_atomically(hospital.site, _toml(settings.model_dump(mode="json")), mode=0o640)
    if not hospital.relay.exists():
        write_atomically(hospital.relay, _toml(relay.model_dump(mode="json")))


def _toml(values: dict[str, object], section: str = "") -> bytes:
    # Strings, numbers, lists of them and one level of sections, whose JSON is TOML as well.
    kept = {k: v for k, v in values.items() if v is not None and v != [] and v != {}}
    plain = {k: v for k, v in kept.items() if not isinstance(v, dict)}
    lines = [f"[{section}]"] if section else []
    lines += [f"{name} = {json.dumps(value)}" for name, value in plain.items()]
    text = "\n".join(lines) + "\n"
    for name, value in kept.items():
        if isinstance(value, dict):
            text += "\n" + _toml(value, name).decode()
    return text.encode()
