"""Digests, Ed25519 signatures and keyed image ids."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from sonofed_common.contract.errors import BundleError, ConfigurationError
from sonofed_common.runtime import write_atomically


def sha256(data: bytes | memoryview) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def image_id(key: bytes, name: str, content: str) -> str:
    """Opaque id of an image, the same for the same name, content and key only.

    Parameters
    ----------
    key : bytes
        The site's secret.
    name : str
        Unique within the site.
    content : str
        SHA-256 of the image file: an image that was replaced under its name is another image.

    Returns
    -------
    str
        64 bits of an HMAC-SHA256 as hex.
    """
    return hmac.new(key, f"{content} {name}".encode(), hashlib.sha256).hexdigest()[:16]


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """Load an Ed25519 private key from a PEM file.

    Raises
    ------
    ConfigurationError
        The file is missing, or is not an Ed25519 private key.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise ConfigurationError(
            f"the signing key {path.name} cannot be read ({error.strerror}); restore it from its "
            "backup: with another one the hospitals know neither bundles nor kits"
        ) from None
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigurationError(f"{path.name} is not an Ed25519 private key in PEM form")
    return key


def load_or_create_signing_key(path: Path) -> Ed25519PrivateKey:
    """Load an Ed25519 private key from a PEM file (mode 0600), or make one there.

    Raises
    ------
    ConfigurationError
        The file is not an Ed25519 private key.
    """
    if path.exists():
        return load_signing_key(path)
    key = Ed25519PrivateKey.generate()
    write_atomically(
        path,
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        mode=0o600,
    )
    return key


def public_hex(key: Ed25519PrivateKey) -> str:
    """Public half of a signing key as 64 hex digits."""
    return key.public_key().public_bytes_raw().hex()


def verify(public_key: str, signature: bytes, data: bytes) -> None:
    """Check an Ed25519 signature.

    Parameters
    ----------
    public_key : str
        64 hex digits.
    signature : bytes
        64 bytes.
    data : bytes
        What was signed.

    Raises
    ------
    BundleError
        The signature is not by that key over that data.
    """
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(signature, data)
    except (InvalidSignature, ValueError):
        raise BundleError(
            "the bundle's signature does not match the coordinator's key; fetch the bundle again"
        ) from None
