"""The segmenters that a study works with: those of the source, of supervise, of pseudo_label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from safetensors.torch import load

from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.configuration import validate
from sonofed_common.contract.errors import BundleError
from sonofed_common.contract.records import Array
from sonofed_common.contract.segmentation import SegmentationFacts
from sonofed_common.contract.study import Study
from sonofed_common.contract.study_segmentation import PLAIN_MEAN, Infusion
from sonofed_common.models.segmenter import Segmenter, build_segmenter
from sonofed_common.runtime import device
from sonofed_common.security import load_signing_key, public_hex
from sonofed_server.phases.ship import install_everywhere
from sonofed_server.study.run import StudyRun
from sonofed_server.study.workspace import StudyState

Origin = Literal["branches", "adapted"]
"""Before and after pseudo-labelling."""


@dataclass(frozen=True)
class Branches:
    """Segmenters of one bundle.

    Attributes
    ----------
    bundle : Bundle
        Holds ``segmenters/<name>.safetensors``.
    names : tuple of str
        ``"source"`` first.
    """

    bundle: Bundle
    names: tuple[str, ...]

    @property
    def facts(self) -> SegmentationFacts:
        """What the bundle says of its segmenters."""
        return validate(
            SegmentationFacts, self.bundle.manifest.facts["segmentation"], "the bundle's facts"
        )

    def weights(self, name: str) -> bytes:
        """Weights of a branch, a safetensors file."""
        return self.bundle.read(f"segmenters/{name}.safetensors")

    def model(self, name: str) -> Segmenter:
        """Return a fresh copy of a branch, in evaluation mode."""
        facts = self.facts
        size = int(self.bundle.manifest.facts["image_size"])
        model = build_segmenter(facts.encoder, facts.classes, size, facts.heads, pretrained=False)
        model.load_state_dict(load(self.weights(name)))
        return model.to(device()).eval()


def branches(run: StudyRun) -> Branches:
    """Branches before pseudo-labelling; without supervise the source's alone.

    Raises
    ------
    BundleError
        The bundle that supervise signed is not what the study knows.
    """
    return _opened(run, "branches") or Branches(run.bundle, ("source",))


def adapted(run: StudyRun) -> Branches | None:
    """Branches after pseudo-labelling, if the study had it."""
    return _opened(run, "adapted")


def joined(study: Study, state: StudyState, origin: Origin) -> tuple[Infusion, dict[str, Array]]:
    """How a study joins branches, and the arrays of the infusion head.

    Tested and published alike. What no phase calibrated or trained is joined by its plain mean.
    """
    arrays = state.group(f"ensemble/{origin}")
    return (study.infusion if arrays else PLAIN_MEAN), arrays


def install_branches(
    run: StudyRun, origin: Origin, weights: Mapping[str, bytes], facts: dict[str, Any]
) -> None:
    """Sign branches as a bundle, install it at every site and remember it.

    Parameters
    ----------
    run : StudyRun
        Its state gets the fact ``origin``: the bundle's id and the names.
    origin : {"branches", "adapted"}
        Which bundle of the workspace.
    weights : mapping of str to bytes
        A safetensors file by name, ``"source"`` first.
    facts : dict
        Of the bundle; joined with those that all bundles of segmenters have.
    """
    source = run.bundle.manifest
    folder = run.workspace.branches if origin == "branches" else run.workspace.adapted
    writer = run.bundle_writer(folder, "source" if origin == "branches" else "final")
    for name, data in weights.items():
        writer.add(f"segmenters/{name}.safetensors", data)
    kept = {name: source.facts[name] for name in ("image_size", "segmentation")}
    writer.facts = {**kept, "source_bundle": run.bundle.id, "study": run.study.name, **facts}
    bundle = writer.sign(load_signing_key(run.workspace.key))
    run.state.facts[origin] = {"bundle": bundle.id, "names": list(weights)}
    install_everywhere(run, bundle, f"install {origin}")


def _opened(run: StudyRun, origin: Origin) -> Branches | None:
    known = run.state.facts.get(origin)
    if known is None:
        return None
    folder = run.workspace.branches if origin == "branches" else run.workspace.adapted
    key = public_hex(load_signing_key(run.workspace.key))
    bundle = Bundle.open(folder, key, check_blobs=False)
    if bundle.id != known["bundle"]:
        raise BundleError(
            f"the bundle in {folder} is not the one that this study signed; delete the study's "
            "checkpoint to start it anew"
        )
    return Branches(bundle, tuple(known["names"]))
