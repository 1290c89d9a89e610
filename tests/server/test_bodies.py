import asyncio

from hypothesis import given
from hypothesis import strategies as st

from sonofed_server.study.bodies import WholeBodies


def answered(messages, scope="http"):
    """What an app behind the middleware receives, one message a call."""
    waiting = list(messages)
    seen = []

    async def receive():
        return waiting.pop(0)

    async def app(_, receive, send):
        while len(seen) < 2:
            seen.append(await receive())
            if seen[-1]["type"] != "http.request":
                break

    async def send(_):
        raise AssertionError

    asyncio.run(WholeBodies(app)({"type": scope}, receive, send))
    return seen, waiting


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=8))
def test_a_body_in_pieces_comes_as_one(pieces):
    last = len(pieces) - 1
    messages = [
        {"type": "http.request", "body": piece, "more_body": n < last}
        for n, piece in enumerate(pieces)
    ]
    seen, left = answered([*messages, {"type": "http.disconnect"}])
    assert seen[0] == {"type": "http.request", "body": b"".join(pieces), "more_body": False}
    assert seen[1]["type"] == "http.disconnect" and not left


def test_who_leaves_in_the_middle_of_a_body_is_not_taken_for_its_end():
    half = {"type": "http.request", "body": b"half", "more_body": True}
    seen, _ = answered([half, {"type": "http.disconnect"}])
    assert seen == [{"type": "http.disconnect"}]


def test_what_is_no_request_passes():
    seen, _ = answered([{"type": "lifespan.startup"}], scope="lifespan")
    assert seen == [{"type": "lifespan.startup"}]
