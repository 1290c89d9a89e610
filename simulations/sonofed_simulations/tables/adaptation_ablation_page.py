"""Rows and words of the page on what each part of ADAptation adds."""

from __future__ import annotations

from sonofed_simulations.tables.ablation import Stage
from sonofed_simulations.tables.ablation_points import AblationSettings
from sonofed_simulations.tables.arm_findings import Claim
from sonofed_simulations.tables.arm_page import About
from sonofed_simulations.tables.arm_summary import MEAN
from sonofed_simulations.tables.redrawn_page import WORK

FULL_METHOD = "full method, k = 4"
RANDOM = "Random"

PARTS: dict[str, tuple[Stage, int] | None] = {
    FULL_METHOD: ("full", 4),
    "without reconstruction": ("without reconstruction", 4),
    "without hypersphere": ("without hypersphere", 4),
    "without contrastive learning": ("without contrast", 4),
    "k = 2": ("full", 2),
    "k = 6": ("full", 6),
    "k = 8": ("full", 8),
    RANDOM: None,
}
"""Stage and clusters of each arm; None draws at random."""
PUBLISHED = {
    FULL_METHOD: ".8081",
    "without reconstruction": "-0.61 points",
    "without hypersphere": "lower",
    "without contrastive learning": "-4.94 points",
    **dict.fromkeys(("k = 2", "k = 6", "k = 8"), "below .8081"),
}
CLAIMS = (
    Claim(
        "Contrastive learning adds 4.94 points of accuracy there",
        ("without contrastive learning",),
        MEAN,
        -1,
    ),
    Claim(
        "Hypersphere regularisation adds more there, how much the text at hand does not print",
        ("without hypersphere",),
        MEAN,
        -1,
    ),
    Claim(
        "Leaving reconstruction out costs 0.61 points there",
        ("without reconstruction",),
        MEAN,
        -1,
    ),
    Claim(
        "Four clusters are the best there, with an accuracy of .8081",
        ("k = 2", "k = 6", "k = 8"),
        MEAN,
        -1,
    ),
    Claim("The full method surpasses Random there", (RANDOM,), MEAN, -1),
)
ADAPTED = (
    "The work fine-tunes five whole networks for 140 epochs, at 512 px, after 200 epochs of "
    "contrastive training with ResNet-50: ours is one linear head on EfficientNet-Lite0, and "
    "says whether the images chosen are better ones, not what whole networks gain.",
    "The work adds its parts one after another; ours are left out one at a time, against the "
    "full method.",
    "The full method is on our defaults: margin in place of the range of the angles, ranks in "
    "place of radians, SDEdit in place of pure noise (docs/methods.md).",
    "The text at hand does not print the cells of Table 3: the published column is from the prose.",
)


def about(settings: AblationSettings) -> About:
    """What the page says beside the numbers."""
    embedding = settings.embedding
    return About(
        title="What each part of ADAptation adds",
        work=f"Table 3 of {WORK}; here contrastive training is {embedding.rounds} x "
        f"{embedding.local_epochs} epochs, at {settings.source.image_size} px",
        claims=CLAIMS,
        published="accuracy printed there, or its change",
        focus=MEAN,
        method=_method(settings),
        adapted=ADAPTED,
    )


def _method(settings: AblationSettings) -> tuple[str, ...]:
    embedding = settings.embedding
    return (
        "Source BUSI (Cairo); hospitals BUS-BRA by scanner (Rio de Janeiro) and BrEaST (Poland), "
        f"as in scenario `{settings.source.scenario}`. The source's classifier and diffusion stack "
        f"are {settings.source.words()}.",
        "Each seed is a patient-level split (four fifths pool, one fifth test) with a contrastive "
        f"training of its own, rounds times epochs: {embedding.rounds} x {embedding.local_epochs} "
        "over four sites, student and predictor averaged. Arms of one stage differ in k alone.",
        "Every arm chooses 20% of all pools together, by rank of the margin plus rank of r, and "
        "fine-tunes the linear head by federated averaging, on features of the start model with "
        "the site's normalisation statistics: no arm's embedding enters the classifier. Nothing "
        "was chosen on target labels.",
        "without hypersphere: vectors keep their lengths, the loss is the mean squared distance, "
        "k-means, margin and r are Euclidean. without contrastive learning: features of the start "
        "model, under one set of normalisation statistics from all sites' reconstructions, as the "
        "trained encoder has it. without reconstruction: pairs of augmentations, r to the source's "
        "centroids. Random: the mean of ten draws a seed.",
        "What was chosen stands under 'What else the cells tell': all labels, those at each site, "
        "and the share of all that is malignant. Random's are about what the pools hold.",
        "How many labels an arm saves against Random cannot be told from one budget: the table "
        "`adaptation-selection` (docs/results/adaptation-selection) tells it, of the same rule on "
        "features of the start model (`dual-margin-near`), with neither contrastive training nor "
        "reconstruction.",
    )
