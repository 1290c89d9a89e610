"""Segmentation studies from data to published bundle, as their user meets them."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from flwr.app import Message
from PIL import Image
from safetensors.numpy import load as load_weights
from safetensors.torch import save

from sonofed_client.app import SITES_VARIABLE
from sonofed_client.enclave.handlers.ensemble import predict_site
from sonofed_client.enclave.questions import questions
from sonofed_client.enclave.scope import check_scope
from sonofed_client.enclave.site import Site
from sonofed_client.enclave.store import Store, open_store
from sonofed_client.enclave.wall import open_ledger
from sonofed_client.settings import read_site
from sonofed_common.contract.actions import EvaluateSegmenter, TrainSegmenter
from sonofed_common.contract.bundle import Bundle, BundleWriter
from sonofed_common.contract.configuration import validate
from sonofed_common.contract.errors import (
    CollapseError,
    ConfigurationError,
    OrderError,
    StudyDeniedError,
)
from sonofed_common.contract.manifest import DataProvenance, Provenance
from sonofed_common.contract.recorddict import from_recorddict, to_recorddict
from sonofed_common.contract.records import Records, from_bytes, to_bytes
from sonofed_common.contract.results import (
    SEGMENTATION_METRICS,
    SEGMENTATION_STAGES,
    read_results,
)
from sonofed_common.contract.study import SEGMENTATION, Study, read_study
from sonofed_common.models.ensemble import INFUSION, load_ensemble
from sonofed_common.models.segmenter import build_segmenter
from sonofed_common.runtime import SILENT, Events
from sonofed_common.security import load_or_create_signing_key, public_hex, sha256_file
from sonofed_common.segmentation_metrics import score_images, segmentation_metrics
from sonofed_server.phases.supervise import train_branch
from sonofed_server.source.segmentation_data import load_segmentation
from sonofed_server.study.engine import run_study
from sonofed_server.study.exchange import Exchange
from sonofed_server.study.run import StudyRun
from sonofed_server.study.workspace import StudyState, Workspace, identity_of
from sonofed_simulations.enclaves import enclave_processes
from sonofed_simulations.engines.flower import run_flower
from sonofed_simulations.engines.inline import InlineGrid, run_inline
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.report.page import build_report
from sonofed_simulations.scenarios.scenario import Scenario, built_in, read_scenario
from sonofed_simulations.segmentation_views import segmentation_views
from sonofed_simulations.simulation import simulate

TINY = Path(__file__).with_name("tiny_segmentation.toml")
SIZE, IMAGES = 32, 20
HOSPITALS = ("riverside", "lakeside")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A laboratory whose source segmenter is trained, once for all tests."""
    laboratory = Laboratory(
        read_scenario(str(TINY)), tmp_path_factory.mktemp("segmentation"), None, SILENT
    )
    laboratory.prepare_source()
    return laboratory


@pytest.fixture(scope="module")
def simulated(lab):
    """The tiny study, from data to report in this process."""
    return simulate(lab.scenario, lab.root, None, "inline", 0, Events())


@pytest.fixture
def workspace(lab, simulated):
    return Workspace(lab.root / "study")


@pytest.fixture
def sites(lab, simulated):
    return [lab.root / "sites" / name / "site-0.toml" for name in HOSPITALS]


def lay_out(lab, root, **changes):
    """A fresh workspace and fresh sites for the tiny study, or one like it."""
    values = lab.scenario.study.model_dump(mode="json")
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    sites = lab.prepare_sites(0, root / "sites")
    return lab.workspace(Study.model_validate(values), lab.root / "source", root / "study"), sites


def checkpoint(workspace):
    return from_bytes(workspace.checkpoint.read_bytes())


def events(workspace):
    return [json.loads(line) for line in workspace.events.read_text().splitlines()]


def published(workspace, lab):
    return Bundle.open(workspace.final_bundle, public_hex(load_or_create_signing_key(lab.key)))


def check_metrics(metrics, size=SIZE):
    assert set(metrics) == {
        f"{m}{end}" for m in SEGMENTATION_METRICS for end in ("", "_low", "_high")
    }
    for name in SEGMENTATION_METRICS:
        highest = size * math.sqrt(2) if name == "hd95" else 1
        bounds = [0, metrics[f"{name}_low"], metrics[name], metrics[f"{name}_high"], highest]
        assert np.all(np.diff(bounds) > -1e-6), bounds


def test_every_site_has_every_stage_with_numbers_in_range(simulated, lab, workspace):
    assert read_results(lab.root / "results.json") == simulated
    assert not workspace.failure.exists() and simulated.missing_sites == ()
    assert [phase.name for phase in simulated.phases] == list(SEGMENTATION)
    assert tuple(simulated.sites) == HOSPITALS
    for site in simulated.sites.values():
        assert site.images + site.test_masks == IMAGES and site.selected == 0
        assert tuple(site.segmentation) == SEGMENTATION_STAGES
        for metrics in site.segmentation.values():
            check_metrics(metrics)
        # A segmenter that has learned nothing would make all other tests empty.
        assert site.segmentation["ensemble"]["dice"] > 0.3


def test_the_report_shows_every_site_and_stage(simulated, lab):
    page = (lab.root / "report.html").read_text(encoding="utf-8")
    for name, site in simulated.sites.items():
        cases = [f"{name}, {which} image: " for which in ("worst", "median", "best")]
        for what in ("expert", "result", "confidence", "trusted"):
            assert all(f'alt="{start}{what}' in page for start in cases)
        for metrics in site.segmentation.values():
            shown = f"{metrics['dice']:.2f}".removeprefix("0")
            assert f"{shown} <small>" in page
    assert "data:image/" in page and "src=http" not in page


def test_the_model_card_tells_of_every_site_and_stage(simulated, lab, workspace):
    card = workspace.model_card.read_text(encoding="utf-8")
    assert published(workspace, lab).read("MODEL_CARD.md").decode() == card
    rows = [line.split("|") for line in card.splitlines() if line.startswith("| ")][1:]
    found = [(row[1].strip(), row[2].strip(), row[4].split()[0]) for row in rows]
    assert found == [
        (name, str(site.test_masks), f"{metrics['dice']:.3f}")
        for name, site in simulated.sites.items()
        for metrics in site.segmentation.values()
    ]


