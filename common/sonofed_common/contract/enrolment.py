"""Enrolment: the hospital's signed request, and the coordinator's signed startup kit.

No private key is in either. A request is signed by both keys that it carries, so that nobody can
enrol a key that he does not hold. A kit is signed by the coordinator; that the coordinator is the
right one, two people make sure of by reading a fingerprint to each other.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)
from pydantic import BaseModel, Field, ValidationError

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.errors import EnrolmentError
from sonofed_common.fingerprint import words_of
from sonofed_common.security import public_hex, sha256

SITE_NAME = r"^[A-Za-z0-9_.-]{1,64}$"
HEX_KEY = r"^[0-9a-f]{64}$"
MOST_BYTES = 65_536
"""A request or a kit is smaller; what is larger is not even parsed."""

_ECDSA = ec.ECDSA(hashes.SHA384())


class Enrolment(Model):
    """What a hospital says of itself."""

    version: Literal[1] = 1
    site: str = Field(pattern=SITE_NAME)
    node_key: str = Field(max_length=1000, description="OpenSSH public key, NIST P-384")
    ledger_key: str = Field(pattern=HEX_KEY, description="Ed25519 public key, hex")
    created: datetime

    def to_bytes(self) -> bytes:
        """Return the bytes that are signed."""
        return canonical(self)


class EnrolmentRequest(Model):
    """An enrolment with the signatures of its two keys."""

    enrolment: Enrolment
    node_signature: str = Field(max_length=512, description="ECDSA over SHA-384, DER, hex")
    ledger_signature: str = Field(max_length=512, description="Ed25519, hex")

    @classmethod
    def sign(
        cls, enrolment: Enrolment, node: ec.EllipticCurvePrivateKey, ledger: Ed25519PrivateKey
    ) -> EnrolmentRequest:
        """Sign an enrolment with both private keys, which stay where they are."""
        data = enrolment.to_bytes()
        return cls(
            enrolment=enrolment,
            node_signature=node.sign(data, _ECDSA).hex(),
            ledger_signature=ledger.sign(data).hex(),
        )

    @classmethod
    def read(cls, data: bytes) -> EnrolmentRequest:
        """Read a request and check both signatures.

        Raises
        ------
        EnrolmentError
            It is no request, or not signed by the keys that it carries.
        """
        if len(data) > MOST_BYTES:
            raise EnrolmentError("the file is too large for an enrolment request")
        try:
            request = cls.model_validate_json(data)
        except ValidationError:
            raise EnrolmentError(
                "the file is no enrolment request; take the one that 'sonofed-site init' wrote"
            ) from None
        request._check()
        return request

    @property
    def words(self) -> str:
        """The fingerprint, for the phone."""
        return words_of(self.enrolment.to_bytes())

    def _check(self) -> None:
        enrolment, data = self.enrolment, self.enrolment.to_bytes()
        node = node_public_key(enrolment.node_key)
        try:
            node.verify(bytes.fromhex(self.node_signature), data, _ECDSA)
            ledger = Ed25519PublicKey.from_public_bytes(bytes.fromhex(enrolment.ledger_key))
            ledger.verify(bytes.fromhex(self.ledger_signature), data)
        except (InvalidSignature, ValueError):
            raise EnrolmentError(
                "the enrolment request is not signed by the keys that it carries; it was changed "
                "on its way: have the hospital send it again"
            ) from None


class Kit(Model):
    """What a startup kit says; its other files are bound by their digests."""

    version: Literal[1] = 1
    project: str = Field(pattern=SITE_NAME)
    site: str = Field(pattern=SITE_NAME)
    address: str = Field(max_length=300, description="of the coordinator's front, host:port")
    contact: str = Field(max_length=300)
    public_key: str = Field(pattern=HEX_KEY, description="the coordinator's, hex; signs bundles")
    authority: str = Field(pattern=HEX_KEY, description="SHA-256 of the authority's certificate")
    node_key: str = Field(pattern=HEX_KEY, description="SHA-256 of the enrolled node key")
    created: datetime

    def to_bytes(self) -> bytes:
        """Return the bytes that are signed."""
        return canonical(self)

    @property
    def coordinator(self) -> bytes:
        """What two people compare: the coordinator's signing key and its authority."""
        return f"{self.public_key} {self.authority}".encode()


def canonical(model: BaseModel) -> bytes:
    """JSON of a model with sorted keys: the same model gives the same bytes."""
    return json.dumps(model.model_dump(mode="json"), sort_keys=True).encode()


def coordinator_words(signing_key: Ed25519PrivateKey, authority: bytes) -> str:
    """Return the words of a coordinator, as `Kit.coordinator` gives them.

    Parameters
    ----------
    signing_key : Ed25519PrivateKey
        The coordinator's.
    authority : bytes
        Its authority's certificate, PEM.
    """
    return words_of(f"{public_hex(signing_key)} {sha256(authority)}".encode())


def node_public_key(text: str) -> ec.EllipticCurvePublicKey:
    """Read a node's public key.

    Raises
    ------
    EnrolmentError
        It is not a P-384 key in OpenSSH form, or not as `node_public_text` writes it.
    """
    try:
        key = load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise EnrolmentError("the node key is no P-384 public key in OpenSSH form")
    if node_public_text(key) != text:
        # Keys are compared as texts: with a comment, one that was revoked would be another.
        raise EnrolmentError("the node key has more to it than a public key; leave the rest out")
    return key


def node_public_text(key: ec.EllipticCurvePublicKey) -> str:
    """Write a node's public key in OpenSSH form, without a comment."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
