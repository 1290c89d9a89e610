"""How a SonoFed command fails: one clear sentence and the catalogue's exit code, no traceback."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

import click
import typer
from typer.core import TyperGroup

from sonofed_common.contract.errors import ConfigurationError, EnrolmentError, SonoFedError
from sonofed_common.log import is_json
from sonofed_common.preflight import Finding, verdict

log = logging.getLogger(__name__)


class Commands(TyperGroup):
    """A group of commands that turns what a user can act on into a sentence and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that the arguments name.

        Raises
        ------
        typer.Exit
            The command failed with an error of the catalogue, or could not use a file.
        """
        try:
            return super().invoke(ctx)
        except SonoFedError as error:
            failure = error
        except BrokenPipeError:
            raise
        except OSError as error:
            # A log may be read by who may not know an image's name.
            parts = (error.strerror, None if is_json() else error.filename)
            what = ": ".join(str(part) for part in parts if part)
            failure = ConfigurationError(
                f"{what or type(error).__name__}; check the path and its permissions"
            )
        if is_json():
            log.error("%s", failure)
        else:
            print(f"error: {failure}", file=sys.stderr)
        raise typer.Exit(failure.exit_code)


def application(help: str) -> typer.Typer:
    """Make the top-level app of a program; add its commands to it.

    Parameters
    ----------
    help : str
        One sentence about the program.

    Notes
    -----
    An interrupt ends the program with exit code 130, which is Typer's own behaviour. A defect of
    ours still shows its traceback, without the values of variables: those may be a site's data.
    """
    return typer.Typer(
        cls=Commands,
        help=help,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_show_locals=False,
    )


def tell(findings: Iterable[Finding], json: bool) -> NoReturn:
    """Print what a preflight found, each line as it is found, and end with its exit code."""
    kept = []
    for finding in findings:
        kept.append(finding)
        print(finding.model_dump_json() if json else finding.line(), flush=True)
    raise typer.Exit(verdict(kept))


def agreed_words(given: str | None, shown: str) -> str:
    """Return what the other side read out over the phone.

    Parameters
    ----------
    given : str or None
        From the command line.
    shown : str
        The words to compare, for a person who sits before a terminal.

    Raises
    ------
    EnrolmentError
        Nobody is there to ask, or the person says that the words differ.
    """
    if given is not None:
        return given
    if not sys.stdin.isatty():
        raise EnrolmentError("have the other side read its words to you, and give them: --words")
    print(f"\n    {shown}\n")
    if not typer.confirm("Does the other side read out these same words?"):
        raise EnrolmentError("the words differ: what came is not what the other side sent")
    return shown
