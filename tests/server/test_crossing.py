"""What a coordinator tells of an exchange that lasts."""

import json
import os
import time
from datetime import UTC, datetime

import pytest
import tomli_w

from sonofed_common.runtime import Events
from sonofed_common.supervision.family import Identity
from sonofed_server.study.crossing import BLOCK_BYTES, bytes_since
from sonofed_server.study.desk import Entry, Wish
from sonofed_server.study.once import Met
from sonofed_server.study.standing import standing
from sonofed_server.study.workspace import Workspace

BEGAN = 1_000_000
SITES = ["north", "south", "east"]


@pytest.fixture
def log(tmp_path):
    return tmp_path / "front.log"


def line(at, size, path="/v1/fleet/push-object"):
    told = datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
    return json.dumps({"time": told, "path": path, "in": size, "out": 2 * size}) + "\n"


def test_what_crossed_since_a_time_is_counted(log):
    assert bytes_since(log, BEGAN) == 0
    log.write_text("".join(line(BEGAN + n, 10) for n in range(5)))
    assert bytes_since(log, BEGAN + 2.9) == 3 * 30
    assert bytes_since(log, 0) == 5 * 30 and bytes_since(log, BEGAN + 9) == 0


def test_calls_that_come_while_nothing_moves_do_not_count(log):
    idle = ("/v1/fleet/pull-messages", "/v1/fleet/send-node-heartbeat")
    log.write_text("".join(line(BEGAN + 1, 10, path) for path in (*idle, "/v1/fleet/pull-object")))
    assert bytes_since(log, BEGAN) == 30


def test_a_log_of_many_blocks_with_broken_lines_is_read_as_a_whole(log):
    number = 3 * BLOCK_BYTES // len(line(BEGAN, 1))
    lines = [line(BEGAN + n, 1) for n in range(number)]
    lines[number // 2] = '{"time": "2026\n'
    log.write_text("".join(lines) + lines[0][:20])
    assert bytes_since(log, BEGAN) == 3 * (number - 1)


def study(root, running):
    workspace = Workspace(root / "trial")
    workspace.root.mkdir()
    workspace.study.write_text(tomli_w.dumps({"name": "trial", "cohort": {"sites": SITES}}))
    entry = Entry(workspace)
    entry.want(Wish())
    if running:
        workspace.process.write_text(Identity.of(os.getpid()).model_dump_json())
    return entry


def test_who_is_awaited_and_what_crossed_is_told(tmp_path, log):
    entry = study(tmp_path, running=True)
    events = Events(entry.workspace.events)
    events.emit("phase-started", phase="ship")
    events.emit("asked", action="query.missing", sites=SITES, bytes=30)
    assert set(standing(entry, log).sites.values()) == {"asked for query.missing"}
    events.emit("asked", action="train.install", sites=SITES, bytes=90)
    events.emit("awaited", site="north")
    events.emit("awaited", site="south")
    log.write_text(line(time.time() + 1, 5))
    now = standing(entry, log)
    assert now.sites == {
        "north": "answered train.install",
        "south": "awaited: train.install",
        "east": "asked for train.install",
    }
    assert (now.asked, now.asked_bytes, now.crossed_bytes) == ("train.install", 90, 15)
    assert "train.install with 90 bytes" in now.lines()[2] and "15 crossed" in now.lines()[2]
    events.emit("site-failed", site="south", action="train.install", reason="gone")
    events.emit("phase-finished", phase="ship")
    now = standing(entry, log)
    assert now.sites == {
        "north": "answered train.install",
        "south": "missing: gone",
        "east": "answered train.install",
    }
    assert now.asked == "" and now.crossed_bytes == 0


def test_a_study_that_does_not_run_asks_nothing(tmp_path, log):
    entry = study(tmp_path, running=False)
    Events(entry.workspace.events).emit("asked", action="train.install", sites=SITES, bytes=90)
    assert standing(entry, log).asked == ""


def test_what_was_signed_is_met_once_within_its_time():
    now = [0.0]
    met = Met(10, lambda: now[0])
    assert met.first(b"key", "noon") and not met.first(b"key", "noon")
    assert met.first(b"other", "noon") and met.first(b"key", "later")
    now[0] = 10.0
    assert not met.first(b"key", "noon")
    now[0] = 10.1
    assert met.first(b"key", "noon")
