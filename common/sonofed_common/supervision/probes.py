"""How one sees that a program works: it answers with its own certificate, or shows a sign."""

from __future__ import annotations

import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from sonofed_common.contract.errors import DeploymentError

ANSWER_SECONDS = 5.0


@dataclass(frozen=True)
class Endpoint:
    """Where a program answers over TLS.

    Attributes
    ----------
    host : str
        Address on this machine.
    port : int
    name : str
        What its certificate is for.
    authority : Path
        Certificate of who gave it.
    setting : str
        Names the port in the settings.
    path : str
        Asked for by ``GET``; without it the handshake is answer enough.
    """

    host: str
    port: int
    name: str
    authority: Path
    setting: str
    path: str = ""

    def works(self) -> bool:
        """Whether the program answers: a listening socket, of it or of a stranger, is no answer."""
        try:
            context = ssl.create_default_context(cafile=self.authority)
            with (
                socket.create_connection((self.host, self.port), ANSWER_SECONDS) as plain,
                context.wrap_socket(plain, server_hostname=self.name) as secure,
            ):
                if not self.path:
                    return True
                head = f"GET {self.path} HTTP/1.1\r\nHost: {self.name}\r\nConnection: close\r\n\r\n"
                secure.sendall(head.encode())
                return secure.makefile("rb").read().startswith(b"HTTP/1.1 ")
        except OSError:
            return False

    def require_free(self) -> None:
        """See before the program's start that nobody answers in its place.

        Raises
        ------
        DeploymentError
            Somebody does.
        """
        try:
            socket.create_connection((self.host, self.port), ANSWER_SECONDS).close()
        except OSError:
            return
        raise DeploymentError(
            f"port {self.port} of {self.host} cannot be used (another program answers there); end "
            f"that one, or name another {self.setting}"
        )


def fresh(file: Path, seconds: float) -> bool:
    """Whether a file was written within the last so many seconds."""
    try:
        return time.time() - file.stat().st_mtime < seconds
    except OSError:
        return False
