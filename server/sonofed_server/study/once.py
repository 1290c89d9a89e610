"""A hospital's signed request counts once.

Flower signs the time of a request and nothing else of it, and takes that signature for five minutes
and as often as it comes: whoever got hold of one could ask for anything in the hospital's name.
"""

from __future__ import annotations

import logging
import threading
import time
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Callable

from fastapi import HTTPException, Request
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

WINDOW_SECONDS = TIMESTAMP_TOLERANCE + 2 * SYSTEM_TIME_TOLERANCE
"""How long Flower takes a signature, also one of a clock that is a little ahead."""

UNAUTHORIZED = 401
log = logging.getLogger(__name__)


class Met:
    """What was met within the last seconds.

    Parameters
    ----------
    seconds : float
        How long it is kept.
    now : callable
        Seconds of a clock that never goes back.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._now = seconds, now
        self._lock = threading.Lock()
        self._times: OrderedDict[tuple[bytes, str], float] = OrderedDict()

    def first(self, key: bytes, signed: str) -> bool:
        """Whether a key's signature of a text is met for the first time."""
        with self._lock:
            now = self._now()
            while self._times and next(iter(self._times.values())) < now - self._seconds:
                self._times.popitem(last=False)
            # Not the signature itself: of one text there are many that are valid.
            if (key, signed) in self._times:
                return False
            self._times[key, signed] = now
            return True


def once(authenticate: Callable[[Request], None]) -> Callable[[Request], None]:
    """Return Flower's check of a request's signature, which then holds for one request.

    Parameters
    ----------
    authenticate : callable
        Flower's own check; raises ``HTTPException``.
    """
    met = Met(WINDOW_SECONDS)

    def authenticate_once(request: Request) -> None:
        authenticate(request)
        key = b64decode(request.headers[FLEET_HTTP_PUBLIC_KEY_HEADER])
        if not met.first(key, request.headers[TIMESTAMP_HEADER]):
            log.warning("a signed request that was met before came to %s", request.url.path)
            raise HTTPException(UNAUTHORIZED, "Invalid SuperNode authentication")

    return authenticate_once
