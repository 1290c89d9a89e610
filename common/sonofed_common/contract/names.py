"""Names of actions, classes, arrays and metrics: a module of its own, which loads nothing heavy."""

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
    "train.synthesise",
    "train.classifier",
    "evaluate.classifier",
    "train.pretrain",
    "train.segmenter",
    "train.ensemble",
    "evaluate.segmenter",
)

DECLINABLE = frozenset({"train.synthesise"})
"""Actions that a site's policy may refuse and the site takes part all the same."""

CLASSES = ("benign", "malignant")
"""What the classifiers' outputs stand for, in this order."""

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
"""What the names of a batch normalisation's buffers end in: they are no trained weights."""

RECEIVED_LOSS, TRAINED_LOSS = "received_loss", "trained_loss"
"""Loss on a site's labels of the weights that it received, and of those that it sends."""
