"""Names of the actions, in a module of their own: a relay starts without their parameters."""

from __future__ import annotations

DESCRIBE = "query.describe"

ACTION_NAMES = (
    DESCRIBE,
    "query.missing",
    "train.install",
    "train.reconstruct",
    "train.embed",
    "query.cluster",
    "train.score",
    "query.histogram",
    "train.select",
    "query.annotations",
    "train.classifier",
    "evaluate.classifier",
    "train.pretrain",
    "train.segmenter",
    "train.ensemble",
    "evaluate.segmenter",
)
