import json
import sys

import pytest
from typer.testing import CliRunner

from sonofed_common.cli import application
from sonofed_common.contract.errors import CATALOGUE, SonoFedError
from sonofed_common.progress import progress_listener
from sonofed_common.runtime import Events


def app_that_raises(error):
    app = application("A program.")

    @app.command()
    def work():
        raise error

    @app.command()
    def rest():
        print("done")

    return app


@pytest.mark.parametrize("error", CATALOGUE.values(), ids=list(CATALOGUE))
def test_an_error_of_the_catalogue_is_one_line_and_its_exit_code(error):
    result = CliRunner().invoke(app_that_raises(error("what, where, what to do")), ["work"])
    assert result.exit_code == error.exit_code != 0
    assert result.stderr == f"error: what, where, what to do [{error.code}]\n"
    assert result.stdout == ""


def test_other_commands_and_other_errors_are_untouched():
    app = app_that_raises(KeyError("a defect"))
    assert CliRunner().invoke(app, ["rest"]).stdout == "done\n"
    assert isinstance(CliRunner().invoke(app, ["work"]).exception, KeyError)
    assert CliRunner().invoke(app, ["wrok"]).exit_code == 2


def test_a_file_that_cannot_be_used_is_one_sentence():
    error = PermissionError(13, "Permission denied", "/data/results.json")
    result = CliRunner().invoke(app_that_raises(error), ["work"])
    assert result.exit_code == 20
    assert result.stderr == (
        "error: Permission denied: /data/results.json; check the path and its permissions "
        "[configuration]\n"
    )


def test_an_interrupt_ends_with_130():
    assert CliRunner().invoke(app_that_raises(KeyboardInterrupt()), ["work"]).exit_code == 130


def test_the_program_itself_exits_with_the_code(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program", "work"])
    with pytest.raises(SystemExit) as left:
        app_that_raises(SonoFedError("what"))()
    assert left.value.code == SonoFedError.exit_code
    assert capsys.readouterr().err.startswith("error: what")


def test_events_are_json_lines_off_a_terminal(capsys):
    with progress_listener() as listener:
        events = Events(listeners=[listener])
        events.emit("phase", name="embed")
        list(events.track("ab", "letters", 2))
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines] == ["phase", *["progress"] * 3]
    assert [(line["done"], line["total"]) for line in lines[1:]] == [(0, 2), (1, 2), (2, 2)]


def test_a_terminal_shows_a_bar_a_task(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_listener() as listener:
        events = Events(listeners=[listener])
        events.emit("phase", name="embed")
        list(events.track("ab", "letters", 2))
        list(events.track("abc", "more letters", 3))
    shown = capsys.readouterr().err
    assert "letters" in shown and "2/2" in shown and "3/3" in shown
    assert "{" not in shown
