"""The model card: what the final bundle is, and how it did at each site."""

from __future__ import annotations

from collections.abc import Mapping

from sonofed_common.contract.results import SEGMENTATION_STAGES, SiteResults
from sonofed_common.models.classifiers import sees_lesions
from sonofed_server.phases.branches import adapted, branches
from sonofed_server.study.report import site_results
from sonofed_server.study.run import StudyRun

STAGE_NAMES = {
    "source": "source",
    "bn_adapted": "normalisation statistics",
    "target_informed": "target-informed branch",
    "mean": "mean of the branches",
    "infusion": "infusion of the branches",
    "adapted": "source, pseudo-labelled",
    "ensemble": "all branches, pseudo-labelled",
}

LESION = "the lesion cut out of the image at twice the size by the source bundle's segmenter"


def model_card(run: StudyRun) -> str:
    """Write the card, Markdown, with a table for each task that the study has."""
    missing = run.exchange.missing
    sites = {
        name: site
        for name, site in site_results(run).items()
        if site.missing_reason is None and name not in missing
    }
    done = run.state.done
    lines = [f"# {run.study.name}", ""]
    if classifies := "classifier" in done:
        lines.append(
            "Binary classification of breast lesions on B-mode ultrasound (benign, malignant), "
            f"adapted at {len(sites)} sites by federated fine-tuning on {_labels(sites)} labels."
        )
    if segments := bool({"supervise", "pseudo_label", "ensemble"} & set(done)):
        lines.append(_segmentation(run, len(sites)))
    rule: str = run.study.finetuning.batch_norm
    if rule == "local":
        rule = "of layers that stay at each site, in place of the source's in this bundle"
    statistics = [f"{rule} (classifiers)"] * classifies
    statistics += [f"{run.study.segmenter_batch_norm} (segmenters)"] * segments
    lines += [
        "Not a medical device; for research. Validate it on your own patients before any use.",
        "",
        f"- input: one grey image, {run.study.image_size} x {run.study.image_size}, in [0, 1], "
        "longer side resized, padded with 0",
        *(
            f"- {name} sees a second one, {LESION}"
            for name in run.study.classifiers
            if classifies and sees_lesions(name)
        ),
        f"- normalisation statistics: {', '.join(statistics) or 'global'}",
        f"- source bundle: {run.bundle.id}",
        f"- study file: {run.study.digest()}",
        *_synthetic(sites),
    ]
    if classifies:
        lines += ["", *_classification_table(sites)]
    if segments:
        lines += ["", *_segmentation_table(sites)]
    return "\n".join(lines) + "\n"


def _synthetic(sites: Mapping[str, SiteResults]) -> list[str]:
    shared = {name: site.synthetic for name, site in sites.items() if site.synthetic is not None}
    told = ", ".join(f"{count} of {name}" for name, count in shared.items())
    return [f"- replayed synthetic images, by sites' own GANs: {told}"] if shared else []


def _segmentation(run: StudyRun, sites: int) -> str:
    after = adapted(run)
    chosen = branches(run) if after is None else after
    rule = run.study.infusion.rule if "ensemble" in run.state.done else "mean"
    how = f"joined by the rule '{rule}'" if len(chosen.names) > 1 else "used alone"
    strategies = " and then ".join(f"'{wanted.strategy}'" for _, wanted in run.study.adaptations)
    adaptation = "" if after is None else f" after {strategies}"
    return (
        f"Segmentation of B-mode ultrasound into {chosen.facts.classes} classes, background "
        f"included, adapted at {sites} sites without any label of theirs: branches "
        f"{', '.join(chosen.names)}{adaptation}, {how}."
    )


def _classification_table(sites: Mapping[str, SiteResults]) -> list[str]:
    lines = [
        "| site | classifier | test images | AUROC, source | AUROC, adapted |",
        "|---|---|---|---|---|",
    ]
    for site, results in sites.items():
        for name, classifier in results.classifiers.items():
            before = _interval(classifier.source, "auroc")
            after = _interval(classifier.adapted or {}, "auroc")
            lines.append(f"| {site} | {name} | {results.test_images} | {before} | {after} |")
    return lines


def _segmentation_table(sites: Mapping[str, SiteResults]) -> list[str]:
    lines = ["| site | test masks | stage | Dice | HD95, pixels |", "|---|---|---|---|---|"]
    for site, results in sites.items():
        for stage in SEGMENTATION_STAGES:
            if (metrics := results.segmentation.get(stage)) is not None:
                dice, distance = _interval(metrics, "dice"), _interval(metrics, "hd95", 1)
                cells = [site, str(results.test_masks), STAGE_NAMES[stage], dice, distance]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def _labels(sites: Mapping[str, SiteResults]) -> int:
    return sum(site.labelled for site in sites.values())


def _interval(metrics: Mapping[str, float | None], name: str, digits: int = 3) -> str:
    values = [metrics.get(key) for key in (name, f"{name}_low", f"{name}_high")]
    if None in values:
        return "-"
    value, low, high = (f"{v or 0.0:.{digits}f}" for v in values)
    return f"{value} ({low} to {high})"
