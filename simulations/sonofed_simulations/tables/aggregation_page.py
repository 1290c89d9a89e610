"""What the page of the aggregation table says beside its numbers."""

from __future__ import annotations

from sonofed_common.contract.study import Finetuning
from sonofed_simulations.tables.arm_findings import Claim
from sonofed_simulations.tables.arm_page import About
from sonofed_simulations.tables.arm_summary import MEAN, WORST

STRATEGIES = ("FedProx", "SiloBN", "FedBN", "FedDG-GA", "FedAdam", "SCAFFOLD")
METRICS = ("accuracy", "balanced_accuracy", "auroc")

CLAIMS = (
    Claim(
        "Each strategy's authors report a higher accuracy than FedAvg's where sites differ, or the "
        "same one in fewer rounds",
        STRATEGIES,
        MEAN,
        metrics=METRICS,
    ),
    Claim("FedDG-GA is to even the sites out, which the worst one shows", ("FedDG-GA",), WORST),
    Claim(
        "A site that trains alone is expected below the federation",
        ("local only",),
        MEAN,
        -1,
        metrics=METRICS,
    ),
    Claim("One site that has all images is expected above it", ("pooled",), MEAN, metrics=METRICS),
)


def about(adam: Finetuning, sgd: Finetuning, rounds: int, budget: float, image_size: int) -> About:
    """Return what the page says of a table of these settings."""
    return About(
        title="Aggregation strategies",
        work="FedAvg (McMahan et al., AISTATS 2017), FedProx (Li et al., MLSys 2020), SCAFFOLD "
        "(Karimireddy et al., ICML 2020), FedAdam (Reddi et al., ICLR 2021), FedDG-GA (Zhang et "
        "al., CVPR 2023), SiloBN (Andreux et al., 2020) and FedBN (Li et al., ICLR 2021)",
        claims=CLAIMS,
        published="published",
        focus=MEAN,
        method=(
            "Scenario breast_three_countries: the source is BUSI (Cairo), the four hospitals are "
            "BUS-BRA by scanner (Rio de Janeiro) and BrEaST (Poland). All arms fine-tune one "
            f"EfficientNet-Lite0 of {image_size} px, trained once on the source; none sees a test "
            "image, and a seed makes the patient-level split (20% test), the labelled images and "
            "the order, the same for all arms.",
            f"Labels: a random {budget:.0%} of each hospital's pool, the same images in all arms.",
            f"{rounds} rounds of {adam.local_epochs} local epochs, batches of "
            f"{adam.batch_size}, Adam with a step of {adam.learning_rate:g} at the sites; local "
            "only and pooled take as many epochs. The sites' rounds and the coordinator's means "
            "are the product's own functions, called without the messages between them.",
            "Nothing was tuned, on the target or elsewhere. FedProx: mu = 0.01, of the values that "
            "its authors tried. FedAdam: betas 0.9 and 0.99, tau 0.001, as its authors; "
            "step 0.01 at the coordinator. FedDG-GA: step 0.2, falling linearly over the rounds. "
            f"SCAFFOLD works with plain steps only: {sgd.learning_rate:g}, the step of FedBN's "
            "experiments; FedAvg, SGD takes the same and is what SCAFFOLD "
            "is compared with.",
            "Where the arms share batch normalisation's statistics these are averaged with the "
            "weights. SiloBN is finetuning.batch_norm = site: each hospital re-estimates the "
            "statistics on its own unlabelled pool, and the affine weights are shared. FedBN is "
            "batch_norm = local: each hospital keeps its normalisation layers whole, affine "
            "weights and the running statistics of its labelled images, and all else is averaged.",
        ),
        adapted=(
            "No work above has this table, so the column of published numbers is empty: their data "
            "are other images, of more classes and many more rounds.",
            "FedDG-GA's gaps are of the labelled training images, and the first weights are the "
            "shares of labels, as FedAvg's. Sites weigh by their labels in all arms.",
        ),
    )
