from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import shutil
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sonofed_client.adaptation.pseudo_labels import (
    STRATEGIES,
    adapt_round,
    check_collapse,
    class_shares,
)
from sonofed_client.adaptation.source_free import views
from sonofed_client.adaptation.spacing import evenly_spaced
from sonofed_client.enclave.enclave import InProcessEnclave
from sonofed_client.enclave.handlers import segmentation
from sonofed_client.enclave.site import Site
from sonofed_client.settings import SiteData, SiteSettings
from sonofed_common.batch_norm import adapt_batch_norm, statistics_of
from sonofed_common.contract import actions
from sonofed_common.contract.actions import request
from sonofed_common.contract.bundle import BundleWriter, DataProvenance, Provenance
from sonofed_common.contract.configuration import validate
from sonofed_common.contract.errors import CollapseError, ConfigurationError, SiteEmptyError
from sonofed_common.contract.segmentation import SegmentationFacts
from sonofed_common.contract.study_segmentation import READ_BY, PseudoLabels, Strategy
from sonofed_common.models.segmenter import build_segmenter
from sonofed_common.runtime import Events
from sonofed_common.security import load_or_create_signing_key, public_hex
from sonofed_simulations.phantoms.dataset import write_dataset
from sonofed_simulations.phantoms.scanner import SCANNERS

torch.set_num_threads(1)
SIZE = 32
FACTS = SegmentationFacts(
    encoder="unet",
    classes=2,
    heads=("unet", "aspp"),
    class_ratio=(0.7, 0.3),
    foreground_range=(0.0, 1.0),
    flips=True,
)
COMMON = {"study": "trial", "seed": 3}


def chosen(strategy="apl", **values):
    few = {"rounds": 2, "local_epochs": 1, "batch_size": 3, "passes": 2, "perturbed_heads": 2}
    both = {"threshold": 0.5, "consistency": True}
    return PseudoLabels(strategy=strategy, **{**few, **both, **values})


@functools.cache
def start():
    model = build_segmenter("unet", 2, SIZE, pretrained=False).eval()
    adapt_batch_norm(model, images())
    # A random network answers one class everywhere; this one splits the pixels in halves.
    with torch.no_grad():
        for head, logits in zip(model.heads, model(images()), strict=True):
            layer = head.last if hasattr(head, "last") else head.pyramid[0]
            layer.bias[1] += (logits[:, 0] - logits[:, 1]).median()
    return model


def network():
    return copy.deepcopy(start())


