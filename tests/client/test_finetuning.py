from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sonofed_client.adaptation.evaluation import evaluate, predict
from sonofed_client.adaptation.finetuning import draw_replay, finetune_round
from sonofed_common.batch_norm import adapt_batch_norm, statistics_of
from sonofed_common.contract.study import Finetuning
from sonofed_common.data.augmentation import Augmentation
from sonofed_common.runtime import derive_seed
from sonofed_common.training import Training, fit

torch.set_num_threads(1)

SETTINGS = Finetuning(rounds=2, local_epochs=3, learning_rate=1e-2, batch_size=4)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, bias=False),
        nn.BatchNorm2d(4, momentum=0.01),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


def images(count, seed=1, scale=1.0, size=16):
    return scale * torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(seed))


def bright(count):
    x = images(count)
    labels = torch.arange(count) % 2
    x[labels == 1] = x[labels == 1] * 0.3 + 0.6
    return x, labels


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_mixed_statistics_are_the_mean_of_the_priors_and_the_sites():
    model, own = network().eval(), network().eval()
    adapt_batch_norm(model, images(40, seed=3, scale=2.0))
    prior = statistics_of(model)
    site = images(70, scale=0.4)
    adapt_batch_norm(own, site)
    for _ in range(2):
        adapt_batch_norm(model, site, prior=prior)
        for name, alone in statistics_of(own).items():
            assert torch.allclose(statistics_of(model)[name], (alone + prior[name]) / 2)


def test_batch_norm_takes_the_statistics_of_the_site():
    model = network().eval()
    site = images(70, scale=0.4)
    adapt_batch_norm(model, site, batch_size=100)
    maps = model[0](site)
    assert torch.allclose(model[1].running_mean, maps.mean(dim=(0, 2, 3)), atol=1e-6)
    assert torch.allclose(model[1].running_var, maps.var(dim=(0, 2, 3)), rtol=1e-4)
    assert model[1].momentum == 0.01
    assert not any(module.training for module in model.modules())


def test_batch_norm_adaptation_keeps_weights_and_modes_and_is_deterministic():
    model = network().train()
    model[3].eval()
    before = copy.deepcopy(model)
    other = copy.deepcopy(model)
    adapt_batch_norm(model, images(33), batch_size=8)
    adapt_batch_norm(other, images(33), batch_size=8)
    assert same(model, other)
    for weight, old in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(weight, old)
        assert weight.grad is None
    modes = [module.training for module in before.modules()]
    assert [module.training for module in model.modules()] == modes


def test_sorted_images_give_the_variance_of_the_whole_site():
    model = network()
    dark, light = images(32, scale=0.2), images(32, seed=2, scale=0.2) + 0.8
    site = torch.cat([dark, light])
    adapt_batch_norm(model, site, batch_size=16)
    maps = model[0](site)
    assert torch.allclose(model[1].running_var, maps.var(dim=(0, 2, 3)), rtol=0.02)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_images_leave_the_statistics_alone(count):
    model = network()
    before = copy.deepcopy(model)
    adapt_batch_norm(model, images(count))
    assert same(model, before)


def test_finetuning_learns_and_is_seeded():
    x, labels = bright(24)
    model, again, other = network(), network(), network()
    settings = Finetuning(rounds=1, local_epochs=30, learning_rate=3e-2, batch_size=4)
    reply = finetune_round(model, x, labels, settings, 0, seed=3)
    assert finetune_round(again, x, labels, settings, 0, seed=3) == reply
    finetune_round(other, x, labels, settings, 0, seed=4)
    assert same(model, again)
    assert not same(model, other)
    assert reply["examples"] == 24
    adapt_batch_norm(model, x)
    assert evaluate(model, x, labels, [str(i) for i in range(24)], None, 0, 0)["auroc"] > 0.95


def test_a_site_without_labels_trains_nothing():
    model = network()
    before = copy.deepcopy(model)
    reply = finetune_round(model, images(0), torch.empty(0), SETTINGS, 0, 0)
    assert reply == {"examples": 0.0}
    assert same(model, before)


def test_a_site_with_one_label_trains_its_weights_and_keeps_its_statistics():
    model = network()
    before = copy.deepcopy(model)
    reply = finetune_round(model, images(1), torch.tensor([1]), SETTINGS, 0, 0)
    assert reply["examples"] == 1 and math.isfinite(reply["loss"])
    assert torch.equal(model[1].running_mean, before[1].running_mean)
    assert not torch.equal(model[6].weight, before[6].weight)
    assert model[1].training


@pytest.mark.parametrize("count", [2, 5, 9])
def test_one_class_only_trains(count):
    reply = finetune_round(
        network(), images(count), torch.ones(count, dtype=torch.long), SETTINGS, 1, 0
    )
    assert reply["examples"] == count and math.isfinite(reply["loss"])


def test_balanced_loss_weighs_both_classes_alike():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return self.logits.expand(len(x), 2)

    labels = torch.tensor([0] * 9 + [1] * 3)
    settings = {"rounds": 1, "local_epochs": 200, "learning_rate": 0.05, "batch_size": 12}
    balanced, plain = Constant(), Constant()
    finetune_round(balanced, images(12), labels, Finetuning(**settings), 0, 0)
    finetune_round(plain, images(12), labels, Finetuning(**settings, balanced=False), 0, 0)
    assert torch.softmax(balanced.logits, 0)[1].item() == pytest.approx(0.5, abs=0.01)
    assert torch.softmax(plain.logits, 0)[1].item() == pytest.approx(0.25, abs=0.02)


