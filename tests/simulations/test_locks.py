"""Locks between processes that share a folder."""

import json
import subprocess
import sys
import time
from pathlib import Path

from sonofed_common.runtime import Events
from sonofed_simulations.locks import alone

HOLDER = """
import sys
from pathlib import Path
from sonofed_common.runtime import SILENT
from sonofed_simulations.locks import alone
with alone(Path(sys.argv[1]), SILENT):
    print("held", flush=True)
    sys.stdin.readline()
    Path(sys.argv[1]).with_name("made").touch()
"""


WAITER = """
import sys
from pathlib import Path
from sonofed_common.runtime import Events
from sonofed_simulations.locks import alone
path = Path(sys.argv[1])
with alone(path, Events(Path(sys.argv[2]))):
    print("made" if path.with_name("made").exists() else "nothing", flush=True)
"""


def test_a_second_process_waits_says_so_and_goes_on_when_the_first_is_killed(
    tmp_path: Path,
) -> None:
    path, told = tmp_path / "part" / "images.lock", tmp_path / "events.jsonl"
    for ends in ("made", "killed"):
        first = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert first.stdin is not None and first.stdout is not None
        assert first.stdout.readline() == "held\n"
        second = subprocess.Popen(
            [sys.executable, "-c", WAITER, str(path), str(told)], stdout=subprocess.PIPE, text=True
        )
        assert second.stdout is not None
        while not (told.exists() and "waiting" in told.read_text()):
            assert second.poll() is None
            time.sleep(0.05)
        if ends == "killed":
            first.kill()
        else:
            first.stdin.write("\n")
            first.stdin.close()
        assert first.wait(60) == (-9 if ends == "killed" else 0)
        assert second.stdout.readline() == ("made\n" if ends == "made" else "nothing\n")
        assert second.wait(60) == 0
        event = json.loads(told.read_text().splitlines()[-1])
        assert event["event"] == "waiting" and str(path) in event["reason"]
        told.unlink()
        path.with_name("made").unlink(missing_ok=True)


def test_a_free_lock_says_nothing(tmp_path: Path) -> None:
    told = tmp_path / "events.jsonl"
    for _ in range(2):
        with alone(tmp_path / "images.lock", Events(told)):
            pass
    assert not told.exists() or "waiting" not in told.read_text()
