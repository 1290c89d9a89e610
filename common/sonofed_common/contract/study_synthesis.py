"""Section of a study that says which synthetic images its sites share."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from sonofed_common.contract.configuration import Model


class WganTraining(Model):
    """Training of one Wasserstein GAN a class."""

    loss: Literal["wasserstein", "hinge"] = "hinge"
    optimizer: Literal["adam", "rmsprop"] = Field(
        default="adam", description="adam with betas 0 and 0.9"
    )
    learning_rate: float = Field(default=1e-4, gt=0)
    critic_steps: int = Field(default=2, ge=1, description="of the critic, a step of the generator")
    steps: int = Field(default=10_000, ge=1, description="of the generator")
    batch_size: int = Field(default=32, ge=2)
    width: int = Field(default=512, ge=16, le=2048, description="maps of 4 x 4 pixels")


PAPER_WGAN: dict[str, Any] = {
    "loss": "wasserstein",
    "optimizer": "rmsprop",
    "learning_rate": 5e-5,
    "critic_steps": 5,
}
"""What preset ``paper`` says of a GAN."""


class Synthesis(Model):
    """Labelled synthetic images that each site draws by GANs of its own, for all sites."""

    image_size: Literal[16, 32, 64, 128] = Field(default=64, description="what a WGAN can draw, px")
    per_class: int = Field(
        default=50, ge=1, le=10_000, description="of each class at each site; refused ones go"
    )
