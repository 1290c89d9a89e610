"""Publish: sign the adapted weights as a bundle with a model card, and install it at every site."""

from __future__ import annotations

from safetensors.numpy import save

from sonofed_common.contract.bundle import BundleWriter
from sonofed_common.contract.records import to_bytes
from sonofed_common.contract.segmentation import Normalisation
from sonofed_common.models.ensemble import INFUSION, infusion_records
from sonofed_common.models.infusion import InfusionHead
from sonofed_common.runtime import write_atomically
from sonofed_common.security import load_signing_key
from sonofed_server.phases.branches import Origin, adapted, branches, joined
from sonofed_server.phases.classifier import source_weights
from sonofed_server.phases.model_card import model_card
from sonofed_server.phases.ship import install_everywhere
from sonofed_server.study.run import StudyRun

SEGMENTING = {"supervise", "pseudo_label", "ensemble"}


def publish(run: StudyRun) -> None:
    """Write the final bundle and ship it."""
    source = run.bundle.manifest
    writer = run.bundle_writer(run.workspace.final_bundle, "final")
    last = len(run.study.selection.budgets) - 1
    for name in run.study.classifiers:
        weights = run.state.group(f"classifier/{name}/{last}")
        if weights:
            # Of normalisation layers that stay at the sites there is no mean to publish.
            whole = {**source_weights(run, name), **weights}
            writer.add(f"classifiers/{name}.safetensors", save(whole))
    card = model_card(run).encode()
    writer.add("MODEL_CARD.md", card)
    # The source's metrics and thresholds are not those of the adapted weights.
    writer.facts = {
        "source": dict(source.facts),
        "source_bundle": run.bundle.id,
        "study": run.study.name,
        "normalisation": Normalisation(
            segmenters=run.study.segmenter_batch_norm,
            classifiers=run.study.finetuning.batch_norm,
        ).model_dump(),
    }
    if SEGMENTING & set(run.state.done):
        _add_segmenters(run, writer)
    bundle = writer.sign(load_signing_key(run.workspace.key))
    write_atomically(run.workspace.model_card, card)
    run.state.facts["final_bundle"] = bundle.id
    install_everywhere(run, bundle, "publish")


def _add_segmenters(run: StudyRun, writer: BundleWriter) -> None:
    after = adapted(run)
    chosen = branches(run) if after is None else after
    origin: Origin = "branches" if after is None else "adapted"
    for name in chosen.names:
        writer.add(f"segmenters/{name}.safetensors", chosen.weights(name))
    infusion, arrays = joined(run.study, run.state, origin)
    head = InfusionHead(len(chosen.names), infusion, chosen.facts.classes)
    if arrays:
        head.load(arrays)
    writer.add(INFUSION, to_bytes(infusion_records(chosen.names, head)))
    writer.facts["image_size"] = run.study.image_size
    writer.facts["segmentation"] = chosen.facts.model_dump(mode="json")
