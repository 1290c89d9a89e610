"""What a process of a deployment logs: one JSON object a line, or plain lines on a terminal.

Everything logs by the standard library's loggers; here, once, is decided how that reads. Studies
and rounds are bound by structlog's context variables around the work that they name.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from sonofed_common.contract.errors import SonoFedError

VARIABLE = "SONOFED_LOG"
"""Environment variable by which a supervisor tells its programs who they are."""

KEPT_OUT = "a library says something, which is kept out of the log"
FIRST = ("time", "level", "event")
OURS = ("sonofed_common", "sonofed_client", "sonofed_server", "flwr", "uvicorn")
"""Loggers whose text was written by people who saw no image: ours, and those of Flower's programs.
The text of any other may quote the file that it stumbled over."""

_STUDY = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MOST_ROUNDS = 10**9

log = logging.getLogger(__name__)


def configure(process: str, file: Path | None = None, **known: str) -> None:
    """Have this process log to stderr: JSON lines, or readable ones where that is a terminal.

    Parameters
    ----------
    process : str
        What it is, in each line.
    file : Path, optional
        Append JSON lines to this file instead.
    known : str
        What else each line names, for example ``site``.
    """
    is_json = file is not None or not sys.stderr.isatty()
    handler = logging.StreamHandler() if file is None else logging.FileHandler(file, "a", "utf-8")
    handler.setLevel(logging.INFO)
    handler.addFilter(_says_something)
    handler.setFormatter(_formatter({"process": process, **known}, is_json))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    # What cannot be logged would be printed, with what it is about.
    logging.raiseExceptions = False
    for name in OURS:
        logging.getLogger(name).setLevel(logging.INFO)
        # Flower gives its own lines another form.
        logging.getLogger(name).handlers.clear()
    if is_json:
        sys.excepthook = _log_the_end
        sys.unraisablehook = lambda ended: _log_the_end(
            ended.exc_type, ended.exc_value, ended.exc_traceback
        )
        threading.excepthook = lambda ended: _log_the_end(
            ended.exc_type, ended.exc_value, ended.exc_traceback
        )


def told(process: str, file: Path | None = None, **known: str) -> dict[str, str]:
    """Return the environment by which a program learns what to call itself, see `configure`."""
    return {VARIABLE: json.dumps({"process": process, "file": file and str(file), **known})}


def configure_as_told() -> None:
    """Do as the supervisor said; nothing where there is none, for example in a simulation."""
    if VARIABLE not in os.environ:
        return
    words = json.loads(os.environ[VARIABLE])
    file = words.pop("file")
    configure(file=file and Path(file), **words)


def is_json() -> bool:
    """Whether this process logs JSON."""
    return any(isinstance(h.formatter, _JsonFormatter) for h in logging.getLogger().handlers)


def log_event(event: Mapping[str, Any]) -> None:
    """Log an event of `Events`; a listener."""
    facts = {name: value for name, value in event.items() if name not in ("time", "event")}
    log.log(_level(event), "%s", event["event"], extra={"facts": facts})


def json_line(event: Mapping[str, Any]) -> str:
    """Return an event as a line of the log."""
    facts = {name: value for name, value in event.items() if name != "time"}
    steps: tuple[Processor, ...] = (*_told_by_all({}), *AS_JSON)
    line: Any = {"level": logging.getLevelName(_level(event)).lower(), **facts}
    for step in steps:
        line = step(None, "", line)
    return str(line)


def named(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return which study and round a request names, to bind them around its work.

    Parameters
    ----------
    config : mapping
        A request's, of which nothing was validated yet: what has another form is left out.
    """
    study, number = config.get("study"), config.get("round")
    found: dict[str, Any] = {}
    if isinstance(study, str) and _STUDY.fullmatch(study):
        found["study"] = study
    if type(number) is int and 0 <= number <= _MOST_ROUNDS:
        found["round"] = number
    return found


def last_words(text: str) -> str:
    """Return the last thing that a log says, in words."""
    last = text.strip().splitlines()[-1:] or [""]
    try:
        return str(json.loads(last[0])["event"])
    except (ValueError, KeyError, TypeError):
        return text.strip()


def _level(event: Mapping[str, Any]) -> int:
    return logging.WARNING if str(event["event"]).endswith("-failed") else logging.INFO


def _says_something(record: logging.LogRecord) -> bool:
    try:
        # Flower says empty lines, too.
        return bool(record.getMessage().strip())
    except (TypeError, ValueError):
        # A library's text does not fit its values; its caller is not to end by that.
        return False


class _JsonFormatter(structlog.stdlib.ProcessorFormatter):
    pass


def _formatter(known: Mapping[str, str], is_json: bool) -> logging.Formatter:
    before: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        _spread,
        _keep_out,
        *_told_by_all(known),
    ]
    clean = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    if is_json:
        return _JsonFormatter(foreign_pre_chain=before, processors=[clean, *AS_JSON])
    plain = structlog.dev.ConsoleRenderer(timestamp_key="time", sort_keys=False)
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=before, processors=[clean, _without_text, plain]
    )


def _told_by_all(known: Mapping[str, str]) -> tuple[Processor, ...]:
    def add_known(_: WrappedLogger, __: str, line: EventDict) -> EventDict:
        return {**line, **known}

    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True, key="time")
    return add_known, structlog.contextvars.merge_contextvars, stamp


def _spread(_: WrappedLogger, __: str, line: EventDict) -> EventDict:
    # Facts of an event may have names that a logging record uses itself.
    facts = line.pop("facts", {})
    return {**facts, **line}


def _keep_out(_: WrappedLogger, __: str, line: EventDict) -> EventDict:
    name = line["_record"].name
    if any(name == ours or name.startswith(f"{ours}.") for ours in OURS):
        return line
    kept = {key: line[key] for key in ("_record", "_from_structlog", "level") if key in line}
    if "exc_info" in line:
        kept["exc_info"] = line["exc_info"]
    return {**kept, "event": KEPT_OUT, "library": name}


def _without_text(_: WrappedLogger, __: str, line: EventDict) -> EventDict:
    """Say of an exception its kind and where it was raised, and its text only if we wrote it."""
    found = line.pop("exc_info", None)
    if isinstance(found, tuple) and found[1] is not None:
        error = found[1]
        line["error"] = str(error) if isinstance(error, SonoFedError) else type(error).__name__
        line["frames"] = "".join(traceback.format_tb(error.__traceback__))
    return line


def _ordered(_: WrappedLogger, __: str, line: EventDict) -> EventDict:
    return {**{name: line[name] for name in FIRST}, **line}


AS_JSON: tuple[Processor, ...] = (
    _without_text,
    _ordered,
    structlog.processors.JSONRenderer(default=str),
)


def _log_the_end(
    kind: type[BaseException], error: BaseException | None, frames: TracebackType | None
) -> None:
    found = (kind, error or kind(), frames)
    log.critical("this process, or a thread of it, ended by an error", exc_info=found)