def test_the_published_ensemble_is_what_was_evaluated(simulated, lab, workspace, sites):
    bundle = published(workspace, lab)
    names = ("source", "target")
    assert bundle.manifest.kind == "final"
    segmenters = [f"segmenters/{name}.safetensors" for name in names]
    assert bundle.paths == ["MODEL_CARD.md", INFUSION, *segmenters]
    study = lab.scenario.study
    for path, expected in zip(sites, simulated.sites.values(), strict=True):
        ensemble, site = load_ensemble(bundle), Site(read_site(path))
        assert tuple(ensemble.branches) == names
        _, pool = site.images("pool", SIZE)
        _, tested = site.images("test", SIZE)
        index, masks = site.masks("test", SIZE)
        ensemble.adapt(pool)
        said = ensemble.predict(tested[index])
        count = len(index)
        assert said.probabilities.shape == (count, 2, SIZE, SIZE)
        assert torch.equal(said.mask, said.probabilities.argmax(1).byte())
        assert said.confidence.shape == (count, SIZE, SIZE)
        assert said.confidence.min() >= 0 and said.confidence.max() <= 1
        assert said.weights.shape == (2, count, SIZE, SIZE) and said.weights.min() >= 0
        torch.testing.assert_close(said.weights.sum(0), torch.ones(count, SIZE, SIZE))
        metrics = segmentation_metrics(score_images(said.probabilities, masks))
        for name, value in metrics.items():
            stage = expected.segmentation["ensemble"]
            assert value == pytest.approx(stage[name], abs=1e-6), name
        parameters = EvaluateSegmenter(
            study=study.name,
            seed=study.seed,
            bundle=bundle.id,
            image_size=SIZE,
            branches=names,
            infusion=study.infusion,
        )
        arrays = from_bytes(bundle.read(INFUSION)).arrays
        parts = list(predict_site(site, parameters, Records(arrays)))
        for name, axis in (("probabilities", 0), ("weights", 1)):
            whole = torch.cat([getattr(part, name) for part in parts], axis)
            torch.testing.assert_close(getattr(said, name), whole, rtol=0, atol=1e-6)


MASKED = ("enrol", "ship", "pseudo_label", "ensemble", "evaluate", "publish")


@pytest.mark.parametrize(
    ("phases", "infusion", "stage"),
    [
        (MASKED, {"mirrored": True}, "ensemble"),
        (("enrol", "ship", "ensemble", "evaluate", "publish"), {"mirrored": True}, "infusion"),
        (tuple(p for p in SEGMENTATION if p != "ensemble"), {}, "ensemble"),
        (("enrol", "ship", "pseudo_label", "evaluate", "publish"), {}, "adapted"),
    ],
)
def test_whatever_is_published_was_evaluated_last(lab, tmp_path, phases, infusion, stage):
    workspace, sites = lay_out(lab, tmp_path, phases=phases, infusion=infusion)
    results = run_inline(workspace, sites, Events())
    bundle = published(workspace, lab)
    study, source = read_study(workspace.study), Bundle.open(workspace.bundle)
    asked = [q.times or 0 for q in questions(study) if q.action == "evaluate.segmenter"]
    views = segmentation_views(workspace, study, source.id, sites)
    for path, expected, view in zip(sites, results.sites.values(), views, strict=True):
        assert list(expected.segmentation)[-1] == stage
        assert len(expected.segmentation) == sum(asked)
        ensemble, site = load_ensemble(bundle), Site(read_site(path))
        assert ensemble.head.settings.mirrored == bool(infusion)
        ensemble.adapt(site.images("pool", SIZE)[1])
        index, masks = site.masks("test", SIZE)
        said = ensemble.predict(site.images("test", SIZE)[1][index])
        metrics = segmentation_metrics(score_images(said.probabilities, masks))
        for name, value in metrics.items():
            assert value == pytest.approx(expected.segmentation[stage][name], abs=1e-6), name
        assert view.dice_ours.mean() == pytest.approx(metrics["dice"], abs=1e-6)


def private(sites):
    """Texts, keys and pixels of hospitals that nobody else may hold."""
    found = {}
    for path in sites:
        settings = read_site(path)
        site = Site(settings)
        found |= {str(folder).encode(): "path" for folder in (settings.data.path, settings.store)}
        for part in ("pool", "test"):
            rows, images = site.images(part, SIZE)
            for row in rows:
                found |= {text.encode(): "row" for text in (row.id, row.name, row.group)}
                found |= {int(row.id, 16).to_bytes(8, end): "id" for end in ("little", "big")}
            found |= dict.fromkeys(needles(images[:4]), "pixels")
    return found


def needles(images):
    """A textured row of each image, in the two forms in which pixels are kept."""
    exact = (images * 255).round().byte().numpy()
    kept = []
    for floats, whole in zip(images.numpy(), exact, strict=True):
        line = max(range(SIZE), key=lambda y: len(np.unique(whole[0, y])))
        if len(np.unique(whole[0, line])) >= SIZE // 2:
            kept += [whole[0, line].tobytes(), floats[0, line].tobytes()]
    assert len(kept) >= len(images)
    return kept


def textured(images):
    """Row (N, S) of most grey values of each image (N, 1, S, S): nothing has it by chance."""
    return torch.stack([max(image[0], key=lambda row: len(row.unique())) for image in images])


