"""Requests read whole before Flower's middleware sees them.

Each of its layers wraps every piece of a body in tasks of its own, and a body of 7 MB comes in
more than a hundred pieces: that took the SuperLink longer than all else but its database.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


class WholeBodies:
    """ASGI middleware that passes a request's body on as one piece.

    Parameters
    ----------
    app : callable
        What answers. How large a body may be is the front's to say.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        parts: list[bytes] = []
        message = await receive()
        while message["type"] == "http.request":
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                message = {"type": "http.request", "body": b"".join(parts), "more_body": False}
                break
            message = await receive()
        waiting: list[Message] = [message]
        parts.clear()

        async def whole() -> Message:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, whole, send)
