"""Enrol hospitals: check a request, keep its record, write its startup kit; revoke it."""

from __future__ import annotations

import io
import zipfile
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field, ValidationError

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.enrolment import EnrolmentRequest, Kit, canonical
from sonofed_common.contract.errors import ConfigurationError, EnrolmentError
from sonofed_common.runtime import write_atomically
from sonofed_common.security import load_signing_key, public_hex, sha256
from sonofed_server.provisioning.certificates import read_pair
from sonofed_server.provisioning.project import Coordinator

SAME_TIME = (1980, 1, 1, 0, 0, 0)


class SiteRecord(Model):
    """What the coordinator keeps of a hospital.

    Attributes
    ----------
    revoked_keys : tuple of str
        Node keys that are refused for ever, the present one among them once it is revoked.
    """

    request: EnrolmentRequest
    enrolled: datetime
    revoked_keys: tuple[str, ...] = Field(default=())

    @property
    def site(self) -> str:
        """The hospital's name."""
        return self.request.enrolment.site

    @property
    def node_key(self) -> str:
        """Its node's public key."""
        return self.request.enrolment.node_key

    @property
    def revoked(self) -> bool:
        """Whether it may no longer take part."""
        return self.node_key in self.revoked_keys


def enrol(coordinator: Coordinator, request: EnrolmentRequest) -> Path:
    """Keep a hospital's record and write its startup kit; the same request again writes it again.

    Parameters
    ----------
    coordinator : Coordinator
        Of the project.
    request : EnrolmentRequest
        Checked; whose words were compared.

    Returns
    -------
    Path
        The kit, a zip.

    Raises
    ------
    EnrolmentError
        The project does not name the site, the key was revoked, at whatever site, or is another
        site's, or the site is enrolled with another key.
    ConfigurationError
        The coordinator's signing key is missing, or the authority or a record is damaged.
    """
    enrolment, project = request.enrolment, coordinator.project
    # Before a record is kept: without them no kit can be written.
    load_signing_key(coordinator.signing_key)
    read_pair(coordinator.authority, coordinator.authority_key)
    if enrolment.site not in project.sites:
        raise EnrolmentError(
            f"project {project.name} names no site {enrolment.site}; add it to its sites"
        )
    each, damaged = records(coordinator)
    if damaged:
        # Which keys it revoked cannot be seen, and this may be one of them.
        raise ConfigurationError(next(iter(damaged.values())))
    for record in each.values():
        if enrolment.node_key in record.revoked_keys:
            raise EnrolmentError(
                f"this key of site {record.site} was revoked; have site {enrolment.site} make new "
                "keys"
            )
        if record.site != enrolment.site and record.node_key == enrolment.node_key:
            raise EnrolmentError(f"this key is already that of site {record.site}")
    known = each.get(enrolment.site)
    if known is not None and not known.revoked and known.node_key != enrolment.node_key:
        raise EnrolmentError(
            f"site {enrolment.site} is enrolled with another key; revoke that first"
        )
    record = SiteRecord(
        request=request,
        enrolled=datetime.now(UTC).replace(microsecond=0),
        revoked_keys=known.revoked_keys if known is not None else (),
    )
    _keep(coordinator, record)
    return write_kit(coordinator, record)


def revoke(coordinator: Coordinator, site: str) -> SiteRecord:
    """Refuse a hospital's key from now on.

    Raises
    ------
    EnrolmentError
        It is not enrolled.
    """
    record = find_record(coordinator, site)
    if record is None:
        raise EnrolmentError(f"site {site} is not enrolled")
    if not record.revoked:
        keys = (*record.revoked_keys, record.node_key)
        record = record.model_copy(update={"revoked_keys": keys})
        _keep(coordinator, record)
    _kit_path(coordinator, site).unlink(missing_ok=True)
    return record


def records(coordinator: Coordinator) -> tuple[dict[str, SiteRecord], dict[str, str]]:
    """Read what is kept of all hospitals that ever enrolled.

    Returns
    -------
    dict of str to SiteRecord
        By the hospital's name.
    dict of str to str
        What to do about each record that is damaged: no enrolled hospital suffers by another's.
    """
    found, damaged = {}, {}
    for path in sorted(coordinator.sites.glob("*.json")):
        try:
            found[path.stem] = _read(path)
        except ConfigurationError as error:
            damaged[path.stem] = error.message
    return found, damaged


def find_record(coordinator: Coordinator, site: str) -> SiteRecord | None:
    """Return the record of one hospital, or None.

    Raises
    ------
    ConfigurationError
        It is damaged.
    """
    known = {path.stem: path for path in coordinator.sites.glob("*.json")}
    return _read(known[site]) if site in known else None


def write_kit(coordinator: Coordinator, record: SiteRecord) -> Path:
    """Write a hospital's startup kit: what it is told, the signature of that, the authority."""
    key = load_signing_key(coordinator.signing_key)
    authority = coordinator.authority.read_bytes()
    kit = Kit(
        project=coordinator.project.name,
        site=record.site,
        address=coordinator.project.address,
        contact=coordinator.project.contact,
        public_key=public_hex(key),
        authority=sha256(authority),
        node_key=sha256(record.node_key.encode()),
        created=record.enrolled,
    )
    data = kit.to_bytes()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (
            ("kit.json", data),
            ("kit.sig", key.sign(data)),
            ("ca.pem", authority),
        ):
            archive.writestr(zipfile.ZipInfo(name, SAME_TIME), content)
    path = _kit_path(coordinator, record.site)
    write_atomically(path, packed.getvalue())
    return path


def _read(path: Path) -> SiteRecord:
    try:
        return SiteRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise ConfigurationError(
            f"{path} is damaged; restore it from its backup, or delete it, which shuts the site "
            "out and forgets which keys it had revoked, and enrol the site again with new ones"
        ) from None


def _keep(coordinator: Coordinator, record: SiteRecord) -> None:
    write_atomically(coordinator.sites / f"{record.site}.json", canonical(record))


def _kit_path(coordinator: Coordinator, site: str) -> Path:
    return coordinator.kits / f"{site}.zip"