def test_without_replay_training_is_that_of_the_labelled_images_alone():
    x, labels = bright(10)
    plain, none, empty = network(), network(), network()
    augmentation = Augmentation(0)

    def renew(epoch):
        nonlocal augmentation
        augmentation = Augmentation(derive_seed(5, "augmentation", epoch))

    def loss(indices):
        return nn.functional.cross_entropy(plain(augmentation(x[indices])), labels[indices])

    training = Training(3, 1e-2, 4, 5, first_epoch=0, last_epoch=6)
    expected = fit(plain, 10, loss, training, before_epoch=renew)
    settings = SETTINGS.model_copy(update={"balanced": False})
    reply = finetune_round(none, x, labels, settings, 0, seed=5)
    nothing = images(0), torch.empty(0, dtype=torch.long)
    assert reply == finetune_round(empty, x, labels, settings, 0, seed=5, replay=nothing)
    assert same(plain, none) and same(plain, empty)
    assert reply["loss"] == pytest.approx(expected[-1])


def test_replay_teaches_a_class_that_the_site_lacks_and_is_not_counted():
    x, labels = bright(24)
    light = labels == 1
    settings = Finetuning(rounds=1, local_epochs=30, learning_rate=3e-2, batch_size=4)
    model = network()
    replay = (x[light], labels[light])
    reply = finetune_round(model, x[~light], labels[~light], settings, 0, 3, replay=replay)
    assert reply["examples"] == 12
    adapt_batch_norm(model, x)
    assert evaluate(model, x, labels, [str(i) for i in range(24)], None, 0, 0)["auroc"] > 0.95


@pytest.mark.parametrize("count", [1, 2, 9])
def test_replay_leaves_the_statistics_to_the_sites_own_images(count):
    """With weights that cannot move, the statistics depend on the images alone."""
    x, labels = images(count), torch.arange(count) % 2
    settings = SETTINGS.model_copy(update={"learning_rate": 1e-30})
    alone, replaying = network(), network()
    finetune_round(alone, x, labels, settings, 0, 0)
    replay = (images(20, seed=7, scale=0.1), torch.arange(20) % 2)
    finetune_round(replaying, x, labels, settings, 0, 0, replay=replay)
    assert torch.equal(alone[1].running_mean, replaying[1].running_mean)
    assert torch.equal(alone[1].running_var, replaying[1].running_var)
    assert replaying[1].num_batches_tracked == alone[1].num_batches_tracked


def test_each_epoch_shows_every_replayed_image_once():
    class Watching(nn.Module):
        """Counts the images that pass while its normalisation is not in training."""

        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.BatchNorm2d(1), nn.Linear(1, 2)
            self.passed = {True: 0, False: 0}

        def forward(self, x):
            self.passed[self.norm.training] += len(x)
            return self.linear(self.norm(x).mean((2, 3)))

    model = Watching()
    replay = (images(7, seed=2), torch.arange(7) % 2)
    finetune_round(model, images(9), torch.arange(9) % 2, SETTINGS, 0, 0, replay=replay)
    assert model.passed == {True: 3 * 9, False: 3 * 7}


@given(
    counts=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    count=st.integers(0, 30),
    seed=st.integers(0, 99),
)
def test_replay_draws_classes_alike_and_repeats_images_last(counts, count, seed):
    labels = torch.tensor([0] * counts[0] + [1] * counts[1])
    drawn = draw_replay(labels, count, seed)
    assert len(drawn) == count
    assert torch.equal(drawn, draw_replay(labels, count, seed))
    per_class = torch.bincount(labels[drawn], minlength=2).tolist()
    assert abs(per_class[0] - per_class[1]) <= 1 and sum(per_class) == count
    times = torch.bincount(drawn, minlength=len(labels))
    for label in (0, 1):
        assert times[labels == label].max() - times[labels == label].min() <= 1


def test_odd_draws_favour_neither_class():
    labels = torch.tensor([0, 0, 1, 1])
    ones = [int(labels[draw_replay(labels, 1, seed)].item()) for seed in range(60)]
    assert 15 < sum(ones) < 45


def test_prediction_is_the_softmax_in_evaluation_mode_whatever_the_batches():
    model = network().train()
    x = images(10)
    p = predict(model, x, batch_size=3)
    assert model.training
    model.eval()
    expected = torch.softmax(model(x), dim=1)[:, 1].detach().numpy()
    np.testing.assert_allclose(p, expected, atol=1e-6)
    assert predict(model, x[:0]).shape == (0,)


def test_evaluation_reports_intervals_and_survives_one_class_and_no_image():
    x, labels = bright(12)
    groups = [str(i // 2) for i in range(12)]
    report = evaluate(network(), x, labels.numpy(), groups, 0.5, replicates=50, seed=0)
    assert report["images"] == 12
    assert report["accuracy_low"] <= report["accuracy"] <= report["accuracy_high"]
    one = evaluate(network(), x, np.zeros(12), groups, 0.5, replicates=50, seed=0)
    assert math.isnan(one["auroc"]) and math.isnan(one["auroc_low"])
    assert evaluate(network(), x[:0], [], [], None, replicates=5, seed=0)["images"] == 0
    assert "auroc_low" not in evaluate(network(), x, labels, groups, None, replicates=0, seed=0)
