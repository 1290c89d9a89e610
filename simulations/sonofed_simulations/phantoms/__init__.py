"""Ultrasound phantoms: simulated hospitals with their own scanners.

Tissue (``anatomy``, ``lesion``; ``abdomen``, ``organ``) gives acoustic properties anywhere;
``physics`` turns them into echoes, ``display`` into a screen image; ``generator`` draws patients
and ``dataset`` writes them.
"""

from __future__ import annotations

from sonofed_simulations.phantoms.dataset import write_dataset
from sonofed_simulations.phantoms.generator import Anatomy, Phantom, generate
from sonofed_simulations.phantoms.scanner import SCANNERS, SOURCE, Scanner

__all__ = ["SCANNERS", "SOURCE", "Anatomy", "Phantom", "Scanner", "generate", "write_dataset"]