def needles_of_source(data):
    """What an image, a mask, a file or a name of the source would be in a blob, by its kind."""
    found = {}
    for part in (data.pool, data.test):
        for sample, image, mask in zip(part.samples, part.images, part.masks, strict=True):
            for path in (sample.image, *sample.masks):
                content = path.read_bytes()
                found[content[len(content) // 2 :][:48]] = "file"
                found[sha256_file(path).encode()] = "digest"
            found |= {text.encode(): "name" for text in (sample.name, sample.group)}
            exact = (image * 255).round()
            line = max(range(SIZE), key=lambda y: len(exact[0, y].unique()))
            for whole in (image, image.half(), image.double(), exact.byte(), exact):
                found[whole[0, line].numpy().tobytes()] = "pixels"
            middle = int(mask[0].any(dim=1).nonzero().median())
            for whole in (mask, mask.float(), mask.double(), mask.long()):
                found[whole[0, max(middle - 1, 0) : middle + 2].numpy().tobytes()] = "mask"
            found[np.packbits(mask.numpy()).tobytes()] = "mask"
    return found


def holds_a_row(array, rows):
    """Tell whether consecutive numbers of an array are a row of an image, scaled and shifted."""
    flat = torch.from_numpy(np.array(array, dtype=np.float32).reshape(-1))
    if len(flat) < SIZE:
        return False

    def standard(x):
        x = x - x.mean(dim=1, keepdim=True)
        return x / x.norm(dim=1, keepdim=True).clamp_min(1e-6)

    windows, wanted = flat.unfold(0, SIZE, 1), standard(rows).T
    return any(
        bool((standard(part) @ wanted).abs().max() > 0.999) for part in windows.split(50_000)
    )


def leaks(data, secrets):
    return {kind for secret, kind in secrets.items() if secret in data}


def test_nothing_of_an_image_is_in_what_the_coordinator_keeps(workspace, sites):
    secrets = private(sites)
    kept = {p.read_bytes(): p.name for p in workspace.root.rglob("*") if p.is_file()}
    for content, name in kept.items():
        assert not leaks(content, secrets), name


def test_no_site_holds_anything_of_the_source_but_weights(lab, workspace, sites):
    settings = lab.scenario.source
    data = load_segmentation(settings, lab.source_data)
    images = torch.cat([data.pool.images, data.test.images])
    assert len(images) == lab.scenario.source_phantoms.images
    source = needles(images)
    rows, searched = textured(images), set()
    secrets = needles_of_source(data)
    digests = {sha256_file(p) for p in (lab.root / "phantoms/source").rglob("*") if p.is_file()}
    for path in sites:
        settings = read_site(path)
        files = [p for p in settings.store.rglob("*") if p.is_file()]
        own = needles(Site(settings).images("pool", SIZE)[1])
        store = Store(settings.store)
        content = [store.get_bytes(name) or b"" for name in sorted(store.names(""))]
        assert any(needle in data for needle in own for data in content), "the search finds pixels"
        assert not any(needle in data for needle in source for data in content)
        # On the disk all of it is encrypted.
        raw = [p.read_bytes() for p in files]
        assert not any(needle in data for needle in (*own, *source) for data in raw)
        assert not digests & {p.name for p in files}
        shipped = {}
        for name in store.names("bundle/"):
            manifest = json.loads(store.get(name).arrays["manifest"].tobytes())
            shipped |= {file["sha256"]: path for path, file in manifest["files"].items()}
        assert {name.removeprefix("blob/") for name in store.names("blob/")} == set(shipped)
        kinds = {path.split("/")[0] for path in shipped.values()}
        assert kinds == {"segmenters", INFUSION, "MODEL_CARD.md"}
        network = build_segmenter("unet", 2, SIZE, pretrained=False).state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in network.items()}
        for digest, path in shipped.items():
            if digest in searched:
                continue
            searched.add(digest)
            blob = store.get_bytes(f"blob/{digest}")
            assert not leaks(blob, secrets), path
            if path.startswith("segmenters/"):
                arrays = load_weights(blob)
                assert {name: array.shape for name, array in arrays.items()} == shapes
            elif path == INFUSION:
                arrays = from_bytes(blob).arrays
                assert {name: array.shape for name, array in arrays.items()} == {
                    "temperatures": (2,)
                }
            else:
                continue
            for name, array in arrays.items():
                assert not holds_a_row(array, rows), (path, name)
        for name in store.names("bundle/"):
            assert not leaks(
                b"".join(a.tobytes() for a in store.get(name).arrays.values()), secrets
            )


def test_the_search_for_source_images_finds_each_way_to_hide_one(lab, sites):
    data = load_segmentation(lab.scenario.source, lab.source_data)
    secrets, (image, mask) = needles_of_source(data), (data.pool.images[3], data.pool.masks[3])
    sample = data.pool.samples[3]
    files = [path.read_bytes() for path in (sample.image, *sample.masks)]
    arrays = [
        image.half(),
        image.double(),
        image.mul(255).round().byte(),
        mask,
        mask.bool(),
        mask.float(),
    ]
    hidden = [
        *files,
        *(save({"weight": array.contiguous()}) for array in arrays),
        np.packbits(mask.numpy()).tobytes(),
        to_bytes(Records(config={"seen": [sample.name]})),
        to_bytes(Records(config={"seen": sha256_file(sample.image)})),
    ]
    for number, blob in enumerate(hidden):
        assert leaks(b"before" + blob + b"after", secrets), number
    weight = torch.randn(16, 64, 3, 3, generator=torch.Generator().manual_seed(0))
    rows = textured(data.pool.images)
    assert not holds_a_row(weight.numpy(), rows)
    weight.view(-1)[77 : 77 + SIZE] = 0.3 - 2 * rows[3]
    assert holds_a_row(weight.numpy(), rows)


class Recording(InlineGrid):
    """A grid that remembers what was asked and answered."""

    def __init__(self):
        super().__init__(len(HOSPITALS))
        self.asked, self.answered = [], []

    def push_messages(self, messages):
        messages = list(messages)
        for message in messages:
            self.asked.append((message.metadata.message_type, from_recorddict(message.content)))
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            self.answered.append((reply.metadata.message_type, from_recorddict(reply.content)))
        return replies

    def of(self, kind, action):
        return [records for name, records in getattr(self, kind) if name == action]


SCORES = {f"{m}{end}" for m in SEGMENTATION_METRICS for end in ("", "_low", "_high")}
DOCUMENTED = {
    "train.pretrain": {"loss", "mim", "contrastive"},
    "train.segmenter": {"loss", "foreground", "kept"},
    "train.ensemble": set(),
    "evaluate.segmenter": SCORES,
}
"""Metrics of each reply about segmenters."""


@pytest.fixture(scope="module")
def widest(lab, tmp_path_factory):
    """A study with branches by site, mixed statistics, consensus and a gate, overheard."""
    workspace, sites = lay_out(
        lab,
        tmp_path_factory.mktemp("widest"),
        supervision={"branches": "per_site"},
        infusion={"rule": "gate", "calibration": "consensus"},
        pretraining={"rounds": 1, "local_epochs": 1},
        pseudo_labels={"strategy": "tent", "rounds": 2, "local_epochs": 1},
        segmenter_batch_norm="mixed",
    )
    grid = Recording()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SITES_VARIABLE, os.pathsep.join(map(str, sites)))
        results = run_study(workspace, grid, "inline")
    return workspace, sites, results, grid


