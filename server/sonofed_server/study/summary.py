"""What a study found, in lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sonofed_common.contract.results import Results


def summary(results: Results) -> Iterator[str]:
    """Say what a study found at each hospital, and what its phases cost."""
    yield f"study {results.study}, {results.seconds:.0f} s, digest {results.study_digest[:12]}"
    for name, site in results.sites.items():
        missing = f"; missing: {site.missing_reason}" if site.missing_reason else ""
        yield f"{name}: {site.images} images, {site.selected} labelled{missing}"
        for model, found in site.classifiers.items():
            stages = {s: getattr(found, s) for s in ("source", "bn_adapted", "adapted")}
            yield f"  {model}: {_scores(stages, 'auroc')}"
        if site.segmentation:
            yield f"  Dice: {_scores(dict(site.segmentation), 'dice')}"
    for phase in results.phases:
        moved = f"{phase.bytes_to_sites} bytes out, {phase.bytes_from_sites} in"
        yield f"{phase.name}: {phase.seconds:.0f} s, {moved}"


def _scores(stages: dict[Any, Any], measure: str) -> str:
    words = []
    for stage, metrics in stages.items():
        value = None if metrics is None else metrics.get(measure)
        if value is not None:
            words.append(f"{stage} {value:.3f}")
    return f"{measure} {', '.join(words)}" if words else f"no {measure}"
