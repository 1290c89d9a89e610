"""The project's own certificate authority, and the certificates that it gives."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sonofed_common.contract.errors import ConfigurationError

AUTHORITY_DAYS = 3650
FRONT_DAYS = 397
"""What browsers and auditors take for a server; `renew` makes the next."""

# A hospital's clock may be a little behind.
EARLIER = timedelta(hours=1)


def new_key() -> ec.EllipticCurvePrivateKey:
    """Make a P-384 key."""
    return ec.generate_private_key(ec.SECP384R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Write a private key as PEM, without a passphrase."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def read_key(pem: bytes, name: str) -> ec.EllipticCurvePrivateKey:
    """Read a private key.

    Raises
    ------
    ConfigurationError
        It is no elliptic-curve key in PEM form, or has a passphrase.
    """
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigurationError(
            f"{name} is no elliptic-curve private key in PEM form; restore it from its backup"
        )
    return key


def read_pair(certificate: Path, key: Path) -> tuple[bytes, ec.EllipticCurvePrivateKey | None]:
    """Read a certificate and its key.

    Returns
    -------
    bytes
        The certificate, PEM.
    EllipticCurvePrivateKey or None
        The key, or None where there is no such file.

    Raises
    ------
    ConfigurationError
        One of them is damaged or cannot be read, or the key is that of another certificate.
    """
    try:
        pem = certificate.read_bytes()
        public = x509.load_pem_x509_certificate(pem).public_key()
    except (OSError, ValueError, UnsupportedAlgorithm):
        raise ConfigurationError(
            f"{certificate} is damaged or cannot be read; restore it from its backup"
        ) from None
    try:
        private = read_key(key.read_bytes(), str(key))
    except FileNotFoundError:
        return pem, None
    except OSError as error:
        raise ConfigurationError(
            f"{key} cannot be read ({error.strerror}); run this as the account that it belongs to"
        ) from None
    if private.public_key() != public:
        raise ConfigurationError(
            f"{key} is not the key of {certificate}; restore both from their backup"
        )
    return pem, private


def make_authority(project: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """Make the certificate of a project's authority, PEM."""
    name = _name(f"SonoFed {project}")
    usage = _usage(key_cert_sign=True, crl_sign=True)
    return (
        _begin(name, name, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
        .public_bytes(Encoding.PEM)
    )


def issue(
    authority: bytes,
    authority_key: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str],
    days: int = FRONT_DAYS,
) -> bytes:
    """Give a server its certificate.

    Parameters
    ----------
    authority : bytes
        Certificate of the authority, PEM.
    authority_key : EllipticCurvePrivateKey
        Its key.
    key : EllipticCurvePrivateKey
        The server's.
    hosts : sequence of str
        Names and addresses under which it is called; the first names it.
    days : int
        How long it is valid; a negative number makes one that has expired.

    Returns
    -------
    bytes
        PEM.
    """
    issuer = x509.load_pem_x509_certificate(authority)
    identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        _begin(_name(hosts[0]), issuer.subject, key.public_key(), days)
        .add_extension(x509.SubjectAlternativeName([_host(h) for h in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
        .sign(authority_key, hashes.SHA384())
        .public_bytes(Encoding.PEM)
    )


def expiry(pem: bytes) -> datetime:
    """When a certificate expires."""
    return x509.load_pem_x509_certificate(pem).not_valid_after_utc


def _begin(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC).replace(microsecond=0)
    end = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - EARLIER)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:64])])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )
