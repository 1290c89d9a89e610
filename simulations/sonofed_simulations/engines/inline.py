"""The inline engine: the real server and ClientApp in this process, message after message."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from sonofed_client.app import SITES_VARIABLE
from sonofed_client.app import app as client_app
from sonofed_common.contract.results import Results
from sonofed_common.runtime import Events
from sonofed_server.study.engine import run_study
from sonofed_server.study.workspace import Workspace

UNHANDLED = 100


class InlineGrid(Grid):
    """A grid whose nodes are calls of the ClientApp; a message is handled when its reply is pulled.

    Parameters
    ----------
    nodes : int
        Number of simulated sites; node ids are 1 to ``nodes``.
    """

    def __init__(self, nodes: int) -> None:
        # Messages take the run's identity from the process; Flower's own runtime sets it there.
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 0
        self._contexts = {
            node: Context(
                1, node, UserConfig({"partition-id": node - 1}), RecordDict(), UserConfig()
            )
            for node in range(1, nodes + 1)
        }
        self._waiting: dict[str, Message] = {}
        self._sent = 0

    def set_run(self, run: Run) -> None:
        """Not used: there is one run."""

    @property
    def run(self) -> Run:
        """Not used: there is one run."""
        raise RuntimeError("the inline engine has no Flower run")

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the node ids."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep messages until their replies are pulled."""
        ids = []
        for message in messages:
            self._sent += 1
            # Flower numbers a message when it is sent; a reply refers to that number.
            message.metadata.__dict__["_message_id"] = str(self._sent)
            self._waiting[str(self._sent)] = message
            ids.append(str(self._sent))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Handle the named messages and return their replies."""
        return [self._handle(self._waiting.pop(i)) for i in message_ids if i in self._waiting]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push and pull at once."""
        return self.pull_messages(self.push_messages(messages))

    def _handle(self, message: Message) -> Message:
        try:
            return client_app(message, self._contexts[message.metadata.dst_node_id])
        except Exception:
            # As Flower does: whatever a ClientApp raises becomes an error reply.
            return Message(Error(UNHANDLED, "the site's app failed"), reply_to=message)


def run_inline(workspace: Workspace, sites: list[Path], events: Events) -> Results:
    """Run a study in this process.

    Parameters
    ----------
    workspace : Workspace
        Laid out study.
    sites : list of Path
        Settings files in the order of the cohort.
    events : Events
        Progress.

    Raises
    ------
    SonoFedError
        The study failed.
    """
    os.environ[SITES_VARIABLE] = os.pathsep.join(str(path) for path in sites)
    study_events = Events(workspace.events, events.listeners)
    return run_study(workspace, InlineGrid(len(sites)), "inline", study_events)
