"""Make a hospital's keys on its own machine, and the request that asks for enrolment."""

from __future__ import annotations

from datetime import UTC, datetime

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_ssh_private_key,
)

from sonofed_client.enclave.keys import KeyRing
from sonofed_client.enclave.master_key import MasterKey
from sonofed_client.provisioning.place import Hospital
from sonofed_client.settings import MasterKeySource
from sonofed_common.contract.enrolment import (
    Enrolment,
    EnrolmentRequest,
    canonical,
    node_public_text,
)
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.runtime import write_atomically


def make_request(hospital: Hospital, site: str) -> EnrolmentRequest:
    """Make the keys that are not there yet, and write the signed request.

    Parameters
    ----------
    hospital : Hospital
        Its folder is made if absent, closed to other users.
    site : str
        The hospital's name, as the coordinator's project has it.

    Returns
    -------
    EnrolmentRequest
        Also in ``request.json``.

    Raises
    ------
    ConfigurationError
        A key that is there cannot be read.
    StoreError
        The store cannot be opened with the master key that is there.
    """
    hospital.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    node = _node_key(hospital)
    # The store's key ring holds the ledger's key; both are made here, with the master key.
    master = MasterKey(MasterKeySource(file=hospital.master_key), make=True)
    ledger = KeyRing.open(hospital.store, master).ledger
    enrolment = Enrolment(
        site=site,
        node_key=node_public_text(node.public_key()),
        ledger_key=ledger.public_key().public_bytes_raw().hex(),
        created=datetime.now(UTC).replace(microsecond=0),
    )
    request = EnrolmentRequest.sign(enrolment, node, ledger)
    write_atomically(hospital.request, canonical(request))
    return request


def replace_node_key(hospital: Hospital, site: str) -> EnrolmentRequest:
    """Make a new node key in the place of the old one, and write the request that enrols it."""
    write_atomically(hospital.node_key, _fresh(), mode=0o600)
    return make_request(hospital, site)


def read_node_key(hospital: Hospital) -> ec.EllipticCurvePrivateKey:
    """Read the node's private key.

    Raises
    ------
    ConfigurationError
        It is absent, or is no P-384 key in OpenSSH form.
    """
    try:
        key = load_ssh_private_key(hospital.node_key.read_bytes(), password=None)
    except OSError as error:
        raise ConfigurationError(
            f"{hospital.node_key} cannot be read ({error.strerror}); run 'sonofed-site init' there"
        ) from None
    except ValueError:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp384r1":
        raise ConfigurationError(f"{hospital.node_key} is no P-384 private key in OpenSSH form")
    return key


def _node_key(hospital: Hospital) -> ec.EllipticCurvePrivateKey:
    if not hospital.node_key.exists():
        write_atomically(hospital.node_key, _fresh(), mode=0o600)
    return read_node_key(hospital)


def _fresh() -> bytes:
    key = ec.generate_private_key(ec.SECP384R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
