"""The coordinator's Flower ServerApp: hands the grid to the study engine."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from sonofed_common.log import configure_as_told
from sonofed_server.study.engine import run_study
from sonofed_server.study.grid import hasten
from sonofed_server.study.workspace import Workspace

configure_as_told()
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study in the workspace that the run configuration names."""
    hasten(grid)
    workspace = Workspace(Path(str(context.run_config["workspace"])))
    with workspace.alone():
        run_study(workspace, grid, str(context.run_config["engine"]))
