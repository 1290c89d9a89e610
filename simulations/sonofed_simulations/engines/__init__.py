"""Where a simulated study runs: inline, or on Flower's simulation."""

from typing import Literal

Engine = Literal["inline", "flower"]

Enclaves = Literal["library", "process"]
"""Whether each hospital's enclave is a process of its own, or runs inside the engine."""
