"""One enclave process for a store, not two."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sonofed_common.contract.errors import ConfigurationError


@contextmanager
def alone(store: Path) -> Iterator[None]:
    """Hold a store for this enclave process; the system lets go of it when the process ends.

    Raises
    ------
    ConfigurationError
        Another enclave process holds it.
    """
    store.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (store / "enclave.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"another enclave works on {store}; stop it first, or use that one"
            ) from None
        yield
