"""The hospital's Flower ClientApp: a thin relay of named actions to the enclave."""

from __future__ import annotations

import logging
import time

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from structlog.contextvars import bind_contextvars, unbind_contextvars

from sonofed_client.relay import SITES_VARIABLE, enclave_of
from sonofed_common.contract.errors import SonoFedError
from sonofed_common.contract.names import ACTION_NAMES
from sonofed_common.contract.recorddict import from_recorddict, to_recorddict
from sonofed_common.contract.records import Records
from sonofed_common.log import configure_as_told, named

__all__ = ["SITES_VARIABLE", "app", "relay"]

log = logging.getLogger(__name__)
configure_as_told()
app = ClientApp()


def relay(message: Message, context: Context) -> Message:
    """Pass a message to the enclave and its reply, or its error, back.

    Parameters
    ----------
    message : Message
        Its type is the action's name.
    context : Context
        Its node configuration names the enclave's socket or, in a simulation, the site.
    """
    bind_contextvars(action=message.metadata.message_type)
    try:
        return Message(to_recorddict(_answer(message, context)), reply_to=message)
    finally:
        unbind_contextvars("action", "study", "round")


def _answer(message: Message, context: Context) -> Records:
    began = time.monotonic()
    try:
        reply = _perform(message, context)
    except SonoFedError as error:
        log.warning("not done: %s", error)
        return Records(config={"error": error.code, "message": error.message})
    except Exception:
        # A text that we did not write may name a file or a patient: it does not leave the site.
        log.exception("%s failed", message.metadata.message_type)
        sentence = "the site could not do the work; its own log says why"
        return Records(config={"error": SonoFedError.code, "message": sentence})
    log.info("answered", extra={"seconds": round(time.monotonic() - began, 1)})
    return reply


def _perform(message: Message, context: Context) -> Records:
    asked = from_recorddict(message.content)
    bind_contextvars(**named(asked.config))
    try:
        enclave = enclave_of(context.node_config)
    except SonoFedError as error:
        # What opening a site says names its folders: that is for the site alone.
        log.error("the site cannot be opened: %s", error)
        raise type(error)("this site is not ready; its own log says why") from None
    return enclave.perform(message.metadata.message_type, asked)


for name in ACTION_NAMES:
    category, _, action = name.partition(".")
    getattr(app, category)(action)(relay)
