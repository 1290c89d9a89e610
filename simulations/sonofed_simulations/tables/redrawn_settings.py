"""How large the tables after ADAptation's diffusion are: a form for a CPU, one for a GPU."""

from __future__ import annotations

from pydantic import Field

from sonofed_common.contract.configuration import Model
from sonofed_simulations.scenarios.scenario import Scenario, read_scenario

THREADS = 1


class RedrawnSettings(Model):
    """Size of the images, how many, and how long the source's models are trained."""

    scenario: str = "breast_three_countries"
    image_size: int
    images: int = Field(ge=1, description="of a site at most")
    seeds: tuple[int, ...]
    epochs: int | None = Field(
        default=None, ge=1, description="of the source's classifier; default: the scenario's"
    )
    diffusion_epochs: int | None = Field(
        default=None, ge=1, description="of the source's diffusion; default: the scenario's"
    )

    def read_scenario(self) -> Scenario:
        """The scenario at this size, on one thread."""
        scenario = read_scenario(self.scenario)
        source = scenario.source
        training = {"epochs": self.epochs or source.training.epochs}
        diffusion = {"epochs": self.diffusion_epochs or source.diffusion.epochs}
        changed = source.model_copy(
            update={
                "threads": THREADS,
                "image_size": self.image_size,
                "training": source.training.model_copy(update=training),
                "diffusion": source.diffusion.model_copy(update=diffusion),
            }
        )
        return scenario.model_copy(update={"threads": THREADS, "source": changed})

    def words(self) -> str:
        """How the source's models were trained, for a page."""
        source = self.read_scenario().source
        return (
            f"trained once, the classifier for {source.training.epochs} epochs and the diffusion "
            f"for {source.diffusion.epochs}, at {self.image_size} px"
        )


QUICK = RedrawnSettings(image_size=64, images=60, seeds=(0, 1, 2))
FULL = RedrawnSettings(
    image_size=128, images=400, seeds=(0, 1, 2, 3, 4), epochs=100, diffusion_epochs=200
)
