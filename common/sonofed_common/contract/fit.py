"""Whether a source's bundle holds what a study works with: known before the study starts."""

from __future__ import annotations

from sonofed_common.contract.configuration import validate
from sonofed_common.contract.manifest import SYNTHETIC_IMAGES, Manifest
from sonofed_common.contract.segmentation import NEEDS_SEGMENTER, SegmentationFacts, misfit
from sonofed_common.contract.study import Study


def bundle_misfit(study: Study, bundle: Manifest) -> str | None:
    """Say why a source's bundle cannot serve a study, or return None where it can.

    Parameters
    ----------
    study : Study
        What is asked.
    bundle : Manifest
        Of the bundle.

    Raises
    ------
    ConfigurationError
        The bundle's facts do not validate.
    """
    held = f"bundle {bundle.name} holds no"
    if study.classifying:
        for name in study.classifiers:
            if f"classifiers/{name}.safetensors" not in bundle.files:
                return (
                    f"{held} classifier '{name}', which the study works with; name it in the "
                    "source's 'classifiers' and train the source again"
                )
    if "reconstruct" in study.phases and not any(f.startswith("diffusion/") for f in bundle.files):
        return (
            f"{held} diffusion stack, which phase 'reconstruct' draws with; train the source with "
            "one, or leave the phase out"
        )
    replays = "classifier" in study.phases and study.finetuning.replay
    if replays and "synthesise" not in study.phases and SYNTHETIC_IMAGES not in bundle.files:
        return (
            f"{held} synthetic images, which the study replays; train the source with a section "
            "'synthetic', or set finetuning.replay to 0"
        )
    return _segmenter_misfit(study, bundle)


def _segmenter_misfit(study: Study, bundle: Manifest) -> str | None:
    facts = bundle.facts
    if "segmentation" in facts:
        known = validate(SegmentationFacts, facts["segmentation"], "the bundle's facts")
        return misfit(study, known.encoder, int(facts["image_size"]), known.flips)
    wanting = [phase for phase in study.phases if phase in NEEDS_SEGMENTER]
    if wanting:
        return (
            f"bundle {bundle.name} holds no segmenter, which phase '{wanting[0]}' works on; train "
            "the source with a section 'segmentation'"
        )
    return None
