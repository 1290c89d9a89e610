"""Settings of source training: one TOML file that says which labelled data trains which models."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from sonofed_common.contract.configuration import Model, read_toml, validate, with_preset
from sonofed_common.contract.study_synthesis import PAPER_WGAN, WganTraining


class SourceData(Model):
    """The labelled data set."""

    kind: str = Field(description="reader: busi, busbra, breast, usgra_seg or table")
    path: Path = Field(default=Path(), description="relative to the data folder")
    devices: tuple[str, ...] = Field(default=(), description="scanner name prefixes; empty for all")
    test_fraction: float = Field(default=0.15, gt=0, lt=1)

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        from sonofed_common.data.readers import READERS

        return _one_of(kind, tuple(READERS))


class ClassifierTraining(Model):
    """Supervised training of each classifier."""

    epochs: int = Field(default=12, ge=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    batch_size: int = Field(default=16, ge=2)


class SegmenterTraining(Model):
    """Supervised training of the segmenter."""

    encoder: str = "efficientnet_lite0"
    classes: int = Field(default=2, ge=2, le=64, description="background included")
    heads: tuple[Literal["unet", "aspp"], Literal["unet", "aspp"]] = ("unet", "aspp")
    epochs: int = Field(default=15, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    batch_size: int = Field(default=8, ge=2)
    flips: bool = Field(
        default=True,
        description="mirrored images, here and at the sites; false where classes have a side",
    )
    style_augmentation: bool = Field(
        default=False, description="images of many appearances, beside flips and rotations"
    )

    @field_validator("encoder")
    @classmethod
    def _known(cls, name: str) -> str:
        from sonofed_common.models.encoders import ENCODERS

        return _one_of(name, ENCODERS)


class DiffusionTraining(Model):
    """Training of the diffusion stack, or none."""

    kind: Literal["tiny", "sd15", "none"] = "tiny"
    epochs: int = Field(default=40, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    batch_size: int = Field(default=8, ge=1)
    sd15: Path | None = Field(default=None, description="Stable Diffusion 1.5 in diffusers' form")
    biomedclip: Path | None = Field(default=None, description="folder of BiomedCLIP's text tower")
    prompt: str = "Ultrasound of breast"

    @model_validator(mode="after")
    def _folders(self) -> Self:
        if self.kind == "sd15" and (self.sd15 is None or self.biomedclip is None):
            raise ValueError("kind 'sd15' needs the folders 'sd15' and 'biomedclip'")
        return self


class SyntheticImages(Model):
    """Labelled synthetic images, which sites may replay while they fine-tune the classifiers."""

    generator: Literal["diffusion", "wgan"] = "diffusion"
    per_class: int = Field(ge=1, description="images of each class; refused ones are drawn again")
    sampler: Literal["ddim", "dpmsolver++", "unipc"] = "dpmsolver++"
    steps: int = Field(default=20, ge=1, le=1000)
    guidance: float = Field(
        default=1.0, ge=0, le=100, description="classifier-free guidance; 1 switches it off"
    )


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "paper": {
        "diffusion": {"kind": "sd15", "epochs": 200, "learning_rate": 1e-4},
        "wgan": PAPER_WGAN,
    },
}
"""Settings that a preset changes; what the source file says itself wins."""


class SourceSettings(Model):
    """Everything that source training depends on, but the data and the signing key."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    seed: int = Field(default=0, ge=0)
    preset: Literal["default", "paper"] = "default"
    image_size: int = Field(default=128, ge=16, le=1024, multiple_of=8)
    classes: Literal[2] = Field(
        default=2, description="of the classifiers: benign and malignant; normals are dropped"
    )
    classifiers: tuple[str, ...] = ("efficientnet_lite0",)
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads; float sums depend on it"
    )
    data: SourceData
    training: ClassifierTraining = ClassifierTraining()
    segmentation: SegmenterTraining | None = Field(
        default=None, description="default: no segmenter is trained"
    )
    diffusion: DiffusionTraining = DiffusionTraining()
    wgan: WganTraining = WganTraining()
    synthetic: SyntheticImages | None = Field(
        default=None, description="default: no synthetic images are drawn"
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return with_preset(values, PRESETS)

    @field_validator("classifiers")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        from sonofed_common.models.classifiers import CLASSIFIERS

        if len(set(names)) != len(names):
            raise ValueError("name each classifier once")
        return tuple(_one_of(name, CLASSIFIERS) for name in names)

    @model_validator(mode="after")
    def _outlined(self) -> Self:
        seeing = [name for name in self.classifiers if name.endswith("_two_views")]
        if seeing and self.segmentation is None:
            raise ValueError(
                f"classifier '{seeing[0]}' sees lesions, which a segmenter must outline at the "
                "sites; add the section 'segmentation'"
            )
        return self

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.classifiers and self.segmentation is None:
            raise ValueError("name a classifier in 'classifiers', or give a section 'segmentation'")
        return self

    @model_validator(mode="after")
    def _synthetic_is_possible(self) -> Self:
        if self.synthetic is None:
            return self
        if self.synthetic.generator == "diffusion" and self.diffusion.kind == "none":
            raise ValueError(
                "section 'synthetic' needs a diffusion model; set diffusion.kind, or "
                'generator = "wgan"'
            )
        if not self.classifiers:
            raise ValueError(
                "section 'synthetic' needs class labels; name a classifier in 'classifiers'"
            )
        if self.synthetic.generator == "wgan":
            from sonofed_common.models.wgan import SIZES

            if self.image_size not in SIZES:
                raise ValueError(
                    f"a WGAN draws images of {', '.join(map(str, SIZES))} px; set image_size"
                )
        return self

    def digest(self) -> str:
        """SHA-256 of the validated settings."""
        values = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(values.encode()).hexdigest()


def _one_of(value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise ValueError(f"'{value}' is not known; choose from {', '.join(known)}")
    return value


def read_source(path: Path) -> SourceSettings:
    """Read and validate a source file.

    Parameters
    ----------
    path : Path
        TOML file.

    Raises
    ------
    ConfigurationError
        Unreadable file, unknown key (the nearest known key is named), or a value out of range.
    """
    return validate(SourceSettings, read_toml(path), path.name)
