"""Phantom images of 128 x 128 on one core; the project asks for 100 in at most 10 seconds.

Prints one JSON line::

    OMP_NUM_THREADS=1 python benchmarks/phantoms.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time

from sonofed_simulations.phantoms.generator import generate
from sonofed_simulations.phantoms.scanner import SCANNERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--scanner", default="source", choices=sorted(SCANNERS))
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    began = time.perf_counter()
    made = sum(1 for _ in generate(SCANNERS[arguments.scanner], arguments.images, seed=0))
    taken = time.perf_counter() - began
    figures = {
        "benchmark": "phantoms",
        "images": made,
        "seconds": round(taken, 3),
        "seconds_per_100": round(100 * taken / made, 3),
        "ratio_to_10_seconds": round(10 * taken / made, 3),
        "machine": platform.processor() or platform.machine(),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
