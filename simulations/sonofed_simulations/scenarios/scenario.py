"""A scenario: one TOML file that names the source, the hospitals and the study."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from sonofed_common.contract.configuration import Model, read_toml, validate
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.segmentation import NEEDS_SEGMENTER, misfit
from sonofed_common.contract.study import PRESETS, Study, check_site_name
from sonofed_common.data.readers import READERS
from sonofed_server.source.settings import SourceSettings
from sonofed_simulations.phantoms.generator import Anatomy
from sonofed_simulations.phantoms.scanner import SCANNERS

SHARED = ("image_size", "classifiers")
"""What a study takes over from its source unless it says otherwise."""


class PhantomData(Model):
    """A simulated hospital's images."""

    scanner: str
    images: int = Field(ge=2)
    anatomy: Anatomy = Field(
        default="breast", description="breast: labels and one class of masks; abdomen: four organs"
    )
    malignant_fraction: float = Field(default=0.4, gt=0, lt=1, description="breast only")

    @field_validator("scanner")
    @classmethod
    def _known(cls, scanner: str) -> str:
        if scanner not in SCANNERS:
            raise ValueError(f"'{scanner}' is not known; choose from {', '.join(SCANNERS)}")
        return scanner


class Hospital(Model):
    """One simulated site: a real data set, or phantoms."""

    kind: str | None = Field(
        default=None, description="reader: busi, busbra, breast, usgra_seg or table"
    )
    path: Path = Field(default=Path(), description="relative to the data folder")
    devices: tuple[str, ...] = ()
    phantoms: PhantomData | None = None
    test_fraction: float = Field(default=0.1, gt=0, lt=1)

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str | None) -> str | None:
        if kind is not None and kind not in READERS:
            raise ValueError(f"'{kind}' is not known; choose from {', '.join(READERS)}")
        return kind

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.kind is None) == (self.phantoms is None):
            raise ValueError("give either kind (a real data set) or phantoms")
        return self


class Scenario(Model):
    """Which source, which hospitals, which study.

    Notes
    -----
    ``source`` is a source file without its name and data where ``source_phantoms`` is given;
    ``study`` is a study file without its cohort's sites, which are the hospitals; image size and
    classifiers are the source's unless it or its preset says otherwise.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    title: str
    notes: tuple[str, ...] = ()
    threads: int | None = Field(default=None, ge=1, description="CPU threads of each site")
    source: SourceSettings
    source_phantoms: PhantomData | None = None
    hospitals: dict[str, Hospital] = Field(min_length=1)
    study: Study

    @model_validator(mode="before")
    @classmethod
    def _assemble(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("study"), dict):
            return values
        sections = {name: values.get(name, {}) for name in ("source", "hospitals")}
        sections["study.cohort"] = values["study"].get("cohort", {})
        for name, section in sections.items():
            if not isinstance(section, dict):
                raise ValueError(f"'{name}' must be a section")
        values = {
            **values,
            "study": dict(values["study"]),
            "source": dict(values.get("source", {})),
        }
        name, hospitals = values.get("name"), values.get("hospitals", {})
        cohort = {"sites": list(hospitals), **values["study"].get("cohort", {})}
        preset = PRESETS.get(str(values["study"].get("preset")), {})
        shared = {k: values["source"][k] for k in SHARED if k in values["source"].keys() - preset}
        values["study"] = {"name": name, **shared, **values["study"], "cohort": cohort}
        if "source_phantoms" in values:
            values["source"].setdefault("data", {"kind": "table", "path": "source"})
        values["source"] = {"name": name, **values["source"]}
        return values

    @field_validator("hospitals")
    @classmethod
    def _plain(cls, hospitals: dict[str, Hospital]) -> dict[str, Hospital]:
        for name in hospitals:
            check_site_name(name)
        return hospitals

    @model_validator(mode="after")
    def _source_serves(self) -> Self:
        untrained = sorted(set(self.study.classifiers) - set(self.source.classifiers))
        if untrained:
            raise ValueError(f"the study uses classifier '{untrained[0]}'; name it in [source] too")
        if "reconstruct" in self.study.phases and self.source.diffusion.kind == "none":
            raise ValueError("phase 'reconstruct' needs a diffusion model; the source trains none")
        replays = self.study.finetuning.replay and "synthesise" not in self.study.phases
        if replays and self.source.synthetic is None:
            raise ValueError(
                "finetuning.replay needs synthetic source images; give [source] a section "
                "'synthetic', or set it to 0"
            )
        wanting = [phase for phase in self.study.phases if phase in NEEDS_SEGMENTER]
        if wanting and self.source.segmentation is None:
            raise ValueError(
                f"phase '{wanting[0]}' needs a segmenter; give [source] a section 'segmentation'"
            )
        trained = self.source.segmentation
        if trained is not None:
            reason = misfit(self.study, trained.encoder, self.source.image_size, trained.flips)
            if reason is not None:
                raise ValueError(reason)
        return self

    @model_validator(mode="after")
    def _phantoms_serve(self) -> Self:
        hospitals = [h.phantoms for h in self.hospitals.values() if h.phantoms is not None]
        phantoms = [p for p in (self.source_phantoms, *hospitals) if p is not None]
        if self.source.classifiers and any(p.anatomy == "abdomen" for p in phantoms):
            raise ValueError(
                "phantoms of the abdomen bear no class labels; set classifiers = [] in [source]"
            )
        return self

    @property
    def needs_data(self) -> bool:
        """Whether real data sets are needed."""
        real = any(h.kind is not None for h in self.hospitals.values())
        return real or self.source_phantoms is None


def built_in() -> dict[str, Path]:
    """Return the scenarios that come with the package, by name."""
    folder = Path(str(files("sonofed_simulations.scenarios")))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_scenario(name_or_path: str) -> Scenario:
    """Read a built-in scenario by name, or a scenario file by path.

    Raises
    ------
    ConfigurationError
        No such scenario, unknown key, or a value out of range.
    """
    path = built_in().get(name_or_path, Path(name_or_path))
    if not path.is_file():
        known = ", ".join(built_in())
        raise ConfigurationError(
            f"there is no scenario '{name_or_path}'; give a file or one of: {known}"
        )
    return validate(Scenario, read_toml(path), path.name)
