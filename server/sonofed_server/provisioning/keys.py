"""Make and renew the coordinator's keys, where they are used."""

from __future__ import annotations

import shutil
from datetime import datetime

from sonofed_common.contract.enrolment import coordinator_words
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.runtime import write_atomically
from sonofed_common.security import load_or_create_signing_key, load_signing_key
from sonofed_server.provisioning.certificates import (
    AUTHORITY_DAYS,
    expiry,
    issue,
    key_pem,
    make_authority,
    new_key,
    read_pair,
)
from sonofed_server.provisioning.project import Coordinator

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def make_keys(coordinator: Coordinator) -> None:
    """Make the authority, both servers' certificates and the signing key; all of it or nothing.

    Raises
    ------
    ConfigurationError
        They are there already: made anew, every hospital would have to enrol again.
    """
    root = coordinator.root
    if root.exists():
        raise ConfigurationError(
            f"{root} exists; it holds the keys that the hospitals know: move it away to begin anew"
        )
    draft = Coordinator(coordinator.project, root.with_name(f".{root.name}.new"))
    shutil.rmtree(draft.root, ignore_errors=True)
    draft.root.mkdir(parents=True, mode=0o700)
    authority_key = new_key()
    authority = make_authority(coordinator.project.name, authority_key)
    write_atomically(draft.authority_key, key_pem(authority_key), mode=0o600)
    write_atomically(draft.authority, authority)
    superlink_key = new_key()
    write_atomically(draft.superlink_key, key_pem(superlink_key), mode=0o600)
    # It never leaves this machine: as long as the authority itself.
    certificate = issue(authority, authority_key, superlink_key, LOOPBACK, AUTHORITY_DAYS - 1)
    write_atomically(draft.superlink_certificate, certificate)
    renew_front(draft)
    load_or_create_signing_key(draft.signing_key)
    draft.root.rename(root)


def renew_front(coordinator: Coordinator) -> datetime:
    """Give the front a new key and certificate of the same authority.

    Both are in one file, so that the front never meets a pair that does not fit.

    Returns
    -------
    datetime
        When it expires.

    Raises
    ------
    ConfigurationError
        The authority or its key is missing or damaged, or they do not fit.
    """
    authority, authority_key = read_pair(coordinator.authority, coordinator.authority_key)
    if authority_key is None:
        raise ConfigurationError(
            f"{coordinator.authority_key} is missing; run this where it is kept, or restore it "
            "from its backup"
        )
    key = new_key()
    certificate = issue(authority, authority_key, key, (coordinator.project.host,))
    write_atomically(coordinator.front, certificate + key_pem(key), mode=0o600)
    return expiry(certificate)


def words_of_coordinator(coordinator: Coordinator) -> str:
    """Return the fingerprint that hospitals compare when they install a kit."""
    key = load_signing_key(coordinator.signing_key)
    return coordinator_words(key, coordinator.authority.read_bytes())
