"""Verification of a ledger: what makes an edit, a deletion, a move or a cut show."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from sonofed_common.contract.errors import LedgerError
from sonofed_common.security import sha256

START = "0" * 64
"""What the first entry names as the hash before it."""

Row = tuple[Any, ...]
"""Number, body, hash and signature of an entry."""


def check(rows: Iterable[Row], head: dict[str, Any] | None, public_key: str) -> int:
    """Check a whole ledger, as of `Ledger.verify`, from its rows and head.

    Parameters
    ----------
    rows : iterable of (number, body, hash, signature)
        In the order of their numbers.
    head : dict or None
        ``entries``, ``hash`` and ``signature``.
    public_key : str
        The site's, 64 hex digits.

    Raises
    ------
    LedgerError
        The first thing that is wrong.
    """
    count, previous, hashes = 0, START, [START]
    for count, row in enumerate(rows, start=1):
        if row[0] != count:
            raise LedgerError(f"entry {count} of the ledger is missing; it was deleted")
        body = check_entry(row, public_key)
        if body["previous"] != previous:
            raise LedgerError(f"entry {count} of the ledger does not follow the one before it")
        previous = str(row[2])
        hashes.append(previous)
    if head is None:
        raise LedgerError("the ledger has no head; restore the head's file from a backup")
    check_head(head, public_key)
    known = int(head["entries"])
    if count < known:
        raise LedgerError(
            f"entry {count + 1} of the ledger is missing; the head knows {known} entries, the end "
            "was cut off"
        )
    if hashes[known] != head["hash"]:
        raise LedgerError(f"entry {known} of the ledger is not the one that the head names")
    return count


def check_entry(row: Row, public_key: str) -> dict[str, Any]:
    """Check one entry's hash, signature and number, and return its body.

    Raises
    ------
    LedgerError
        It was edited or moved.
    """
    number, text, digest, signature = row
    try:
        body: dict[str, Any] = json.loads(text)
        _verify(public_key, signature, digest)
        sound = sha256(text.encode()) == digest
    except (ValueError, TypeError, AttributeError, InvalidSignature):
        sound = False
    if not sound:
        raise LedgerError(f"entry {number} of the ledger was edited")
    if body["number"] != number:
        raise LedgerError(
            f"entry {number} of the ledger is not in its place; it was written as {body['number']}"
        )
    return body


def check_head(head: dict[str, Any], public_key: str) -> None:
    """Check the signature of a head.

    Raises
    ------
    LedgerError
        It is not by the site's key.
    """
    try:
        _verify(public_key, head["signature"], f"{head['entries']} {head['hash']}")
    except (KeyError, ValueError, TypeError, InvalidSignature):
        raise LedgerError("the ledger's head was edited; restore it from a backup") from None


def _verify(public_key: str, signature: str, text: str) -> None:
    key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key))
    written = bytes.fromhex(signature)
    # Capitals and blanks are read as well, and are an edit all the same.
    if written.hex() != signature:
        raise ValueError("not as it was written")
    key.verify(written, text.encode())
