"""Room: memory for the requests that come in or wait, bounded in all."""

from __future__ import annotations

import mmap
import os
import threading
import weakref

from sonofed_common.contract.errors import EngineError, ParameterError


def memory(size: int) -> mmap.mmap:
    """Return memory for a record; it comes with the bytes, not with the promise of them.

    Raises
    ------
    ParameterError
        The machine has not as much.
    """
    try:
        return mmap.mmap(-1, size)
    except (OSError, ValueError, OverflowError, MemoryError):
        raise ParameterError("this machine has no room for the record; send less") from None


class Room:
    """Memory for requests, of which each and all together have a bound.

    Parameters
    ----------
    most : int
        Bytes of one request.
    total : int, optional
        Bytes of all that came in and are still held; default: half of the machine's memory.
    """

    def __init__(self, most: int, total: int | None = None) -> None:
        half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        self._total = half if total is None else total
        self._most = min(most, self._total)
        self._held = 0
        self._lock = threading.Lock()

    def memory(self, size: int) -> mmap.mmap:
        """Return memory for one request; it counts until nothing refers to it any more.

        Raises
        ------
        ParameterError
            One request may not be as large.
        EngineError
            Others hold the room.
        """
        if size > self._most:
            # The bound itself is the hospital's, and tells of its policy and its machine.
            raise ParameterError(
                f"a record of {size} bytes is more than this site takes; send less"
            )
        with self._lock:
            if self._held + size > self._total:
                raise EngineError("too much waits at this site; ask again later")
            self._held += size
        try:
            taken = memory(size)
        except ParameterError:
            self._release(size)
            raise
        weakref.finalize(taken, self._release, size)
        return taken

    def _release(self, size: int) -> None:
        with self._lock:
            self._held -= size
