"""Fingerprints that two people compare over the phone."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from sonofed_common.contract.errors import EnrolmentError

WORDS = 12
"""One byte each: 96 bits, so that nobody makes another key with the same words."""


@lru_cache(maxsize=1)
def _vocabulary() -> tuple[str, ...]:
    # The two-syllable half of Juola and Zimmermann's list (PGP, 1995), made for voices.
    return tuple(Path(__file__).with_name("words.txt").read_text(encoding="ascii").split())


def words_of(data: bytes) -> str:
    """Return the fingerprint of data: 12 words of a list of 256, from its SHA-256."""
    return " ".join(_vocabulary()[byte] for byte in hashlib.sha256(data).digest()[:WORDS])


def compare_words(said: str, data: bytes, whose: str) -> None:
    """Compare what the other side read out with the fingerprint of what came.

    Parameters
    ----------
    said : str
        Words, in any case, with any spaces.
    data : bytes
        What came.
    whose : str
        For the sentence, for example ``"the request"``.

    Raises
    ------
    EnrolmentError
        They differ.
    """
    if said.lower().split() != words_of(data).split():
        raise EnrolmentError(
            f"the words are not those of {whose}: either they were misread or it was replaced on "
            "its way; read them again, and if they still differ have it sent again another way"
        )
