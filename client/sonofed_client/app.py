"""The hospital's Flower ClientApp: a thin relay of named actions to the enclave."""

from __future__ import annotations

import importlib
import logging
import os
from functools import lru_cache
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from sonofed_common.contract.actions import ACTIONS
from sonofed_common.contract.errors import EngineError, SonoFedError
from sonofed_common.contract.recorddict import from_recorddict, to_recorddict
from sonofed_common.contract.records import Records

SITES_VARIABLE = "SONOFED_SIMULATED_SITES"
"""Environment variable of a simulation: the sites' settings files, in the order of partitions."""

log = logging.getLogger(__name__)
app = ClientApp()


def relay(message: Message, context: Context) -> Message:
    """Pass a message to the enclave and its reply, or its error, back.

    Parameters
    ----------
    message : Message
        Its type is the action's name.
    context : Context
        Its node configuration says which simulated site this is.
    """
    try:
        reply = _perform(message, context)
    except SonoFedError as error:
        reply = Records(config={"error": error.code, "message": error.message})
    except Exception:
        # A text that we did not write may name a file or a patient: it stays in the site's log.
        log.exception("%s failed", message.metadata.message_type)
        sentence = "the site could not do the work; its own log says why"
        reply = Records(config={"error": SonoFedError.code, "message": sentence})
    return Message(to_recorddict(reply), reply_to=message)


def _perform(message: Message, context: Context) -> Records:
    try:
        enclave = _enclave(_settings(context))
    except SonoFedError as error:
        # What opening a site says names its folders: that is for the site alone.
        log.error("the site cannot be opened: %s", error)
        raise type(error)("this site is not ready; its own log says why") from None
    reply: Records = enclave.perform(
        message.metadata.message_type, from_recorddict(message.content)
    )
    return reply


def _settings(context: Context) -> str:
    files = [f for f in os.environ.get(SITES_VARIABLE, "").split(os.pathsep) if f]
    partition = int(str(context.node_config.get("partition-id", -1)))
    if not 0 <= partition < len(files):
        raise EngineError("this node has no site; start it with its site's settings")
    return files[partition]


@lru_cache(maxsize=64)
def _enclave(settings: str) -> Any:
    # Imported by name: the relay itself never loads torch or a model.
    return importlib.import_module("sonofed_client.enclave.opening").open_enclave(settings)


for name in ACTIONS:
    category, _, action = name.partition(".")
    getattr(app, category)(action)(relay)