def images(count=6):
    return torch.rand(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def adapted(strategy, **options):
    model = network()
    report = adapt_round(model, images(), chosen(strategy), FACTS, 0, 5, **options)
    return model, report


def same(one, other):
    return all(
        torch.equal(a, b)
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )


def changed(before, after):
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    return {name for (name, a), b in pairs if not torch.equal(a, b)}


def test_every_strategy_of_the_contract_is_here():
    assert STRATEGIES.keys() == set(get_args(Strategy))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_round_trains_what_it_should_and_repeats_to_the_bit(strategy):
    model, report = adapted(strategy)
    again, same_report = adapted(strategy)
    assert same(model, again) and report == same_report
    assert all(t.isfinite().all() for t in model.state_dict().values())
    assert all(p.requires_grad for p in model.parameters())
    assert set(report) == {"loss", "foreground", "kept"}
    assert 0 <= report["foreground"] <= 1 and 0 <= report["kept"] <= 1
    moved = changed(start(), model)
    if strategy == "batch_norm":
        assert not moved
        assert report["kept"] == 0
    elif strategy == "tent":
        norms = {n for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
        assert moved and {name.rpartition(".")[0] for name in moved} <= norms
    else:
        assert any(name.startswith("encoder") for name in moved)
        assert any(name.startswith("heads") for name in moved)
        assert report["kept"] > 0


@pytest.mark.parametrize("strategy", ["apl", "dpl"])
def test_an_interrupted_round_goes_on_to_the_same_bits(tmp_path, strategy):
    values = {"local_epochs": 2, "teacher_momentum": 0.5, "learning_rate": 1e-3}
    settings = chosen(strategy, **values)
    whole, resumed = network(), network()
    report = adapt_round(whole, images(), settings, FACTS, 1, 5)

    def interrupt(event):
        if event["event"] == "progress" and event["epoch"] == 4:
            raise KeyboardInterrupt

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        adapt_round(resumed, images(), settings, FACTS, 1, 5, path, Events(listeners=[interrupt]))
    assert path.exists()
    for _ in range(2):
        # The second time every epoch is in the checkpoint.
        resumed = network()
        assert adapt_round(resumed, images(), settings, FACTS, 1, 5, path) == report
        assert same(whole, resumed)


def test_a_round_without_flips_sees_no_mirror(monkeypatch):
    plain, mirrored, free = (network() for _ in range(3))
    sided = FACTS.model_copy(update={"flips": False})
    adapt_round(plain, images(), chosen(), sided, 0, 5)
    monkeypatch.setattr(views, "FLIP_PROBABILITY", 1.0)
    adapt_round(mirrored, images(), chosen(), sided, 0, 5)
    adapt_round(free, images(), chosen(), FACTS, 0, 5)
    assert same(plain, mirrored) and not same(plain, free)


def test_the_teacher_starts_as_the_received_model():
    frozen = chosen("threshold", local_epochs=2, teacher_momentum=1.0, threshold=0.6)
    loose = frozen.model_copy(update={"teacher_momentum": 0.0, "learning_rate": 3e-3})
    model = network()
    adapt_batch_norm(model, images())
    with torch.no_grad():
        expected = (model.eval().probabilities(images()).amax(dim=1) >= 0.6).float().mean().item()
    report = adapt_round(network(), images(), frozen, FACTS, 0, 5)
    assert report["kept"] == pytest.approx(expected)
    assert adapt_round(network(), images(), loose, FACTS, 0, 5)["kept"] != report["kept"]


def test_batch_norm_is_what_the_statistics_alone_give():
    model, report = adapted("batch_norm")
    expected = network()
    adapt_batch_norm(expected, images())
    assert same(model, expected)
    with torch.no_grad():
        predicted = expected.eval().probabilities(images()).argmax(dim=1)
    assert report["foreground"] == pytest.approx((predicted > 0).float().mean().item())


def test_mixed_statistics_go_back_as_they_came():
    own, mixed, untrained = network(), network(), network()
    for model in (own, mixed, untrained):
        adapt_batch_norm(model, 0.9 * images() + 0.05)
    came = statistics_of(mixed)
    one = adapt_round(own, images(), chosen(), FACTS, 0, 5)
    other = adapt_round(mixed, images(), chosen(), FACTS, 0, 5, batch_norm="mixed")
    assert one["loss"] != other["loss"]
    assert all(torch.equal(tensor, came[name]) for name, tensor in statistics_of(mixed).items())
    assert changed(network(), mixed)
    adapt_round(untrained, images(), chosen("batch_norm"), FACTS, 0, 5, batch_norm="mixed")
    assert all(torch.equal(tensor, came[name]) for name, tensor in statistics_of(untrained).items())
    assert not changed(network(), untrained)


def test_apl_without_its_losses_trains_nothing():
    model = network()
    off = chosen(consistency=False, self_training=False)
    adapt_round(model, images(), off, FACTS, 0, 5)
    assert same(model, adapted("batch_norm")[0])


def test_a_single_image_trains_nothing_and_none_is_an_error():
    model = network()
    report = adapt_round(model, images(1), chosen(), FACTS, 0, 5)
    assert same(model, start()) and report["loss"] == 0
    with pytest.raises(SiteEmptyError):
        adapt_round(model, images(0), chosen(), FACTS, 0, 5)


def all_background(model):
    for head in model.heads:
        layers = [head.last] if hasattr(head, "last") else list(head.pyramid)
        for layer in layers:
            nn.init.constant_(layer.bias, 0)
            with torch.no_grad():
                layer.bias[0] = 50
    return model


def test_a_head_that_answers_background_everywhere_is_a_collapse():
    model = network()
    before = class_shares(model, images())
    after = class_shares(all_background(model), images())
    assert 0.2 < before[1] < 0.8 and before.sum() == 1 and after.tolist() == [1, 0]
    with pytest.raises(CollapseError, match=r"0.00% of the pixels"):
        check_collapse(before, after, facts_of((0.2, 0.8)))
    check_collapse(before, before, facts_of((0.2, 0.8)))


def facts_of(foreground, ratio=(0.7, 0.3)):
    update = {"foreground_range": foreground, "class_ratio": ratio, "classes": len(ratio)}
    return FACTS.model_copy(update=update)


def check_foreground(before, after, source):
    old, new = (torch.tensor([1 - share, share], dtype=torch.float64) for share in (before, after))
    check_collapse(old, new, facts_of(source))


@pytest.mark.parametrize(
    ("before", "after"), [(0.009, 0.0), (0.30, 0.011), (0.7, 0.99), (0.95, 0.999), (0.95, 0.2)]
)
def test_a_foreground_or_background_that_vanishes_is_a_collapse_wherever_it_starts(before, after):
    with pytest.raises(CollapseError):
        check_foreground(before, after, (0.02, 0.3))


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.0), (0.0, 0.1), (0.009, 0.003), (1.0, 0.9)])
def test_a_site_outside_of_the_range_may_move(before, after):
    check_foreground(before, after, (0.02, 0.3))