def test_a_branch_for_each_site_with_consensus_and_gate(widest, lab):
    workspace, _, results, _ = widest
    names = ["source", *(f"target-{name}" for name in HOSPITALS)]
    ensemble = load_ensemble(published(workspace, lab))
    assert list(ensemble.branches) == names and ensemble.head.gate is not None
    facts = checkpoint(workspace).config["facts"]["temperatures"]
    for found in facts.values():
        assert list(found) == names and all(0.05 <= t <= 20 for t in found.values())
        assert set(found.values()) != {1.0}
    assert ensemble.head.temperatures.tolist() == list(facts["adapted"].values())
    for site in results.sites.values():
        assert tuple(site.segmentation) == SEGMENTATION_STAGES
        for metrics in site.segmentation.values():
            check_metrics(metrics)
    state = checkpoint(workspace)
    one, other = (state.group(f"pretrain/{name}") for name in HOSPITALS)
    assert one.keys() == other.keys()
    assert any(not np.array_equal(one[name], other[name]) for name in one)
    assert any(event.get("event") == "warning" for event in events(workspace))


class Misled(Recording):
    """A grid on which one node cannot adapt the source's branch: it is asked for another one."""

    def push_messages(self, messages):
        messages = list(messages)
        for number, message in enumerate(messages):
            records = from_recorddict(message.content)
            spoilt = message.metadata.message_type == "train.segmenter"
            first = message.metadata.dst_node_id == min(self.get_node_ids())
            if spoilt and first and records.config["branch"] == "source":
                records.config["branch"] = "absent"
                messages[number] = Message(
                    to_recorddict(records), message.metadata.dst_node_id, "train.segmenter"
                )
        return super().push_messages(messages)


def test_a_site_that_fails_with_one_branch_adapts_the_next(lab, tmp_path):
    workspace, sites = lay_out(
        lab,
        tmp_path,
        phases=["enrol", "ship", "pretrain", "supervise", "pseudo_label", "publish"],
        cohort={"quorum": 1},
        pretraining={"rounds": 1, "local_epochs": 1},
        pseudo_labels={"strategy": "batch_norm", "rounds": 1},
        infusion={"rule": "gate"},
    )
    grid = Misled()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SITES_VARIABLE, os.pathsep.join(map(str, sites)))
        results = run_study(workspace, grid, "inline")
    (lost,) = results.missing_sites
    assert results.sites[lost].missing_reason.startswith("pseudo_label: ")
    rounds = checkpoint(workspace).config["facts"]["pseudo_labels"]
    assert [set(reports) for reports in rounds["source"]] == [set(HOSPITALS) - {lost}]
    assert [set(reports) for reports in rounds["target"]] == [set(HOSPITALS)]
    # Both can be tested with what was made without one of them.
    adapted = checkpoint(workspace).config["facts"]["adapted"]["bundle"]
    for path in sites:
        assert f"bundle/{adapted}" in Store(read_site(path).store).names("bundle/")
    # No phase trained the study's gate: what is published is the plain mean.
    ensemble = load_ensemble(published(workspace, lab))
    assert list(ensemble.branches) == ["source", "target"]
    assert ensemble.head.settings.rule == "mean" and ensemble.head.gate is None
    assert "joined by the rule 'mean'" in workspace.model_card.read_text(encoding="utf-8")


class Interrupted(Recording):
    """A grid whose coordinator is stopped as it sends the first message of a later strategy."""

    def push_messages(self, messages):
        messages = list(messages)
        for message in messages:
            settings = from_recorddict(message.content).config.get("settings", {})
            if settings.get("strategy") == "threshold":
                raise KeyboardInterrupt
        return super().push_messages(messages)


def test_strategies_of_a_chain_go_on_from_each_other_also_after_a_stop(lab, tmp_path):
    chain = {
        "phases": ["enrol", "ship", "pseudo_label"],
        "pseudo_labels": {"strategy": "tent", "rounds": 2, "local_epochs": 1},
        "further_pseudo_labels": [{"strategy": "threshold", "rounds": 1}],
    }

    def run(grid, workspace, sites):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(SITES_VARIABLE, os.pathsep.join(map(str, sites)))
            run_study(workspace, grid, "inline")
        return grid

    def strategies(grid):
        asked = grid.of("asked", "train.segmenter")
        return [(m.config["settings"]["strategy"], m.config["round"]) for m in asked]

    whole = lay_out(lab, tmp_path / "whole", **chain)
    grid = run(Recording(), *whole)
    twice = [(s, r) for s, r in (("tent", 0), ("tent", 1), ("threshold", 0)) for _ in HOSPITALS]
    assert strategies(grid) == twice
    replies = grid.of("answered", "train.segmenter")[2:4]
    shares = np.array([reply.config["examples"] for reply in replies], dtype=float)
    handed_on = grid.of("asked", "train.segmenter")[4].group("weights")
    for name, array in handed_on.items():
        both = np.stack([reply.group("weights")[name] for reply in replies]).astype(float)
        expected = np.tensordot(shares / shares.sum(), both, 1)
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6, err_msg=name)

    broken = lay_out(lab, tmp_path / "broken", **chain)
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(), *broken)
    assert strategies(run(Recording(), *broken)) == twice[4:]
    first, second = (checkpoint(workspace) for workspace, _ in (whole, broken))
    assert len(first.config["facts"]["pseudo_labels"]["source"]) == 3
    assert first.arrays.keys() == second.arrays.keys()
    assert all(np.array_equal(first.arrays[name], second.arrays[name]) for name in first.arrays)


class Unlucky(Recording):
    """A grid on which nodes fail with the source's weights, and whose coordinator may be stopped.

    Parameters
    ----------
    failing : set of (int, int)
        Round and node: an action of that round, of the source's branch if of any, is spoilt.
    stop : tuple of str, str and int, optional
        Action, branch and round of the message that the coordinator is stopped at.
    """

    def __init__(self, failing, stop=None):
        super().__init__()
        self._failing, self._stop = failing, stop
        self.told = []

    def push_messages(self, messages):
        messages = list(messages)
        for number, message in enumerate(messages):
            action, node = message.metadata.message_type, message.metadata.dst_node_id
            records = from_recorddict(message.content)
            branch, step = records.config.get("branch", "source"), records.config.get("round", 0)
            if (action, branch, step) == self._stop:
                raise KeyboardInterrupt
            self.told.append((action, branch, step, node))
            learns = action in ("train.pretrain", "train.segmenter")
            if learns and branch == "source" and (step, node) in self._failing:
                records.config["bundle"] = "0" * 64
                messages[number] = Message(to_recorddict(records), node, action)
        return super().push_messages(messages)


def run_unlucky(workspace, sites, failing, stop=None):
    """Run a study, or its part until it is stopped; return what was asked but to find the sites."""
    grid = Unlucky(failing, stop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SITES_VARIABLE, os.pathsep.join(map(str, sites)))
        try:
            run_study(workspace, grid, "inline")
        except KeyboardInterrupt:
            assert stop is not None
        else:
            assert stop is None
    return [each for each in grid.told if each[0] != "query.describe"]


