"""Publish: sign the adapted weights as a bundle with a model card, and install it at every site."""

from __future__ import annotations

from safetensors.numpy import save

from sonofed_common.contract.bundle import BundleWriter
from sonofed_common.contract.results import SiteResults
from sonofed_common.security import load_or_create_signing_key
from sonofed_server.phases.ship import install_everywhere
from sonofed_server.study.report import site_results
from sonofed_server.study.run import StudyRun


def publish(run: StudyRun) -> None:
    """Write the final bundle and ship it."""
    source = run.bundle.manifest
    writer = BundleWriter(
        run.workspace.final_bundle,
        name=run.study.name,
        kind="final",
        provenance=source.provenance.model_copy(update={"settings": run.study.digest()}),
    )
    last = len(run.study.selection.budgets) - 1
    for name in run.study.classifiers:
        weights = run.state.group(f"classifier/{name}/{last}")
        if weights:
            writer.add(f"classifiers/{name}.safetensors", save(dict(weights)))
    writer.add("MODEL_CARD.md", _model_card(run).encode())
    # The source's metrics and thresholds are not those of the adapted weights.
    writer.facts = {
        "source": dict(source.facts),
        "source_bundle": run.bundle.id,
        "study": run.study.name,
    }
    bundle = writer.sign(load_or_create_signing_key(run.workspace.key))
    run.state.facts["final_bundle"] = bundle.id
    install_everywhere(run, bundle, "publish")


def _model_card(run: StudyRun) -> str:
    missing = run.exchange.missing
    sites = {
        name: site
        for name, site in site_results(run).items()
        if site.missing_reason is None and name not in missing
    }
    lines = [
        f"# {run.study.name}",
        "",
        "Binary classification of breast lesions on B-mode ultrasound (benign, malignant), "
        f"adapted at {len(sites)} sites by federated fine-tuning on {_labels(sites)} labels.",
        "Not a medical device; for research. Validate it on your own patients before any use.",
        "",
        f"- input: one grey image, {run.study.image_size} x {run.study.image_size}, in [0, 1], "
        "longer side resized, padded with 0",
        f"- normalisation statistics: {run.study.finetuning.batch_norm}",
        f"- source bundle: {run.bundle.id}",
        f"- study file: {run.study.digest()}",
        "",
        "| site | classifier | test images | AUROC, source | AUROC, adapted |",
        "|---|---|---|---|---|",
    ]
    for site, results in sites.items():
        for name, classifier in results.classifiers.items():
            before = _interval(classifier.source)
            after = _interval(classifier.adapted or {})
            lines.append(f"| {site} | {name} | {results.test_images} | {before} | {after} |")
    return "\n".join(lines) + "\n"


def _labels(sites: dict[str, SiteResults]) -> int:
    return sum(site.selected for site in sites.values())


def _interval(metrics: dict[str, float | None]) -> str:
    values = [metrics.get(name) for name in ("auroc", "auroc_low", "auroc_high")]
    if None in values:
        return "-"
    value, low, high = (v or 0.0 for v in values)
    return f"{value:.3f} ({low:.3f} to {high:.3f})"