def test_a_class_that_vanishes_is_a_collapse_where_the_site_held_it():
    facts = facts_of((0.1, 0.4), (0.8, 0.15, 0.05))
    before = torch.tensor([0.79, 0.2, 0.01], dtype=torch.float64)
    check_collapse(before, torch.tensor([0.75, 0.248, 0.002], dtype=torch.float64), facts)
    with pytest.raises(CollapseError, match=r"class 2 went from 1.00% to 0.05%"):
        check_collapse(before, torch.tensor([0.75, 0.2495, 0.0005], dtype=torch.float64), facts)
    rare = torch.tensor([0.797, 0.2, 0.003], dtype=torch.float64)
    check_collapse(rare, torch.tensor([0.75, 0.25, 0.0], dtype=torch.float64), facts)


@pytest.mark.parametrize(
    ("source", "starts", "inside", "outside"),
    [
        ((0.2, 0.8), (0.2, 0.7), (0.1, 0.9), (0.09, 0.91)),
        ((0.06, 0.2), (0.07, 0.15), (0.03, 0.4), (0.02, 0.41)),
    ],
)
def test_a_step_over_the_border_is_no_collapse(source, starts, inside, outside):
    for before, after in zip(starts, inside, strict=True):
        check_foreground(before, after, source)
    for before, after in zip(starts, outside, strict=True):
        with pytest.raises(CollapseError):
            check_foreground(before, after, source)
        check_foreground(after, after / 2, source)


def test_a_round_that_collapses_fails_unless_it_started_outside():
    towards = {"class_ratio": (1.0, 0.0), "foreground_range": (0.2, 0.8)}
    facts = FACTS.model_copy(update=towards)
    hasty = chosen(
        class_prior=100.0, prior_shares="source", learning_rate=0.1, local_epochs=4, rounds=10
    )
    with pytest.raises(CollapseError):
        adapt_round(network(), images(), hasty, facts, 0, 5)
    report = adapt_round(all_background(network()), images(), chosen(), facts, 0, 5)
    assert report["foreground"] < 0.1


def thinned(bias):
    """The network with less foreground."""
    model = network()
    with torch.no_grad():
        for head in model.heads:
            layer = head.last if hasattr(head, "last") else head.pyramid[0]
            layer.bias[0] += bias
    return model


