"""What the pages of the synthetic-data tables have in common."""

from __future__ import annotations

from sonofed_simulations.tables.equal_steps import TRANSFORMER_NOTE
from sonofed_simulations.tables.mixtures import MixtureSettings

WORK = (
    "a study of synthetic breast ultrasound by WGAN with ResNet-50, ViT-16 and a CNN-Transformer, "
    "from Egypt (BUSI) to Poland (BrEaST)"
)
ADAPTED = (
    "Malignant is the positive class and normal images are dropped. The study makes benign the "
    "positive class, and counts the normals of BUSI as benign but those of BrEaST as malignant.",
    "Balanced accuracy and AUROC stand beside accuracy: with 60% of one class in the target, "
    "accuracy alone rewards a constant answer.",
    "The source is split by group of near-duplicates, so that no image has its twin in the test; "
    "the target is tested whole.",
    "All networks start from random weights and are trained with class-weighted cross-entropy; "
    "pretrained ones would move every row. ViT-16 is ViT-S; the CNN-Transformer, after TransMed, "
    "has two layers over 1024 places of 64 maps.",
    "All arms of a network take the same number of optimiser steps, so that more images are not "
    "more training.",
    "Every synthetic image passed a memorisation gate, which is ours. The critic has spectral "
    "normalisation and no weight clipping on top, which together would cripple it.",
)


def how(settings: MixtureSettings) -> tuple[str, ...]:
    """List items on settings: images, training, GANs."""
    training, wgan = settings.training, settings.wgan
    return (
        f"Images of {settings.image_size} px. Per seed {settings.test_fraction:.0%} of BUSI's "
        "groups are held out; classifiers are trained on the rest, tested on the held-out part and "
        "on all of BrEaST. Nothing was chosen by the target.",
        f"Each classifier: {training.steps} steps of {training.batch_size} images, Adam "
        f"{training.learning_rate:g} ({TRANSFORMER_NOTE}) with a cosine, no augmentation but "
        "where the row says flips.",
        f"One GAN a class, trained on the whole pool of BUSI: {wgan.steps} generator steps with "
        f"{wgan.critic_steps} of the critic each, batch {wgan.batch_size}, {wgan.width} first "
        f"maps, {wgan.loss} loss, {wgan.optimizer} {wgan.learning_rate:g}. It has seen more real "
        "images than the classifiers of 100 have, which favours the synthetic arms. The "
        "hours hold its training where a cell had to do it.",
        "Synthetic images have the pool's class shares; a smaller set is the first part of a "
        "larger one. Where fewer passed the gate than a row is named after, the row has those: "
        "how many, a seed each, stands under 'What else the cells tell'.",
    )
