import signal
import subprocess
import sys

import pytest

from sonofed_common.runtime import link_atomically


def test_a_link_points_to_the_old_target_until_it_points_to_the_new_one(tmp_path):
    link, old, new = (tmp_path / name for name in ("link", "old", "new"))
    for target in (old, new):
        target.mkdir()
    link_atomically(link, old)
    with pytest.raises(OSError, match="too long"):
        link_atomically(link, tmp_path / ("x" * 5000))
    assert link.resolve() == old
    link_atomically(link, new)
    assert link.resolve() == new and sorted(tmp_path.iterdir()) == [link, new, old]


def test_a_process_notes_that_it_shall_end_whatever_it_does():
    script = (
        "import os, signal\n"
        "from sonofed_common.runtime import end_signals\n"
        "came = end_signals()\n"
        # Each hits the main thread at another place of what it does.
        "while len(came) < 200:\n"
        "    before = len(came)\n"
        "    os.kill(os.getpid(), (signal.SIGTERM, signal.SIGINT)[before % 2])\n"
        "    assert len(came) > before\n"
        "print(sorted(set(came)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, timeout=60, text=True
    )
    assert done.stdout == f"{[int(signal.SIGINT), int(signal.SIGTERM)]}\n", done.stderr