def test_a_slide_over_rounds_is_a_collapse_though_no_round_is():
    settings, facts = chosen(learning_rate=1e-6), facts_of((0.001, 0.002))
    steps = [class_shares(thinned(bias), images()) for bias in (0.0, 0.3, 0.5)]
    for before, after in pairwise(steps):
        check_collapse(before, after, facts)
    for first in (None, steps[1]):
        adapt_round(thinned(0.5), images(), settings, facts, 1, 5, first=first)
    with pytest.raises(CollapseError, match=f"went from {steps[0][1]:.2%}"):
        adapt_round(thinned(0.5), images(), settings, facts, 1, 5, first=steps[0])


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"teacher_momentum": 0.5}, "teacher_momentum = 0.5 would do nothing: .* raise local"),
        ({"disagreement": 1.0}, "disagreement = 1 would do nothing: .* set consistency = true"),
    ],
)
def test_what_would_do_nothing_is_refused(values, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        validate(PseudoLabels, values, "study.toml")
    heeded = PseudoLabels(**values, local_epochs=2, consistency=True)
    # A site reads back all that a study says.
    assert PseudoLabels.model_validate(heeded.model_dump(mode="json")) == heeded
    assert PseudoLabels.model_validate(PseudoLabels().model_dump(mode="json")) == PseudoLabels()


class Overheard:
    """Settings that note which of them are read."""

    def __init__(self, settings):
        self._settings, self.read = settings, set()

    def __getattr__(self, name):
        self.read.add({"least_probability": "threshold"}.get(name, name))
        return getattr(self._settings, name)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_reads_the_settings_that_the_contract_says(strategy):
    settings = Overheard(chosen(strategy))
    adapt_round(network(), images(), settings, FACTS, 0, 5)
    # The loop keeps a teacher for every strategy; whether its labels matter is seen below.
    own = READ_BY.keys() - {"teacher_momentum"}
    assert settings.read & own == {name for name in own if strategy in READ_BY[name]}
    shared = PseudoLabels.model_fields.keys() - READ_BY.keys()
    assert shared == {"strategy", "rounds", "local_epochs", "learning_rate", "batch_size"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_teachers_momentum_matters_where_its_labels_are_learnt(strategy):
    models = []
    for momentum in (0.0, 0.99):
        model = network()
        values = {"local_epochs": 2, "learning_rate": 1e-3, "teacher_momentum": momentum}
        adapt_round(model, images(), chosen(strategy, **values), FACTS, 0, 5)
        models.append(model)
    assert same(*models) != (strategy in READ_BY["teacher_momentum"])


def test_the_momentum_is_of_rounds_with_several_local_epochs():
    reports = {
        (epochs, momentum): adapt_round(
            network(),
            images(),
            chosen(learning_rate=1e-3).model_copy(
                update={"local_epochs": epochs, "teacher_momentum": momentum}
            ),
            FACTS,
            0,
            5,
        )
        for epochs in (1, 2)
        for momentum in (0.0, 0.99)
    }
    assert reports[1, 0.0] == reports[1, 0.99]
    assert reports[2, 0.0] != reports[2, 0.99]


def test_images_for_the_statistics_are_evenly_spaced():
    whole = torch.arange(300.0)
    assert torch.equal(evenly_spaced(whole, 500), whole)
    steps = evenly_spaced(whole, 128).diff()
    assert len(steps) == 127 and set(steps.tolist()) == {2.0, 3.0}
    assert len(evenly_spaced(whole[:0], 128)) == 0


def test_no_label_can_be_given():
    names = set(inspect.signature(adapt_round).parameters)
    assert names == {
        "model", "images", "settings", "facts", "round", "seed", "checkpoint", "events",
        "batch_norm", "first",
    }  # fmt: skip


@pytest.fixture
def key(tmp_path):
    return load_or_create_signing_key(tmp_path / "key")


@pytest.fixture
def bundle(tmp_path, key):
    writer = BundleWriter(
        tmp_path / "bundle",
        name="source",
        kind="source",
        provenance=Provenance(
            data=DataProvenance(name="phantoms", digest="0" * 64, images=1, groups=1),
            settings="0" * 64,
        ),
    )
    state = {n: t.contiguous() for n, t in network().state_dict().items()}
    writer.add("segmenters/source.safetensors", save(state))
    writer.facts["segmentation"] = FACTS.model_dump(mode="json")
    return writer.sign(key)


@pytest.fixture
def unlabelled(tmp_path, key):
    """Settings of a site whose store has lost every mask and label, and whose files are gone."""
    data = write_dataset(tmp_path / "north", SCANNERS["riverside"], 12, 5, 32, 0.4)
    settings = SiteSettings(
        name="north",
        store=tmp_path / "store",
        data=SiteData(kind="table", path=data, test_fraction=0.4),
        coordinator_key=public_hex(key),
        threads=1,
        auto_approve=(public_hex(key),),
    )
    site = Site(settings)
    site.images("pool", SIZE)
    store = site.store
    store.catalogue([dataclasses.replace(row, label=None) for row in store.images()])
    store.remove("mask")
    shutil.rmtree(data)
    return settings


def install(enclave, bundle):
    def read(name):
        return np.frombuffer((bundle.folder / name).read_bytes(), dtype=np.uint8)

    blobs = {d: np.frombuffer(bundle.blob(d), dtype=np.uint8) for d in bundle.manifest.blobs}
    signed = {"manifest": read("manifest.json"), "signature": read("manifest.sig")}
    enclave.perform("train.install", request(actions.Install(**COMMON), **signed, blobs=blobs))


def ask(bundle, round=0, **values):
    return actions.TrainSegmenter(
        **COMMON,
        bundle=bundle.id,
        image_size=SIZE,
        branch="source",
        round=round,
        settings=chosen(**values),
    )


def test_a_site_without_a_label_adapts_a_branch_in_rounds(unlabelled, bundle):
    enclave = InProcessEnclave(unlabelled)
    install(enclave, bundle)
    first = enclave.perform("train.segmenter", request(ask(bundle, local_epochs=2)))
    store = Site(unlabelled).store
    assert store.annotations() == {} and not store.names("mask")
    assert first.config == {"examples": len(store.images("pool"))}
    assert set(first.metrics) == {"loss", "foreground", "kept"}
    weights = first.group("weights")
    assert weights.keys() == network().state_dict().keys()
    second = enclave.perform(
        "train.segmenter", request(ask(bundle, 1, local_epochs=2), weights=weights)
    )
    name = "heads.0.last.weight"
    assert not np.array_equal(second.group("weights")[name], weights[name])
    assert not list((unlabelled.store / "checkpoints").iterdir())


def test_a_site_holds_every_round_to_the_first_ones_start(unlabelled, bundle):
    enclave = InProcessEnclave(unlabelled)
    install(enclave, bundle)
    slid = {n: t.numpy() for n, t in all_background(network()).state_dict().items()}
    with pytest.raises(CollapseError, match=r"to 0.00% of the pixels"):
        enclave.perform("train.segmenter", request(ask(bundle, 1), weights=slid))


def test_strategies_of_a_chain_draw_differently(unlabelled, bundle):
    site = Site(unlabelled)
    enclave = InProcessEnclave(unlabelled)
    install(enclave, bundle)

    def trained(**values):
        parameters = ask(bundle).model_copy(update=values)
        return segmentation.train_segmenter(site, parameters, request(parameters)).digest()

    assert trained() == trained(earlier_rounds=0) != trained(earlier_rounds=2)


@pytest.mark.parametrize("count", [1, 4])
def test_means_over_few_images_stay(unlabelled, bundle, count):
    enclave = InProcessEnclave(unlabelled)
    install(enclave, bundle)
    store = Site(unlabelled).store
    store.catalogue(store.images("pool")[:count])
    reply = enclave.perform("train.segmenter", request(ask(bundle)))
    assert not reply.metrics
    assert reply.config == {"examples": count if count > 1 else 0}
    assert bool(reply.arrays) == (count > 1)


def test_a_repeated_or_interrupted_request_gives_the_first_reply(unlabelled, bundle, monkeypatch):
    enclave = InProcessEnclave(unlabelled)
    install(enclave, bundle)
    question = request(ask(bundle, local_epochs=2))
    folder = unlabelled.store / "checkpoints"

    def stopped(*arguments):
        def interrupt(event):
            if event["event"] == "progress" and event["epoch"] == 2:
                raise KeyboardInterrupt

        *rest, _, batch_norm, first = arguments
        return adapt_round(*rest, Events(listeners=[interrupt]), batch_norm, first)

    with monkeypatch.context() as patch:
        patch.setattr(segmentation, "adapt_round", stopped)
        with pytest.raises(KeyboardInterrupt):
            enclave.perform("train.segmenter", question)
    assert len(list(folder.iterdir())) == 1
    resumed = enclave.perform("train.segmenter", question)
    assert not list(folder.iterdir())
    direct = segmentation.train_segmenter(Site(unlabelled), ask(bundle, local_epochs=2), question)
    assert resumed.digest() == direct.digest()
    assert enclave.perform("train.segmenter", question).digest() == resumed.digest()


def test_a_collapse_at_a_site_leaves_no_checkpoint(unlabelled, bundle, monkeypatch):
    def collapsing(*arguments):
        adapt_round(*arguments)
        check_foreground(0.5, 0.0, (0.2, 0.8))

    enclave = InProcessEnclave(unlabelled)
    install(enclave, bundle)
    monkeypatch.setattr(segmentation, "adapt_round", collapsing)
    with pytest.raises(CollapseError):
        enclave.perform("train.segmenter", request(ask(bundle, local_epochs=2)))
    assert not list((unlabelled.store / "checkpoints").iterdir())
