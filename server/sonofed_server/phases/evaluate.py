"""Evaluate: the segmenters of every stage on the sites' own test masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from sonofed_common.contract.actions import EvaluateSegmenter, request
from sonofed_common.contract.records import Array, Records
from sonofed_common.contract.results import SegmentationStage
from sonofed_common.contract.study_segmentation import PLAIN_MEAN, Infusion, SiteNorm
from sonofed_server.phases.branches import Branches, adapted, branches, joined
from sonofed_server.study.run import StudyRun


@dataclass(frozen=True)
class _Test:
    """What is asked at one stage; ``branches`` by site, for one site may lack what others have."""

    stage: SegmentationStage
    bundle: str
    branches: Mapping[str, tuple[str, ...]]
    infusion: Infusion
    arrays: dict[str, Array]
    batch_norm: SiteNorm | Literal["global"]


def evaluate(run: StudyRun) -> None:
    """Test each stage that the study has; a resumed study goes on with the next one.

    The last one is what `publish` publishes.
    """
    tested = run.state.facts.setdefault("tested_segmenters", [])
    for test in _tests(run):
        if test.stage in tested:
            continue
        _evaluate(run, test)
        tested.append(test.stage)
        run.save()


def _evaluate(run: StudyRun, test: _Test) -> None:
    def message(site: str) -> Records:
        parameters = EvaluateSegmenter(
            **{**run.pooled, "bundle": test.bundle},
            branches=test.branches[site],
            infusion=test.infusion,
            batch_norm=test.batch_norm,
        )
        return request(parameters, **test.arrays)

    sites = [site for site in run.exchange.sites() if site in test.branches]
    replies = run.exchange.ask("evaluate.segmenter", message, sites)
    for done, (site, reply) in enumerate(replies, start=1):
        facts = run.site_facts(site)
        facts["test_masks"] = int(reply.config["examples"])
        # A site without masks, or with few, takes part and is not tested.
        if facts["test_masks"]:
            facts.setdefault("segmentation", {})[test.stage] = reply.metrics
        run.events.progress(f"test, {test.stage}", done, len(sites), site=site)


def _tests(run: StudyRun) -> Iterator[_Test]:
    norm = run.study.segmenter_batch_norm
    before, after = branches(run), adapted(run)

    def single(
        stage: SegmentationStage,
        chosen: Branches,
        names: dict[str, str],
        batch_norm: SiteNorm | Literal["global"] = norm,
    ) -> _Test:
        alone: dict[str, tuple[str, ...]] = {site: (name,) for site, name in names.items()}
        return _Test(stage, chosen.bundle.id, alone, PLAIN_MEAN, {}, batch_norm)

    def joint(
        stage: SegmentationStage, chosen: Branches, how: Infusion, arrays: dict[str, Array]
    ) -> _Test:
        names = dict.fromkeys(run.study.cohort.sites, chosen.names)
        return _Test(stage, chosen.bundle.id, names, how, arrays, norm)

    sources = dict.fromkeys(run.study.cohort.sites, "source")
    yield single("source", before, sources, "global")
    yield single("bn_adapted", before, sources, "site")
    informed = _informed(run, before)
    if informed:
        yield single("target_informed", before, informed)
        yield joint("mean", before, PLAIN_MEAN, {})
    infused = "ensemble" in run.state.done
    if infused:
        yield joint("infusion", before, *joined(run.study, run.state, "branches"))
    if after is not None:
        yield single("adapted", after, sources)
    if after is not None and (informed or infused):
        yield joint("ensemble", after, *joined(run.study, run.state, "adapted"))


def _informed(run: StudyRun, before: Branches) -> dict[str, str]:
    """Target-informed branch of each site that has one."""
    sites = run.study.cohort.sites
    if "target" in before.names:
        return dict.fromkeys(sites, "target")
    return {site: f"target-{site}" for site in sites if f"target-{site}" in before.names}
