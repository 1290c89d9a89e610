"""Preflight: what can be known to be wrong before a study starts, each with what to do."""

from __future__ import annotations

import http.client
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal

from cryptography import x509

from sonofed_common.contract.configuration import Model
from sonofed_common.contract.errors import SonoFedError

State = Literal["ok", "warning", "fails"]
CONNECT_SECONDS = 10.0
SKEW_FAILS, SKEW_WARNS = 300.0, 60.0
"""Flower refuses a node whose clock is five minutes off."""

EXPIRY_WARNS_DAYS = 30
GIGABYTE = 10**9


class Finding(Model):
    """One thing that was looked at.

    Attributes
    ----------
    subject : str
        What was looked at.
    state : {"ok", "warning", "fails"}
    said : str
        What was found and, unless it is well, what to do.
    """

    subject: str
    state: State
    said: str

    def line(self) -> str:
        """Say it in one line."""
        return f"{self.state:<8} {self.subject}: {self.said}"


def look(subject: str, work: Callable[[], str]) -> Finding:
    """Do one check whose failure is an error of the catalogue, and whose answer is in words."""
    try:
        return Finding(subject=subject, state="ok", said=work())
    except SonoFedError as error:
        return Finding(subject=subject, state="fails", said=error.message)


def unwatched(subject: str, start: str) -> Finding:
    """Say of a program that it runs on although its supervisor was killed.

    Parameters
    ----------
    subject : str
        The program.
    start : str
        Command that starts all anew.
    """
    said = f"runs on, but its supervisor was killed, and nobody watches it; run '{start}' again"
    return Finding(subject=subject, state="warning", said=said)


def certificate(subject: str, file: Path, renewal: str) -> Finding:
    """Check when a certificate expires.

    Parameters
    ----------
    subject : str
        Whose it is.
    file : Path
        The certificate, PEM.
    renewal : str
        What to do about it.
    """
    try:
        until = x509.load_pem_x509_certificate(file.read_bytes()).not_valid_after_utc
    except (OSError, ValueError):
        said = f"{file} is damaged or cannot be read; restore it from its backup, or {renewal}"
        return Finding(subject=subject, state="fails", said=said)
    days = (until - datetime.now(UTC)).days
    if days < 0:
        return Finding(subject=subject, state="fails", said=f"expired on {until.date()}; {renewal}")
    state: State = "warning" if days < EXPIRY_WARNS_DAYS else "ok"
    hint = f"; {renewal}" if state == "warning" else ""
    return Finding(subject=subject, state=state, said=f"valid until {until.date()}{hint}")


def front(address: str, authority: Path, now: Callable[[], float] = time.time) -> Iterator[Finding]:
    """Call a coordinator's front: reachable, its certificate, its clock.

    Parameters
    ----------
    address : str
        ``host:port``.
    authority : Path
        Certificate that it must be of.
    now : callable
        This machine's clock, seconds since the epoch.
    """
    host, _, port = address.rpartition(":")
    try:
        context = ssl.create_default_context(cafile=authority)
    except OSError:
        said = f"without {authority} nobody can tell who answers at {address}; mend that first"
        yield Finding(subject="coordinator", state="fails", said=said)
        return
    connection = http.client.HTTPSConnection(
        host, int(port), timeout=CONNECT_SECONDS, context=context
    )
    try:
        connection.connect()
        secure = connection.sock
        protocol = secure.version() if isinstance(secure, ssl.SSLSocket) else "plain HTTP"
        connection.request("GET", "/")
        date = connection.getresponse().getheader("Date")
    except ssl.SSLCertVerificationError as error:
        said = (
            f"{address} shows a certificate that this project's authority did not give for that "
            f"name, or that has expired ({error.verify_message}); ask the coordinator, and check "
            "that no proxy of your own opens TLS"
        )
        yield Finding(subject="coordinator", state="fails", said=said)
        return
    except socket.gaierror:
        said = f"the name {host} is not known here; check it, and this machine's name service"
        yield Finding(subject="coordinator", state="fails", said=said)
        return
    except (OSError, http.client.HTTPException) as error:
        said = (
            f"{address} does not answer ({error}); check that the coordinator is up and that your "
            "firewall lets this machine call it"
        )
        yield Finding(subject="coordinator", state="fails", said=said)
        return
    finally:
        connection.close()
    yield Finding(subject="coordinator", state="ok", said=f"{address} answers over {protocol}")
    yield clock(parsedate_to_datetime(date).timestamp() if date else None, now())


def clock(theirs: float | None, ours: float) -> Finding:
    """Compare this machine's clock with the coordinator's."""
    if theirs is None:
        said = "the coordinator did not tell its time; compare the clocks by hand"
        return Finding(subject="clock", state="warning", said=said)
    skew = ours - theirs
    words = f"{abs(skew):.0f} seconds {'ahead of' if skew > 0 else 'behind'} the coordinator's"
    if abs(skew) >= SKEW_FAILS:
        said = (
            f"this machine's clock is {words}, and beyond five minutes the coordinator takes this "
            "site for a stranger; set the clock, for example by NTP"
        )
        return Finding(subject="clock", state="fails", said=said)
    if abs(skew) >= SKEW_WARNS:
        said = f"this machine's clock is {words}; set it, for example by NTP"
        return Finding(subject="clock", state="warning", said=said)
    return Finding(subject="clock", state="ok", said=words)


def machine(folder: Path) -> Iterator[Finding]:
    """Check disk, memory and GPU."""
    free = shutil.disk_usage(folder).free / GIGABYTE
    said = f"{free:.0f} GB free for {folder}"
    if free < 1:
        yield Finding(subject="disk", state="fails", said=f"{said}; make room")
    else:
        hint = "" if free >= 10 else "; a study with large models needs more"
        yield Finding(subject="disk", state="warning" if hint else "ok", said=said + hint)
    available = _available_memory() / GIGABYTE
    hint = "" if available >= 4 else "; end other programs, or take a larger machine"
    said = f"{available:.0f} GB available{hint}"
    yield Finding(subject="memory", state="warning" if hint else "ok", said=said)
    gpu = Path("/proc/driver/nvidia/version").exists()
    yield Finding(subject="GPU", state="ok", said="there is one" if gpu else "none: CPU is used")


def verdict(findings: Iterable[Finding]) -> int:
    """Exit code of a check: 1 if anything fails."""
    return int(any(finding.state == "fails" for finding in findings))


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
