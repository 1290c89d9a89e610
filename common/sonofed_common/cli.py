"""How a SonoFed command fails: one clear sentence and the catalogue's exit code, no traceback."""

from __future__ import annotations

import sys
from typing import Any

import click
import typer
from typer.core import TyperGroup

from sonofed_common.contract.errors import SonoFedError


class Commands(TyperGroup):
    """A group of commands that turns `SonoFedError` into a sentence on stderr and its exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that the arguments name.

        Raises
        ------
        typer.Exit
            The command failed with an error of the catalogue.
        """
        try:
            return super().invoke(ctx)
        except SonoFedError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None


def application(help: str) -> typer.Typer:
    """Make the top-level app of a program; add its commands to it.

    Parameters
    ----------
    help : str
        One sentence about the program.

    Notes
    -----
    An interrupt ends the program with exit code 130, which is Typer's own behaviour. A defect of
    ours still shows its traceback.
    """
    return typer.Typer(cls=Commands, help=help, no_args_is_help=True, add_completion=False)
