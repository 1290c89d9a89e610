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
from sonofed_client.enclave.policy import SYNTHETIC_IMAGES, Policy, policy_text_of_all
from sonofed_client.settings import SiteData
from sonofed_common.contract import actions
from sonofed_common.contract.actions import request
from sonofed_common.contract.configuration import validate
from sonofed_common.contract.errors import ConfigurationError, DivergenceError, PolicyError
from sonofed_common.contract.records import to_bytes
from sonofed_common.contract.study import Selection, Study
from sonofed_common.contract.study_synthesis import Synthesis, WganTraining
from sonofed_common.synthesis.memorisation import MemorisationGate, dissimilarity
from sonofed_simulations.phantoms.dataset import write_dataset
from sonofed_simulations.phantoms.scanner import SCANNERS

SIZE = 16
GAN = WganTraining(steps=50, batch_size=8, width=16, learning_rate=2e-3, critic_steps=1)
WANTED = Synthesis(image_size=SIZE, per_class=6)
WHOLE_POOL = np.array([[2**63, 0]], dtype=np.uint64)


@pytest.fixture(scope="session")
def larger(tmp_path_factory):
    folder = tmp_path_factory.mktemp("larger") / "north"
    return write_dataset(folder, SCANNERS["riverside"], 60, 5, 64, 0.5)


@pytest.fixture
def sharing(site, larger, tmp_path):
    """A hospital whose policy lets synthetic images leave."""
    policy = tmp_path / "policy.toml"
    policy.write_text(policy_text_of_all())
    data = SiteData(kind="table", path=larger, test_fraction=0.3)
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
    assert len(secrets) > 6 * 60
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


def test_a_set_that_tells_who_was_trained_on_is_not_shared(sharing, bundle, monkeypatch):
    """Each image alone passes; all together they lie nearer to the training images."""

    def traces(images, labels, *_):
        class Tracer:
            def draw(self, batch):
                noise = torch.Generator().manual_seed(batch[0].number)
                own = [images[labels == one.label][one.number] for one in batch]
                return torch.stack(own) * 0.3 + 0.7 * torch.rand(
                    len(batch), 1, SIZE, SIZE, generator=noise
                )

        return Tracer()

    monkeypatch.setattr(synthesis, "train_drawing", traces)
    enclave = opened(sharing, bundle)
    assert draw(enclave, per_class=12).config["images"] > 0
    monkeypatch.setattr("sonofed_common.synthesis.synthetic.membership_auroc", lambda *_: 1.0)
    assert draw(enclave, per_class=11).config == {"images": 0}


def test_few_labels_train_no_gan(sharing, site, bundle, monkeypatch):
    monkeypatch.setattr(synthesis, "train_drawing", lambda *_: pytest.fail("a GAN was trained"))
    enclave = opened(sharing.model_copy(update={"data": site.data}), bundle)
    labels = list(labelled(enclave.site, COMMON["study"], 0).values())
    assert 0 < min(labels.count(0), labels.count(1)) < synthesis.FEWEST
    assert draw(enclave).config == {"images": 0}


def test_a_site_without_test_images_shares_nothing(sharing, bundle, monkeypatch):
    enclave = opened(sharing, bundle)
    images = enclave.site.images

    def without(part, size):
        rows, found = images(part, size)
        return ([], found[:0]) if part == "test" else (rows, found)

    monkeypatch.setattr(enclave.site, "images", without)
    assert draw(enclave).config == {"images": 0}


def test_a_repeated_request_gives_the_first_reply(sharing, bundle, monkeypatch):
    enclave = opened(sharing, bundle)
    first = to_bytes(draw(enclave))
    monkeypatch.setattr(synthesis, "train_drawing", lambda *_: pytest.fail("it was drawn again"))
    assert to_bytes(draw(InProcessEnclave(sharing))) == first


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
    with pytest.raises(DivergenceError, match=r"^wgan benign diverged in step \d+: a score"):
        draw(opened(sharing, bundle), wgan=gan)


def test_the_page_shows_the_rule_that_is_shipped():
    page = (Path(__file__).parents[3] / "docs" / "security.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```toml\n(\[actions\.\"train\.synthesise\"\].*?)```", page, re.S)
    assert SYNTHETIC_IMAGES.read_text().endswith(shown)


def test_the_rule_adds_nothing_but_its_action_to_the_standard_policy():
    both = tomllib.loads(policy_text_of_all())
    own = tomllib.loads(SYNTHETIC_IMAGES.read_text())
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
    ],
)
def test_a_study_that_would_not_replay_what_is_shared_is_refused(changes):
    values = {"name": "x", "cohort": {"sites": ["north"]}, "finetuning": {"replay": 0.5}}
    values |= {"phases": PHASES, "selection": {"strategy": "random"}}
    assert validate(Study, values, "study").synthesis.per_class == 50
    with pytest.raises(ConfigurationError, match="'synthesise' would do nothing"):
        validate(Study, values | changes, "study")


@pytest.mark.parametrize("values", [{"per_class": 0}, {"image_size": 48}])
def test_settings_out_of_range_are_refused(values):
    with pytest.raises(ConfigurationError):
        validate(Synthesis, values, "synthesis")
