from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sonofed_common.contract.errors import ConfigurationError, DivergenceError, SiteEmptyError
from sonofed_common.runtime import Events
from sonofed_common.training import Training, batches, fit

torch.set_num_threads(1)

SETTINGS = Training(epochs=4, learning_rate=1e-2, batch_size=5, seed=7, weight_decay=1e-3)


class InterruptedTrainingError(Exception):
    pass


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 2),
    )
    return model.to(memory_format=torch.channels_last)


def data(count=23):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 1, 12, 12, generator=generator)
    return images, (images.mean(dim=(1, 2, 3)) > 0.5).long()


def train(model, settings=SETTINGS, stop_after=None, **options):
    images, labels = data()
    calls = 0

    def loss_of_batch(indices):
        nonlocal calls
        if calls == stop_after:
            raise InterruptedTrainingError
        calls += 1
        return cross_entropy(model(images[indices]), labels[indices])

    return fit(model, len(images), loss_of_batch, settings, **options)


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("stop_after", [0, 3, 5, 8, 19])
def test_resume_gives_the_bits_of_an_uninterrupted_run(tmp_path, stop_after):
    whole = network()
    losses = train(whole)

    checkpoint = tmp_path / "run.safetensors"
    with pytest.raises(InterruptedTrainingError):
        train(network(), stop_after=stop_after, checkpoint=checkpoint)
    assert checkpoint.exists() == (stop_after >= 5)
    torch.manual_seed(12345)
    resumed = network()
    assert train(resumed, checkpoint=checkpoint) == losses
    assert same(whole, resumed)
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]

    again = network()
    assert train(again, checkpoint=checkpoint, stop_after=0) == losses
    assert same(whole, again)


def test_without_the_last_save_only_that_epoch_is_done_again(tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    losses = train(network(), checkpoint=checkpoint, saves_last=False)
    steps = 0

    def count(done, total):
        nonlocal steps
        steps += 1

    assert train(network(), checkpoint=checkpoint, after_step=count) == losses
    assert steps == 5
    train(network(), Training(1, 1e-2, 5, 7), checkpoint=tmp_path / "one", saves_last=False)
    assert not (tmp_path / "one").exists()


def test_a_checkpoint_of_another_run_or_a_torn_one_is_refused(tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    train(network(), checkpoint=checkpoint)
    other = Training(epochs=4, learning_rate=2e-2, batch_size=5, seed=7)
    with pytest.raises(ConfigurationError, match="other settings"):
        train(network(), other, checkpoint=checkpoint)
    other_network = nn.Sequential(network(), nn.Linear(2, 2))
    with pytest.raises(ConfigurationError, match="another network"):
        train(other_network, checkpoint=checkpoint)
    checkpoint.write_bytes(checkpoint.read_bytes()[:200])
    with pytest.raises(ConfigurationError, match="cannot be read"):
        train(network(), checkpoint=checkpoint)


def test_training_is_seeded_learns_and_leaves_the_callers_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    one, other = network(), network()
    torch.manual_seed(5)
    losses = train(one)
    assert torch.equal(torch.rand(3), expected)
    assert train(other) == losses
    assert same(one, other)
    longer = train(network(), Training(epochs=25, learning_rate=1e-2, batch_size=5, seed=7))
    assert longer[-1] < longer[0]


def test_rounds_follow_one_cosine():
    rounds = [Training(2, 0.1, 5, 0, first_epoch=2 * r, last_epoch=6) for r in range(3)]
    rates = [r.rate(r.first_epoch + e) for r in rounds for e in range(2)]
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([weight], 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    for rate in rates:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rounds[-1].rate(6) == pytest.approx(0)


def test_divergence_stops_training_and_leaves_the_last_good_checkpoint(tmp_path):
    model = network()
    checkpoint = tmp_path / "run.safetensors"
    images, labels = data()
    calls = 0

    def loss_of_batch(indices):
        nonlocal calls
        calls += 1
        loss = cross_entropy(model(images[indices]), labels[indices])
        return loss * math.nan if calls > 7 else loss

    with pytest.raises(DivergenceError, match="epoch 2"):
        fit(model, len(images), loss_of_batch, SETTINGS, checkpoint)
    whole, resumed = network(), network()
    train(whole)
    train(resumed, checkpoint=checkpoint)
    assert same(whole, resumed)


def test_weights_that_are_not_finite_are_divergence():
    model = nn.Linear(1, 1)

    def loss_of_batch(indices):
        return (model.weight.sum() * 0).sqrt()

    with pytest.raises(DivergenceError):
        fit(model, 2, loss_of_batch, Training(1, 0.1, 2, 0))


def test_no_image_is_a_clear_error():
    with pytest.raises(SiteEmptyError):
        fit(network(), 0, lambda i: torch.zeros(()), SETTINGS)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 11, 23])
def test_batches_hold_every_item_once_and_never_a_lone_one(count):
    parts = batches(count, 5, seed=3)
    assert sorted(torch.cat(parts).tolist()) == list(range(count))
    assert all(len(part) > 1 for part in parts) or count == 1
    assert len(parts[0]) <= 6


def test_only_the_named_parameters_are_trained_and_the_checkpoint_holds_all(tmp_path):
    images, labels = data()

    def pair():
        return nn.ModuleDict({"student": network(), "teacher": network()})

    def run(model, checkpoint=None, stop=None):
        seen = []

        def follow(step, total):
            seen.append((step, total))
            if step == stop:
                raise InterruptedTrainingError
            with torch.no_grad():
                parameters = zip(
                    model["teacher"].parameters(), model["student"].parameters(), strict=True
                )
                for slow, fast in parameters:
                    slow.lerp_(fast, 0.1)

        fit(
            model,
            len(images),
            lambda i: cross_entropy(model["student"](images[i]), labels[i]),
            SETTINGS,
            checkpoint,
            parameters=model["student"],
            after_step=follow,
        )
        return seen

    whole, resumed = pair(), pair()
    seen = run(whole)
    assert seen == [(step, 20) for step in range(1, 21)]
    assert not same(whole["student"], whole["teacher"])
    checkpoint = tmp_path / "pair.safetensors"
    with pytest.raises(InterruptedTrainingError):
        run(pair(), checkpoint, stop=12)
    run(resumed, checkpoint)
    assert same(whole, resumed)


def test_progress_reaches_the_end_and_epochs_are_announced():
    log = []
    epochs = []
    settings = Training(2, 1e-3, 5, 0, first_epoch=3, last_epoch=9)
    train(network(), settings, events=Events(listeners=[log.append]), before_epoch=epochs.append)
    assert epochs == [3, 4]
    assert np.all(np.diff([entry["done"] for entry in log]) > 0)
    assert (log[-1]["done"], log[-1]["total"]) == (10, 10)
