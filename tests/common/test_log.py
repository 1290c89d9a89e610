import json
import logging
import os
import subprocess
import sys

import pytest

from sonofed_common.log import VARIABLE, configure_as_told, is_json, last_words, named, told

PROGRAM = """
import logging, threading, warnings
from structlog.contextvars import bound_contextvars
from sonofed_common.contract.errors import OrderError
from sonofed_common.log import configure_as_told, log_event

configure_as_told()
log = logging.getLogger("sonofed_client.some.place")
log.debug("nobody wants to know")
with bound_contextvars(study="tiny", round=1):
    log.info("job done", extra={"seconds": 0.5})
    # Facts by names that a logging record has itself.
    log_event({"time": 1.0, "event": "study-failed", "message": "why", "name": "x", "args": 3})
for error in (OSError("/images/SMITH.png"), OrderError("ship it first")):
    try:
        raise error
    except Exception:
        log.exception("not done")
logging.getLogger("pydicom").warning("odd name SMITH")
logging.getLogger("pydicom").warning("odd", extra={"patient": "SMITH"}, stack_info=True)
logging.getLogger("flwrx").warning("SMITH")
logging.getLogger("pydicom").warning("%d", "SMITH")
logging.getLogger("pydicom").info("SMITH")
warnings.warn("SMITH")
logging.getLogger("flwr").info("   ")
logging.getLogger("flwr").info("received")
thread = threading.Thread(target=lambda: open("/images/SMITH.png"))
thread.start()
thread.join()
raise ValueError("SMITH")
"""


def output(environment):
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_a_process_logs_json_that_quotes_nothing(tmp_path):
    done = output(told("enclave", site="north"))
    assert done.returncode == 1 and done.stdout == "" and "SMITH" not in done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all(list(line)[:3] == ["time", "level", "event"] for line in lines)
    assert {(line["process"], line["site"]) for line in lines} == {("enclave", "north")}
    job, event, text, ours, library, extra, alike, warned, flower, thread, end = lines
    assert (job["event"], job["seconds"]) == ("job done", 0.5)
    assert event["message"] == "why" and event["name"] == "x" and event["level"] == "warning"
    assert [(x["study"], x["round"]) for x in (job, event)] == [("tiny", 1)] * 2
    assert "study" not in text and text["error"] == "OSError" and "<module>" in text["frames"]
    assert ours["error"].startswith("ship it first")
    kept_out = [line["library"] for line in (library, extra, alike, warned)]
    assert kept_out == ["pydicom", "pydicom", "flwrx", "py.warnings"]
    assert extra.keys() == library.keys()
    assert flower["event"] == "received"
    assert (thread["error"], end["error"]) == ("FileNotFoundError", "ValueError")
    assert end["level"] == "critical"


def test_a_supervisor_may_name_a_file(tmp_path):
    log = tmp_path / "relay.log"
    for _ in range(2):
        assert output(told("relay", log, site="north")).stderr == ""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == 22 and {line["process"] for line in lines} == {"relay"}


def test_without_a_supervisor_nothing_is_changed(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    before = list(logging.getLogger().handlers)
    configure_as_told()
    assert logging.getLogger().handlers == before and not is_json()


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"study": "tiny", "round": 0, "seed": 3}, {"study": "tiny", "round": 0}),
        ({"study": "tiny\nSMITH", "round": -1}, {}),
        ({"study": "x" * 65, "round": True}, {}),
        ({"study": ["tiny"], "round": "1"}, {}),
        ({}, {}),
    ],
)
def test_only_names_of_the_right_form_are_bound(config, found):
    assert named(config) == found


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ('{"event": "first"}\n{"time": "t", "event": "port 3 is taken"}\n', "port 3 is taken"),
        ("error: no kit is here\n", "error: no kit is here"),
        ("[]\n", "[]"),
        ("", ""),
    ],
)
def test_the_last_words_of_a_log(log, words):
    assert last_words(log) == words
