"""The hospital's Flower ClientApp: a thin relay of named actions to the enclave."""

from __future__ import annotations

import logging

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from sonofed_client.relay import SITES_VARIABLE, enclave_of
from sonofed_common.contract.errors import SonoFedError
from sonofed_common.contract.names import ACTION_NAMES
from sonofed_common.contract.recorddict import from_recorddict, to_recorddict
from sonofed_common.contract.records import Records

__all__ = ["SITES_VARIABLE", "app", "relay"]

log = logging.getLogger(__name__)
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
        enclave = enclave_of(context.node_config)
    except SonoFedError as error:
        # What opening a site says names its folders: that is for the site alone.
        log.error("the site cannot be opened: %s", error)
        raise type(error)("this site is not ready; its own log says why") from None
    return enclave.perform(message.metadata.message_type, from_recorddict(message.content))


for name in ACTION_NAMES:
    category, _, action = name.partition(".")
    getattr(app, category)(action)(relay)
