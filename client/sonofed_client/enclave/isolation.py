"""Isolation: an enclave has no network, not even one that is switched off."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

from sonofed_client.enclave.master_key import MasterKey
from sonofed_client.settings import MasterKeySource, SiteSettings

_POWERLESS = ("setpriv", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs")
WRAPPERS = (
    ("unshare", "--net", *_POWERLESS),
    ("unshare", "--map-root-user", "--net", *_POWERLESS),
)
"""As root, and for other users where the kernel lets them have namespaces of their own. Without
capabilities, for root has the one that would lead back into a network."""

DROPS = (_POWERLESS, ("setpriv", "--no-new-privs"))
"""Where there is no network to begin with: as root, and for users who have no capabilities."""

ENTERED = "SONOFED_ISOLATED"
KEY_DESCRIPTOR = "SONOFED_MASTER_KEY_DESCRIPTOR"
PROBE_SECONDS = 20.0
_SIOCGIFFLAGS, _UP, _LOOPBACK = 0x8913, 0x1, 0x8


def isolated() -> bool:
    """Whether this process has no network: no interface but a loopback is up."""
    lines = Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines()[2:]
    # A socket of the one family that a hardened unit leaves to this process.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        for name in (line.partition(":")[0].strip() for line in lines):
            question = struct.pack("16s16x", name.encode())
            (flags,) = struct.unpack_from("16xH", fcntl.ioctl(probe, _SIOCGIFFLAGS, question))
            if flags & _UP and not flags & _LOOPBACK:
                return False
    return True


def powerless() -> bool:
    """Whether this process has no capability and can gain none, for one leads into a network."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return int(status["CapPrm"], 16) == 0 and status["NoNewPrivs"] == "1"


def way_out() -> str:
    """Return in words how this process could reach a network, or nothing where it cannot."""
    if not isolated():
        return "could reach the network"
    return "" if powerless() else "could go back into a network, for it keeps its capabilities"


def enter(settings: SiteSettings) -> None:
    """Begin this process again without a network, and without the capabilities to get one.

    Return where there is nothing to take away, or the machine does not let us.

    Parameters
    ----------
    settings : SiteSettings
        A command that asks the hospital's key management for the master key needs the network: it
        runs now, and the new process finds the key in a file in memory, which no other can open.
    """
    if ENTERED in os.environ or not way_out():
        return
    for wrapper in DROPS if isolated() else WRAPPERS:
        if _works(wrapper):
            environment = {**os.environ, ENTERED: "1"}
            if settings.master_key is not None and settings.master_key.command:
                environment[KEY_DESCRIPTOR] = str(_in_memory(MasterKey.of(settings).read()))
            command = [*wrapper, "--", sys.executable, *sys.orig_argv[1:]]
            os.execvpe(command[0], command, environment)


def with_key(settings: SiteSettings) -> SiteSettings:
    """Return settings that find the master key where `enter` put it, if it did."""
    descriptor = os.environ.pop(KEY_DESCRIPTOR, None)
    if descriptor is None:
        return settings
    source = MasterKeySource(file=Path(f"/proc/self/fd/{descriptor}"))
    return settings.model_copy(update={"master_key": source})


def _works(wrapper: tuple[str, ...]) -> bool:
    try:
        done = subprocess.run(
            [*wrapper, "--", "true"], capture_output=True, timeout=PROBE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _in_memory(key: bytes) -> int:
    descriptor = os.memfd_create("master-key", 0)
    os.fchmod(descriptor, 0o600)
    os.write(descriptor, key.hex().encode())
    return descriptor
