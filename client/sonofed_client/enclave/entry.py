"""An entry: one line of the ledger, before it is numbered, chained and signed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sonofed_common.contract.configuration import Model

Outcome = Literal["sent", "refused", "failed", "approved", "denied", "note"]
MESSAGE_LENGTH = 400
"""Characters of a stranger's or an error's sentence that stand in an entry."""


class Entry(Model):
    """One line of the ledger.

    Attributes
    ----------
    outcome : str
        ``sent`` and ``refused`` are messages; ``failed`` is work that ended in an error, whose
        sentence was sent; ``approved`` and ``denied`` are decisions on studies; ``note`` is else.
    study, study_digest : str
        Name, and digest of the approved content; empty where there is none.
    round : int or None
        Of the action, where it has rounds.
    action : str
        As asked, cut to 64 characters.
    records : tuple
        (key, dtype, shape) of each array; config and metrics as (key, ``config`` or ``metric``,
        ()).
    bytes : int
        Of the payload; see `sonofed_client.enclave.ledger.payload`.
    sha256 : str
        Of the payload.
    rule : str
        Clause of the policy that let it pass or refused it.
    privacy : dict
        ``<key> clip`` and ``<key> noise`` (a multiple of the clip) that were applied.
    message : str
        Why, where it did not pass.
    repeats : int
        How many refusals or failures of its kind the entry stands for, which came after one that
        has an entry of its own; 0 in an entry of one message.
    """

    outcome: Outcome
    study: str = ""
    study_digest: str = ""
    round: int | None = None
    action: str = ""
    records: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
    bytes: int = Field(default=0, ge=0)
    sha256: str = ""
    rule: str = ""
    privacy: dict[str, float] = Field(default_factory=dict)
    message: str = ""
    repeats: int = Field(default=0, ge=0)