def begin_together(workspace, study):
    """When a study started stands in what it signs: have all that are compared start at once."""
    identity = identity_of(study, Bundle.open(workspace.bundle).id)
    StudyState(facts={"started": "2026-01-01T00:00:00+00:00"}).save(workspace.checkpoint, identity)


ADAPTING = ["enrol", "ship", "pseudo_label", "publish"]
FIRST, NOBODY = {HOSPITALS[0]}, set()
LOST, FORGIVEN = (FIRST, NOBODY), (NOBODY, FIRST)
# With the query it is about to install what was adapted.
INSTALLING = ("query.missing", "source", 0)


@pytest.mark.parametrize(
    ("phases", "learned", "stops"),
    [
        (
            ADAPTING,
            [("source", 0, 1), ("source", 0, 2), ("source", 1, 2)],
            {("train.segmenter", "source", 1): LOST, INSTALLING: LOST},
        ),
        pytest.param(
            [*ADAPTING[:2], "pretrain", "supervise", *ADAPTING[2:]],
            [
                *(("source", 0, 1), ("source", 0, 2), ("source", 1, 2)),
                *(("target", step, node) for step in (0, 1) for node in (1, 2)),
            ],
            {
                ("train.pretrain", "source", 1): LOST,
                ("train.segmenter", "source", 1): LOST,
                ("train.segmenter", "target", 0): LOST,
                ("train.segmenter", "target", 1): FORGIVEN,
                INSTALLING: FORGIVEN,
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["one-branch", "two-branches"],
)
def test_who_was_lost_before_an_interruption_is_lost_after_it(
    lab, tmp_path, phases, learned, stops
):
    changes = {
        "phases": phases,
        "cohort": {"quorum": 1},
        "pretraining": {"rounds": 2, "local_epochs": 1},
        "pseudo_labels": {"strategy": "batch_norm", "rounds": 2},
    }
    whole, sites = lay_out(lab, tmp_path / "whole", **changes)
    broken, others = lay_out(lab, tmp_path / "broken", **changes)
    for workspace in (whole, broken):
        begin_together(workspace, read_study(workspace.study))
    asked = run_unlucky(whole, sites, {(0, 1)})
    assert [each[1:] for each in asked if each[0] == "train.segmenter"] == learned
    again = []
    for stop, lost in stops.items():
        again += run_unlucky(broken, others, {(0, 1)}, stop)
        saved = checkpoint(broken).config
        assert (set(saved["missing"]), set(saved["forgiven"])) == lost
    again += run_unlucky(broken, others, {(0, 1)})
    assert again == asked
    assert published(broken, lab).id == published(whole, lab).id
    assert checkpoint(broken).digest() == checkpoint(whole).digest()
    assert repeatable(checkpoint(broken).config) == repeatable(checkpoint(whole).config)
    assert broken.model_card.read_bytes() == whole.model_card.read_bytes()
    one, other = read_results(whole.results), read_results(broken.results)
    assert one.missing_sites == (HOSPITALS[0],) and one.sites == other.sites
    assert other.sites[HOSPITALS[0]].missing_reason.startswith("pseudo_label: ")


def test_a_failed_study_that_is_resumed_asks_again_whom_it_had_lost(lab, tmp_path):
    workspace, sites = lay_out(
        lab,
        tmp_path,
        phases=["enrol", "ship", "pseudo_label"],
        cohort={"quorum": 1},
        pseudo_labels={"strategy": "batch_norm", "rounds": 2},
    )
    with pytest.raises(OrderError, match="0 of 2 sites"):
        run_unlucky(workspace, sites, {(0, 1), (1, 2)})
    run_unlucky(workspace, sites, set())
    assert read_results(workspace.results).missing_sites == ()
    history = checkpoint(workspace).config["facts"]["pseudo_labels"]["source"]
    assert [set(reports) for reports in history] == [{HOSPITALS[1]}, set(HOSPITALS)]


def test_a_branch_is_of_the_studys_seed_and_style(lab, tmp_path):
    network = build_segmenter("unet", image_size=SIZE, pretrained=False)
    encoder = {k: v.numpy() for k, v in network.encoder.state_dict().items()}

    def trained(**changes):
        values = lab.scenario.study.model_dump(mode="json") | changes
        study = Study.model_validate(values)
        workspace = lab.workspace(study, lab.root / "source", tmp_path / "study")
        exchange = Exchange(InlineGrid(len(HOSPITALS)), study.cohort, SILENT)
        bundle = Bundle.open(workspace.bundle)
        run = StudyRun(study, workspace, bundle, exchange, StudyState(), SILENT)
        return train_branch(run, "target", encoder).digest()

    plain = trained()
    assert trained(supervision={"style_augmentation": False}) == plain, "as the source's own"
    assert trained(supervision={"style_augmentation": True}) != plain
    assert trained(seed=1) != plain


def test_each_site_is_tested_with_its_own_branch(widest):
    *_, grid = widest
    asked = [records.config["branches"] for records in grid.of("asked", "evaluate.segmenter")]
    own = [branches for branches in asked if len(branches) == 1 and branches != ["source"]]
    assert own == [[f"target-{name}"] for name in HOSPITALS]


def test_mixed_statistics_are_asked_for_and_the_sources_stay_in_the_weights(widest, lab):
    workspace, _, _, grid = widest
    for action in ("train.segmenter", "train.ensemble"):
        assert {r.config["batch_norm"] for r in grid.of("asked", action)} == {"mixed"}
    tests = [r.config["batch_norm"] for r in grid.of("asked", "evaluate.segmenter")]
    sites = len(HOSPITALS)
    assert tests[: 2 * sites] == ["global"] * sites + ["site"] * sites
    assert set(tests[2 * sites :]) == {"mixed"}
    path = "segmenters/source.safetensors"
    came, adapted = (
        load_weights(Bundle.open(folder).read(path))
        for folder in (workspace.bundle, workspace.adapted)
    )
    running = [name for name in came if name.endswith(("running_mean", "running_var"))]
    assert running and all(np.allclose(came[n], adapted[n], atol=1e-6) for n in running)
    assert any(not np.array_equal(came[name], adapted[name]) for name in came)


def test_replies_hold_documented_keys_and_nothing_of_an_image(widest):
    _, sites, _, grid = widest
    secrets = private(sites)
    assert set(DOCUMENTED) <= {action for action, _ in grid.answered}
    for action, reply in grid.answered:
        assert not leaks(to_bytes(reply), secrets), action
    for action, reply in grid.answered:
        if action not in DOCUMENTED:
            continue
        assert set(reply.config) == {"examples"}
        assert set(reply.metrics) == DOCUMENTED[action]
        weights = {name for name in reply.arrays if name.startswith("weights/")}
        others = {"log_temperatures"} if action == "train.ensemble" else set()
        assert set(reply.arrays) - weights == others
        assert bool(weights) is (action in ("train.pretrain", "train.segmenter"))
    # Shapes come from the networks alone: sites of other sizes would send the same.
    for action in ("train.pretrain", "train.segmenter"):
        shapes = [
            {name: array.shape for name, array in reply.arrays.items()}
            for reply in grid.of("answered", action)
        ]
        assert all(shape == shapes[0] for shape in shapes)
    for reply in grid.of("answered", "train.ensemble"):
        assert reply.arrays["log_temperatures"].shape == (1 + len(HOSPITALS),)


def test_adaptation_is_asked_for_with_weights_alone(widest, lab):
    *_, grid = widest
    asked = grid.of("asked", "train.segmenter")
    model = load_ensemble(published(widest[0], lab)).branches["source"]
    branch = {f"weights/{name}": tuple(t.shape) for name, t in model.state_dict().items()}
    assert len(asked) == 2 * len(HOSPITALS) * (1 + len(HOSPITALS))
    for message in asked:
        assert set(message.config) == set(TrainSegmenter.model_fields) and not message.metrics
        shapes = {name: array.shape for name, array in message.arrays.items()}
        assert shapes == (branch if message.config["round"] else {})


@pytest.mark.demo
def test_flower_over_enclave_processes_and_inline_do_the_same(simulated, lab, workspace, tmp_path):
    other, sites = lay_out(lab, tmp_path)
    with enclave_processes(sites) as served:
        federated = run_flower(other, served, Events(), 1)
    assert federated.engine == "flower" and federated.missing_sites == ()
    for site in sites:
        open_ledger(open_store(read_site(site))).verify()
    for name, site in simulated.sites.items():
        stages = federated.sites[name].segmentation
        assert stages.keys() == site.segmentation.keys()
        for stage, metrics in site.segmentation.items():
            assert stages[stage] == pytest.approx(metrics, abs=1e-6), (name, stage)
    first, second = checkpoint(workspace).arrays, checkpoint(other).arrays
    assert first.keys() == second.keys()
    assert any(name.startswith("segmenter/target/") for name in first)
    for name, array in first.items():
        np.testing.assert_allclose(second[name], array, rtol=0, atol=1e-6, err_msg=name)


RUN = """
import sys
from pathlib import Path
from sonofed_common.runtime import Events
from sonofed_server.study.workspace import Workspace
from sonofed_simulations.engines.inline import run_inline
run_inline(Workspace(Path(sys.argv[1])), [Path(p) for p in sys.argv[2:]], Events())
"""


def kept_epochs(sites):
    folders = [read_site(path).store / "checkpoints" for path in sites]
    return [file for folder in folders for file in folder.glob("*.safetensors")]


def kill_within_a_round(workspace, sites, reached):
    """Run a study in a process of its own; kill that once a site has kept an epoch of a round."""
    command = [sys.executable, "-c", RUN, str(workspace.root), *map(str, sites)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 400
    try:
        while time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read().decode()
            log = events(workspace) if workspace.events.exists() else []
            if any(map(reached, log)) and kept_epochs(sites):
                return
            time.sleep(0.01)
        raise AssertionError("no round kept an epoch")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()


@pytest.mark.long
def test_a_study_killed_within_rounds_ends_with_the_same_bits(simulated, lab, workspace, tmp_path):
    broken, sites = lay_out(lab, tmp_path)
    # When a study started stands in what it signs; these two start at the same second.
    identity = identity_of(lab.scenario.study, Bundle.open(broken.bundle).id)
    StudyState(facts={"started": simulated.started}).save(broken.checkpoint, identity)
    within = {
        "pretrain": lambda e: e["event"] == "progress" and "round 2 of 2" in e["task"],
        "pseudo_label": lambda e: e["event"] == "phase-started" and e["phase"] == "pseudo_label",
    }
    for phase, reached in within.items():
        kill_within_a_round(broken, sites, reached)
        assert kept_epochs(sites)
        assert not broken.results.exists() and not broken.failure.exists()
        done = checkpoint(broken).config["done"]
        assert done == list(SEGMENTATION[: SEGMENTATION.index(phase)])
    again = run_inline(broken, sites, Events())
    assert published(broken, lab).id == published(workspace, lab).id
    assert checkpoint(broken).digest() == checkpoint(workspace).digest()
    assert repeatable(checkpoint(broken).config) == repeatable(checkpoint(workspace).config)
    whole = read_results(workspace.results)
    assert repeatable(again.model_dump()) == repeatable(whole.model_dump())
    assert [phase.name for phase in again.phases] == list(SEGMENTATION)
    assert not kept_epochs(sites)


def repeatable(values):
    """Everything but what the machine's speed and memory make of it."""
    if isinstance(values, dict):
        measured = ("seconds", "peak_memory_bytes")
        return {k: repeatable(v) for k, v in values.items() if k not in measured}
    return [repeatable(v) for v in values] if isinstance(values, list | tuple) else values


def blank(path):
    """Give a site images without anything on them; return the file of its settings."""
    values = tomllib.loads(path.read_text())
    folder = Path(shutil.copytree(values["data"]["path"], path.parent / "blank"))
    for image in (folder / "images").iterdir():
        Image.fromarray(np.zeros_like(np.asarray(Image.open(image)))).save(image)
    values["data"]["path"], values["store"] = str(folder), values["store"] + "-blank"
    changed = path.with_name("blank.toml")
    changed.write_text(tomli_w.dumps(values))
    return changed


def unlabelled(path):
    """Take labels and masks from a site's data; return the file of its settings."""
    values = tomllib.loads(path.read_text())
    folder = Path(shutil.copytree(values["data"]["path"], path.parent / "unlabelled"))
    shutil.rmtree(folder / "masks")
    with (folder / "table.csv").open(newline="") as file:
        rows = [{**row, "label": "", "mask": ""} for row in csv.DictReader(file)]
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    values["data"]["path"], values["store"] = str(folder), values["store"] + "-unlabelled"
    changed = path.with_name("unlabelled.toml")
    changed.write_text(tomli_w.dumps(values))
    return changed


def test_a_hospital_without_labels_and_masks_takes_part(lab, tmp_path):
    workspace, sites = lay_out(
        lab,
        tmp_path,
        phases=["enrol", "ship", "pseudo_label", "ensemble", "evaluate", "publish"],
        pseudo_labels={"rounds": 1, "local_epochs": 1},
        infusion={"calibration": "consensus"},
    )
    # It works on none of the source's data.
    workspace.source.unlink()
    results = run_inline(workspace, [sites[0], unlabelled(sites[1])], Events())
    assert not results.missing_sites
    tested, untested = (results.sites[name] for name in HOSPITALS)
    assert (untested.images, untested.test_masks, untested.segmentation) == (IMAGES, 0, {})
    alone = ("source", "bn_adapted", "infusion", "adapted", "ensemble")
    assert tested.test_masks and tuple(tested.segmentation) == alone
    (reports,) = checkpoint(workspace).config["facts"]["pseudo_labels"]["source"]
    assert reports[HOSPITALS[1]]["kept"] > 0
    build_report(results, tmp_path, [])
    assert HOSPITALS[0] in (tmp_path / "report.html").read_text(encoding="utf-8")


COLLAPSING = {
    "phases": ["enrol", "ship", "pseudo_label"],
    "pseudo_labels": {"strategy": "threshold", "threshold": 0.99, "learning_rate": 0.5},
}
"""Steps so large that the few sure pixels carry all others away; blank images have none."""


def test_a_site_whose_round_collapses_is_lost_by_name(lab, tmp_path):
    workspace, sites = lay_out(lab, tmp_path, cohort={"quorum": 1}, **COLLAPSING)
    results = run_inline(workspace, [blank(sites[0]), sites[1]], Events())
    assert results.missing_sites == ("lakeside",)
    reason = results.sites["lakeside"].missing_reason
    assert reason.startswith("pseudo_label: ") and reason.endswith("[collapse]")
    assert "predicted foreground went from" in reason and "lower the learning rate" in reason
    (failed,) = [e for e in events(workspace) if e["event"] == "site-failed"]
    assert (failed["site"], failed["action"]) == ("lakeside", "train.segmenter")
    assert not leaks(workspace.events.read_bytes(), private(sites))


def test_a_collapse_that_breaks_the_quorum_ends_the_study_by_name(lab, tmp_path):
    workspace, sites = lay_out(lab, tmp_path, **COLLAPSING)
    with pytest.raises(CollapseError, match=r"quorum of 2; (riverside|lakeside): ") as error:
        run_inline(workspace, sites, Events())
    assert error.value.exit_code == 50
    assert json.loads(workspace.failure.read_text()) == {
        "error": "collapse",
        "message": error.value.message,
    }
    assert events(workspace)[-1]["event"] == "study-failed"
    assert not workspace.results.exists() and not kept_epochs(sites)
    assert not leaks(workspace.failure.read_bytes(), private(sites))


@pytest.mark.parametrize(
    ("phases", "sentence"),
    [
        (["enrol", "ship", "supervise"], "'supervise' needs target-informed encoder"),
        (["enrol", "ship", "supervise", "pretrain"], "'supervise' needs target-informed encoder"),
        (["enrol", "pseudo_label", "ship"], "'pseudo_label' needs source weights"),
        (["enrol", "ship", "evaluate", "publish"], "'publish' needs adapted models"),
        (["enrol", "ship", "pretrain", "publish"], "'publish' needs adapted models"),
        (["enrol", "ship", "pretrain", "pretrain"], "name each phase once"),
        (
            ["enrol", "ship", "pretrain", "pseudo_label", "supervise"],
            "'supervise' must come before 'pseudo_label'",
        ),
        (
            ["enrol", "ship", "ensemble", "pseudo_label", "evaluate", "publish"],
            "'pseudo_label' must come before 'ensemble'",
        ),
        (
            ["enrol", "ship", "evaluate", "ensemble", "publish"],
            "'ensemble' must come before 'evaluate'",
        ),
    ],
)
def test_phases_out_of_order_are_refused(phases, sentence):
    values = {"name": "trial", "phases": phases, "cohort": {"sites": ["north"]}}
    with pytest.raises(ConfigurationError, match=sentence):
        validate(Study, values, "study.toml")


def test_a_chain_takes_the_preset_and_is_part_of_what_a_hospital_approves():
    values = {"name": "trial", "cohort": {"sites": ["north"]}, "preset": "paper"}
    alone = validate(Study, values, "study.toml")
    values["pseudo_labels"] = {"strategy": "tent"}
    values["further_pseudo_labels"] = [{"strategy": "apl", "rounds": 3}]
    study = validate(Study, values, "study.toml")
    (apl,) = study.further_pseudo_labels
    assert apl == alone.pseudo_labels.model_copy(update={"rounds": 3})
    assert study.adaptations == [(0, study.pseudo_labels), (2, apl)]
    assert study.digest() != alone.digest()
    asked = {"study": "trial", "seed": 0, "bundle": "0" * 64, "image_size": 128, "branch": "source"}
    study = study.model_copy(update={"phases": ("enrol", "ship", "pseudo_label")})
    for earlier, settings in study.adaptations:
        fits = TrainSegmenter(**asked, round=0, earlier_rounds=earlier, settings=settings)
        check_scope(study, "train.segmenter", fits)
    other = TrainSegmenter(**asked, round=0, settings=apl.model_copy(update={"rounds": 4}))
    with pytest.raises(StudyDeniedError, match=r"settings of train\.segmenter"):
        check_scope(study, "train.segmenter", other)


def test_an_unknown_strategy_names_the_nearest():
    values = {"name": "trial", "cohort": {"sites": ["north"]}}
    wrong = {"strategy": "treshold"}
    for section in ({"pseudo_labels": wrong}, {"further_pseudo_labels": [wrong]}):
        with pytest.raises(ConfigurationError, match="threshold"):
            validate(Study, values | section, "study.toml")


@pytest.mark.parametrize("phase", ["pretrain", "pseudo_label", "ensemble", "evaluate"])
def test_a_scenario_whose_source_trains_no_segmenter_is_refused(phase):
    values = tomllib.loads(TINY.read_text())
    del values["source"]["segmentation"]
    values["source"]["classifiers"] = ["shufflenet_v2"]
    values["study"] |= {"phases": ["enrol", "ship", phase], "classifiers": []}
    with pytest.raises(ConfigurationError, match=f"'{phase}' needs a segmenter"):
        validate(Scenario, values, "scenario.toml")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image_size": 64}, "image_size is 64, but the source's segmenter was trained on 32"),
        ({"pretraining": {"form": "mae"}}, "'mae' needs the encoder 'vit', but the .* 'unet'"),
    ],
)
def test_a_segmenter_that_does_not_fit_the_study_is_refused_at_once(
    lab, tmp_path, changes, sentence
):
    values = tomllib.loads(TINY.read_text())
    values["study"] |= changes
    with pytest.raises(ConfigurationError, match=sentence):
        validate(Scenario, values, "scenario.toml")
    # A coordinator may bring study and bundle together without a scenario.
    study = Study.model_validate(lab.scenario.study.model_dump(mode="json") | changes)
    workspace = lab.workspace(study, lab.root / "source", tmp_path / "study")
    with pytest.raises(ConfigurationError, match=sentence):
        run_inline(workspace, lab.prepare_sites(0, tmp_path / "sites"), Events())
    assert checkpoint(workspace).config["done"] == ["enrol"]
    study = study.model_copy(update={"phases": ("enrol", "ship")})
    workspace = lab.workspace(study, lab.root / "source", tmp_path / "study")
    run_inline(workspace, lab.prepare_sites(0, tmp_path / "sites"), Events())


def test_nothing_is_mirrored_of_a_source_trained_without_flips():
    values = tomllib.loads(TINY.read_text())
    values["study"] |= {"infusion": {"mirrored": True}}
    validate(Scenario, values, "scenario.toml")
    values["source"]["segmentation"]["flips"] = False
    with pytest.raises(ConfigurationError, match=r"infusion\.mirrored is on, but the source's"):
        validate(Scenario, values, "scenario.toml")


@pytest.mark.parametrize("phase", ["pretrain", "pseudo_label", "ensemble", "evaluate"])
def test_a_bundle_without_a_segmenter_is_refused(lab, tmp_path, phase):
    data = DataProvenance(name="phantoms", digest="0" * 64, images=1, groups=1)
    provenance = Provenance(data=data, settings="0" * 64)
    writer = BundleWriter(tmp_path / "bare", name="b", kind="source", provenance=provenance)
    writer.add("note", b"no network")
    writer.facts = {"image_size": SIZE}
    bundle = writer.sign(load_or_create_signing_key(lab.key))
    study = lab.scenario.study.model_copy(update={"phases": ("enrol", "ship", phase)})
    workspace = lab.workspace(study, bundle.folder, tmp_path / "study")
    with pytest.raises(ConfigurationError, match=r"holds no segmenter, .* train the source with"):
        run_inline(workspace, lab.prepare_sites(0, tmp_path / "sites"), Events())
    assert json.loads(workspace.failure.read_text())["error"] == "configuration"


def reduced(name, hospitals, **source):
    """Some hospitals of a built-in scenario of real data, small and for one epoch."""
    values = tomllib.loads(built_in()[name].read_text())
    kept = {n: {**values["hospitals"][n], "test_fraction": 0.4} for n in hospitals}
    values |= {"hospitals": kept, "threads": 1}
    values["source"] |= {"image_size": 64, "threads": 1}
    for section in ("segmentation", "training"):
        if section in values["source"]:
            values["source"][section] |= {"epochs": 1, "batch_size": 8}
    values["source"] |= source
    return values


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The real sets, every fourth lesion of BUSI and third of BUS-BRA: no more is needed here."""
    if "SONOFED_DATA" not in os.environ:
        pytest.skip("SONOFED_DATA is not set")
    whole, part = Path(os.environ["SONOFED_DATA"]).resolve(), tmp_path_factory.mktemp("data")
    (part / "BrEaST").symlink_to(whole / "BrEaST")
    (part / "BUSBRA").mkdir()
    for name in ("Images", "Masks"):
        (part / "BUSBRA" / name).symlink_to(whole / "BUSBRA" / name)
    header, *rows = (whole / "BUSBRA" / "bus_data.csv").read_text().splitlines(keepends=True)
    (part / "BUSBRA" / "bus_data.csv").write_text("".join([header, *rows[::3]]))
    for name in ("benign", "malignant"):
        folder = part / "Dataset_BUSI_with_GT" / name
        folder.mkdir(parents=True)
        for file in (whole / "Dataset_BUSI_with_GT" / name).glob("*.png"):
            if int(re.search(r"\((\d+)\)", file.name)[1]) % 4 == 0:
                (folder / file.name).symlink_to(file)
    return part


def run_reduced(values, data, tmp_path):
    file = tmp_path / "reduced.toml"
    file.write_text(tomli_w.dumps(values))
    results = simulate(read_scenario(str(file)), tmp_path / "out", data, "inline", 0, Events())
    assert results.missing_sites == () and list(results.sites) == list(values["hospitals"])
    assert (tmp_path / "out" / "report.html").is_file()
    return results


@pytest.mark.data
@pytest.mark.long
def test_outlines_of_real_lesions_across_countries(data, tmp_path):
    values = reduced("breast_segmentation", ["rio-aplio"])
    once = {"rounds": 1, "local_epochs": 1, "batch_size": 32}
    values["study"] |= {"pretraining": once, "pseudo_labels": once}
    results = run_reduced(values, data, tmp_path)
    for site in results.sites.values():
        assert site.test_masks > 0 and tuple(site.segmentation) == SEGMENTATION_STAGES
        for metrics in site.segmentation.values():
            check_metrics(metrics, 64)
        assert site.segmentation["ensemble"]["dice"] > 0.2


@pytest.mark.data
@pytest.mark.long
def test_real_lesions_are_classified_across_countries(data, tmp_path):
    hospitals = ["rio-aplio", "poland"]
    values = reduced("breast_three_countries", hospitals, diffusion={"kind": "none"})
    values["study"] |= {
        "phases": ["enrol", "ship", "embed", "cluster", "select", "annotate", "classifier"],
        "embedding": {"rounds": 1, "dimension": 16},
        "finetuning": {"rounds": 1, "local_epochs": 1},
    }
    results = run_reduced(values, data, tmp_path)
    pool = sum(site.images for site in results.sites.values())
    assert sum(site.selected for site in results.sites.values()) == round(0.2 * pool)
    for site in results.sites.values():
        (classifier,) = site.classifiers.values()
        for metrics in (classifier.source, classifier.bn_adapted, classifier.adapted):
            assert 0 <= metrics["auroc_low"] <= metrics["auroc"] <= metrics["auroc_high"] <= 1
