"""Synthetic images of a hospital's own GANs: what leaves, and what the gate and the policy hold."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from enclave_talk import COMMON, install, pooled, secrets_of
from policy_rules import STANDARD

from sonofed_client.enclave.enclave import InProcessEnclave
from sonofed_client.enclave.handlers import synthesis
from sonofed_client.enclave.handlers.selection import labelled
from sonofed_client.enclave.policy import SYNTHETIC_RULE, Policy, policy_text_of_all
from sonofed_client.settings import SiteData
from sonofed_common.contract import actions
from sonofed_common.contract.actions import request
from sonofed_common.contract.configuration import validate
from sonofed_common.contract.errors import (
    ConfigurationError,
    DivergenceError,
    ParameterError,
    PolicyError,
)
from sonofed_common.contract.records import to_bytes
from sonofed_common.contract.study import Selection, Study
from sonofed_common.contract.study_synthesis import Synthesis, WganTraining
from sonofed_common.synthesis.memorisation import MemorisationGate, dissimilarity
from sonofed_simulations.phantoms.dataset import write_dataset
from sonofed_simulations.phantoms.scanner import SCANNERS

SIZE = 16
GAN = WganTraining(steps=30, batch_size=8, width=16, learning_rate=2e-3, critic_steps=1)
WANTED = Synthesis(image_size=SIZE, per_class=6)
WHOLE_POOL = np.array([[2**63, 0]], dtype=np.uint64)


@pytest.fixture(scope="session")
def larger(tmp_path_factory):
    folder = tmp_path_factory.mktemp("larger") / "north"
    return write_dataset(folder, SCANNERS["riverside"], 90, 5, 64, 0.5)


@pytest.fixture
def sharing(site, larger, tmp_path):
    """A hospital whose policy lets synthetic images leave."""
    policy = tmp_path / "policy.toml"
    policy.write_text(policy_text_of_all())
    data = SiteData(kind="table", path=larger, test_fraction=0.35)
    return site.model_copy(update={"data": data, "policy": policy, "image_key": "0" * 64})


def opened(settings, bundle):
    """An enclave in which the whole pool is labelled."""
    enclave = InProcessEnclave(settings)
    install(enclave, bundle)
    scoring = actions.Score(
        **pooled(bundle),
        classifier="shufflenet_v2",
        pairs="augmentation",
        settings={},
        reconstruction={},
        selection=Selection(strategy="random", budgets=(1.0,)),
    )
    enclave.perform("train.score", request(scoring))
    marking = request(actions.Select(**COMMON, stage="mark"), cuts=WHOLE_POOL)
    enclave.perform("train.select", marking)
    return enclave


def draw(enclave, wgan=GAN, **changes):
    settings = WANTED.model_copy(update=changes)
    asked = actions.Synthesise(**COMMON, settings=settings, wgan=wgan)
    return enclave.perform("train.synthesise", request(asked))


def test_labelled_images_leave_that_are_no_copies_of_a_patients(sharing, bundle):
    enclave = opened(sharing, bundle)
    reply = draw(enclave)
    images, labels = reply.arrays["images"], reply.arrays["labels"]
    assert set(reply.arrays) == {"images", "labels"} and not reply.metrics
    assert reply.config == {"images": len(images)} and 2 <= len(images) <= 12
    assert images.dtype == np.uint8 and images.shape[1:] == (SIZE, SIZE)
    assert labels.dtype == np.int64 and set(labels) == {0, 1}
    rows, pool = enclave.site.images("pool", SIZE)
    shown = torch.from_numpy(images)[:, None].float() / 255
    limit = MemorisationGate(pool, [row.group for row in rows]).limit
    assert float(dissimilarity(shown, pool).amin()) >= limit - 1e-6
    (entry,) = (e for e in enclave.ledger.entries() if e["action"] == "train.synthesise")
    assert entry["outcome"] == "sent" and entry["rule"] == "actions.train.synthesise"
    assert entry["bytes"] >= images.nbytes + labels.nbytes


def test_no_name_patient_id_or_pixels_of_an_image_are_in_a_reply_or_a_log(sharing, bundle, caplog):
    caplog.set_level("DEBUG")
    sent = to_bytes(draw(opened(sharing, bundle)))
    secrets = secrets_of(sharing, SIZE)
    assert len(secrets) > 6 * 90
    assert not [secret for secret in secrets if secret in sent + caplog.text.encode()]


def test_without_the_rule_nothing_is_drawn_and_nothing_leaves(sharing, bundle, monkeypatch):
    enclave = opened(sharing.model_copy(update={"policy": None}), bundle)
    monkeypatch.setattr(synthesis, "train_drawing", lambda *_: pytest.fail("a GAN was trained"))
    with pytest.raises(PolicyError, match=r"does not allow train\.synthesise"):
        draw(enclave)
    (entry,) = (e for e in enclave.ledger.entries() if e["action"] == "train.synthesise")
    assert entry["outcome"] == "refused" and entry["bytes"] == 0


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"per_class": 1001}, "parameters.settings.per_class"),
        ({"image_size": 128}, "parameters.settings.image_size"),
    ],
)
def test_the_rule_bounds_number_and_size(sharing, bundle, changes, rule):
    with pytest.raises(PolicyError) as caught:
        draw(opened(sharing, bundle), **changes)
    assert caught.value.rule == f"actions.train.synthesise.{rule}"


def test_a_narrower_rule_holds_the_reply_back(sharing, bundle):
    values = tomllib.loads(policy_text_of_all())
    values["actions"]["train.synthesise"]["arrays"][0]["numbers"] = 2 * SIZE**2 - 1
    policy = Policy.model_validate(values)
    enclave = opened(sharing, bundle)
    enclave._wall._policy = policy
    with pytest.raises(PolicyError, match="images holds more numbers than the policy lets leave"):
        draw(enclave)


class Copier:
    """A generator that has memorised a training image of each class."""

    def __init__(self, images, labels):
        self.images = [images[labels == label][0] for label in (0, 1)]

    def draw(self, batch):
        return torch.stack([self.images[one.label] for one in batch])


def test_a_generator_that_memorised_shares_nothing_and_says_no_more(sharing, bundle, monkeypatch):
    monkeypatch.setattr(
        synthesis, "train_drawing", lambda images, labels, *_: Copier(images, labels)
    )
    reply = draw(opened(sharing, bundle))
    assert (reply.arrays, reply.config, reply.metrics) == ({}, {"images": 0}, {})


class Mixture:
    """Draws noise, and copies of training images where it is told to."""

    def __init__(self, images, copies):
        self.images, self.copies = images, copies

    def draw(self, batch):
        draws = [torch.Generator().manual_seed(one.seed_of("noise")) for one in batch]
        noise = [torch.rand(1, SIZE, SIZE, generator=g) for g in draws]
        return torch.stack(
            [self.images[0] if self.copies(one) else n for one, n in zip(batch, noise, strict=True)]
        )


@pytest.mark.parametrize(("copied", "shares"), [(0, True), (1, True), (4, False)])
def test_a_generator_that_mostly_shows_its_images_shares_none(
    sharing, bundle, monkeypatch, copied, shares
):
    def mixed(images, *_):
        return Mixture(images, lambda one: one.number < copied)

    monkeypatch.setattr(synthesis, "train_drawing", mixed)
    assert bool(draw(opened(sharing, bundle)).config["images"]) is shares


def test_a_set_that_tells_who_was_trained_on_is_not_shared(sharing, bundle, monkeypatch):
    told = "sonofed_common.synthesis.synthetic.membership_auroc"
    monkeypatch.setattr(synthesis, "train_drawing", lambda i, *_: Mixture(i, lambda _: False))
    enclave = opened(sharing, bundle)
    with monkeypatch.context() as patch:
        # Of one class alone: over all images it is no more than chance.
        patch.setattr(told, lambda members, *_: 1.0 if len(members) < 40 else 0.5)
        assert draw(enclave).config == {"images": 0}
    monkeypatch.setattr(told, lambda *_: 0.5)
    assert draw(enclave).config == {"images": 0}
    assert draw(opened(sharing.model_copy(update={"store": sharing.store / "b"}), bundle)).arrays


@pytest.mark.parametrize("fraction", [0.1, 0.8])
def test_few_images_to_train_on_or_to_test_by_train_no_gan(sharing, bundle, monkeypatch, fraction):
    """Labels of images that a new split took out of the pool do not count."""
    monkeypatch.setattr(synthesis, "train_drawing", lambda *_: pytest.fail("a GAN was trained"))
    data = sharing.data.model_copy(update={"test_fraction": fraction})
    enclave = opened(sharing, bundle)
    assert len(labelled(enclave.site, COMMON["study"], 0)) > 4 * synthesis.FEWEST
    other = InProcessEnclave(sharing.model_copy(update={"data": data}))
    assert draw(other).config == {"images": 0}


def test_the_gate_knows_every_labelled_image_and_its_patient(sharing, bundle, monkeypatch):
    seen = []

    def watched(drawing, training, held_out, *others, **named):
        seen.append((training, held_out))
        return synthesise(drawing, training, held_out, *others, **named)

    synthesise = synthesis.synthesise
    monkeypatch.setattr(synthesis, "synthesise", watched)
    enclave = opened(sharing, bundle)
    draw(enclave)
    for found, part in zip(seen[0], ("pool", "test"), strict=True):
        rows, images = enclave.site.images(part, SIZE)
        assert torch.equal(found.images, images)
        assert found.groups == [row.group for row in rows]
        assert found.labels.tolist() == [row.label for row in rows]


def test_a_study_gets_one_set_however_often_it_asks(sharing, bundle, monkeypatch):
    enclave = opened(sharing, bundle)
    everyone = labelled(enclave.site, COMMON["study"], 0)
    fewer = dict(list(everyone.items())[:-4])
    monkeypatch.setattr(synthesis, "labelled", lambda *_: fewer)
    first = to_bytes(draw(enclave))
    monkeypatch.setattr(synthesis, "train_drawing", lambda *_: pytest.fail("it was drawn again"))
    monkeypatch.setattr(synthesis, "labelled", lambda *_: everyone)
    assert to_bytes(draw(InProcessEnclave(sharing))) == first
    with pytest.raises(ParameterError, match="has its synthetic images of this site"):
        draw(enclave, per_class=5)


def test_what_was_refused_is_drawn_again_with_other_labels_only(sharing, bundle, monkeypatch):
    trained = []

    def copied(images, labels, *_):
        trained.append(len(labels))
        return Copier(images, labels)

    monkeypatch.setattr(synthesis, "train_drawing", copied)
    enclave = opened(sharing, bundle)
    everyone = labelled(enclave.site, COMMON["study"], 0)
    for labels in (everyone, everyone, dict(list(everyone.items())[:-4])):
        monkeypatch.setattr(synthesis, "labelled", lambda *_, found=labels: found)
        assert draw(enclave).config == {"images": 0}
    assert trained == [len(everyone), len(everyone) - 4]


@pytest.mark.parametrize("task", ["wgan malignant", "synthetic images"])
def test_an_interrupted_drawing_trains_no_class_twice(sharing, bundle, tmp_path, task):
    whole = to_bytes(draw(opened(sharing.model_copy(update={"store": tmp_path / "w"}), bundle)))
    enclave = opened(sharing, bundle)

    def interrupt(event):
        if event.get("task") == task:
            raise KeyboardInterrupt

    enclave.site.events.listeners.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        draw(enclave)
    assert list((enclave.site.store.folder / "checkpoints").iterdir())
    again, seen = InProcessEnclave(sharing), []
    again.site.events.listeners.append(seen.append)
    assert to_bytes(draw(again)) == whole
    assert not any(event.get("task") == "wgan benign" for event in seen)
    assert not list((enclave.site.store.folder / "checkpoints").iterdir())


def test_a_diverging_gan_is_told_without_a_word_of_the_images(sharing, bundle):
    gan = GAN.model_copy(update={"learning_rate": 1e30})
    with pytest.raises(DivergenceError, match=r"^training of a GAN diverged in step \d+: a score"):
        draw(opened(sharing, bundle), wgan=gan)


def test_the_page_shows_the_rule_that_is_shipped():
    page = (Path(__file__).parents[3] / "docs" / "security.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```toml\n(\[actions\.\"train\.synthesise\"\].*?)```", page, re.S)
    assert SYNTHETIC_RULE.read_text().endswith(shown)


def test_the_rule_adds_nothing_but_its_action_to_the_standard_policy():
    both = tomllib.loads(policy_text_of_all())
    own = tomllib.loads(SYNTHETIC_RULE.read_text())
    assert set(own) == {"actions"} and set(own["actions"]) == {"train.synthesise"}
    del both["actions"]["train.synthesise"]
    assert json.loads(Policy.model_validate(both).model_dump_json()) == json.loads(
        STANDARD.model_dump_json()
    )


PHASES = ["enrol", "ship", "select", "annotate", "synthesise", "classifier"]


@pytest.mark.parametrize(
    "changes",
    [
        {"finetuning": {"replay": 0.0}},
        {"phases": PHASES[:-1]},
        {"phases": [*PHASES[:-2], "classifier", "synthesise"]},
        {"selection": {"strategy": "random", "budgets": [0.1, 0.2]}},
    ],
)
def test_a_study_that_would_not_replay_what_is_shared_is_refused(changes):
    values = {"name": "x", "cohort": {"sites": ["north"]}, "finetuning": {"replay": 0.5}}
    values |= {"phases": PHASES, "selection": {"strategy": "random"}}
    assert validate(Study, values, "study").synthesis.per_class == 50
    with pytest.raises(ConfigurationError, match=r"'synthesise' (would do nothing|learns)"):
        validate(Study, values | changes, "study")


@pytest.mark.parametrize("values", [{"per_class": 0}, {"image_size": 48}])
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(ConfigurationError):
        validate(Synthesis, values, "synthesis")
