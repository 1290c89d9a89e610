from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import one_hot

from sonofed_client.adaptation.source_free.apl import (
    APL,
    certainty,
    inconsistency,
    over_class_mean,
    prior_divergence,
)
from sonofed_client.adaptation.source_free.cbst import CBST
from sonofed_client.adaptation.source_free.dpl import DPL, near_own_prototype, penultimate
from sonofed_client.adaptation.source_free.mrnet import rectified
from sonofed_client.adaptation.source_free.self_training import entropy
from sonofed_client.adaptation.source_free.tent import Tent
from sonofed_client.adaptation.source_free.threshold import Threshold
from sonofed_client.adaptation.source_free.upl_sfda import UPLSFDA, perturbed
from sonofed_client.adaptation.source_free.views import Views
from sonofed_common.contract.segmentation import SegmentationFacts
from sonofed_common.contract.study_segmentation import PseudoLabels
from sonofed_common.models.segmenter import build_segmenter

torch.set_num_threads(1)
CLASSES, SIZE = 3, 32
FACTS = SegmentationFacts(
    encoder="unet",
    classes=CLASSES,
    heads=("unet", "aspp"),
    class_ratio=(0.8, 0.15, 0.05),
    foreground_range=(0.0, 1.0),
    flips=True,
)


def draw(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def softmaxes(seed, classes=CLASSES, count=2, size=4, sharpness=6.0):
    logits = sharpness * draw(2, count, classes, size, size, seed=seed)
    return logits.softmax(dim=2)


@pytest.fixture(scope="module")
def model():
    return build_segmenter("unet", CLASSES, SIZE, pretrained=False)


@pytest.fixture
def batch():
    return draw(2, 1, SIZE, SIZE), draw(2, SIZE, SIZE, seed=1).mul(CLASSES).long()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 5))
def test_without_relevance_the_loss_is_one_minus_the_scalar_product(seed, classes):
    main, auxiliary = softmaxes(seed, classes)
    expected = np.mean(1 - np.einsum("bchw,bchw->bhw", main.numpy(), auxiliary.numpy()))
    assert inconsistency(main, auxiliary).item() == pytest.approx(expected, abs=1e-6)


def brute_force(main, auxiliary, relevance):
    main, auxiliary = main.double().numpy(), auxiliary.double().numpy()
    count, classes, height, width = main.shape
    total = 0.0
    for b in range(count):
        histogram = np.zeros((classes, classes))
        for y in range(height):
            for x in range(width):
                histogram[main[b, :, y, x].argmax(), auxiliary[b, :, y, x].argmax()] += 1
        if relevance == "count":
            w = histogram / (height * width)
        elif relevance == "inverse":
            w = 1 / (histogram + 1)
            w = w * classes**2 / w.sum()
        else:
            w = np.ones((classes, classes))
        for y in range(height):
            for x in range(width):
                r = w * np.outer(main[b, :, y, x], auxiliary[b, :, y, x])
                total += (r.sum() - np.trace(r)) / (height * width * count)
    return total


@pytest.mark.parametrize("relevance", ["none", "count", "inverse"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_consistency_loss_is_its_definition(relevance, seed):
    main, auxiliary = softmaxes(seed)
    expected = brute_force(main, auxiliary, relevance)
    assert inconsistency(main, auxiliary, relevance).item() == pytest.approx(expected, rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 500))
def test_certainty_and_its_ratio_lie_between_0_and_1(seed, sharpness):
    p = softmaxes(seed, sharpness=sharpness)[0]
    omega = certainty(p)
    ordered = np.sort(p.numpy(), axis=1)
    assert np.allclose(omega, ordered[:, -1] - ordered[:, -2])
    for values in (omega, over_class_mean(p.argmax(1), omega, CLASSES)):
        assert values.min() >= 0 and values.max() <= 1 and values.isfinite().all()


def test_an_average_pixel_of_a_small_unsure_class_weighs_as_much_as_background():
    labels = torch.tensor([[[0, 0, 1, 1]]])
    weights = over_class_mean(labels, torch.tensor([[[0.9, 0.9, 0.1, 0.3]]]), CLASSES)
    assert torch.allclose(weights, torch.tensor([[[1, 1, 0.5, 1]]]))


@pytest.mark.parametrize(
    ("class_mean", "expected"), [(True, [1, 1 / 2, 1, 2 / 3]), (False, [0.9, 0.3, 0.4, 0.2])]
)
def test_apl_weighs_by_certainty_over_its_mean_in_the_class_or_by_certainty_alone(
    class_mean, expected
):
    # The mean of class 0 is 0.6, of class 1 it is 0.3.
    labels = torch.tensor([[[0, 0]], [[1, 1]]])
    confidence = torch.tensor([[[0.9, 0.3]], [[0.4, 0.2]]])
    strategy = APL(PseudoLabels(class_mean_confidence=class_mean), FACTS)
    assert strategy.weigh(labels, confidence).flatten().tolist() == pytest.approx(expected)


def test_the_prior_is_zero_at_the_expected_shares_and_grows_as_a_class_vanishes():
    expected = torch.tensor([[0.9, 0.1]])
    found = [
        prior_divergence(torch.tensor([[1 - e, e]]), expected).item() for e in (0.1, 0.01, 0.0)
    ]
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[0] < found[1] < found[2]
    both = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]])
    shares = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]])
    reference = scipy.stats.entropy(both.numpy(), shares.numpy(), axis=1).mean()
    assert prior_divergence(shares, both).item() == pytest.approx(reference, abs=1e-6)


def test_the_prior_holds_each_image_to_its_own_label_or_all_to_the_source():
    facts = FACTS.model_copy(update={"class_ratio": (0.5, 0.5), "classes": 2})
    logits = torch.zeros(2, 2, 4, 4)
    logits[0, 0], logits[1, 1] = 7, 7
    own = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)]).long()

    def loss(shares, labels):
        strategy = APL(PseudoLabels(class_prior=1.0, prior_shares=shares), facts)
        return strategy._prior(logits, logits, labels).item()

    assert loss("labels", own) < 0.01 < 1 < loss("labels", own.flip(0))
    assert loss("source", own) == pytest.approx(0, abs=1e-6)


def test_labels_are_of_an_image_and_its_mirror_alike(model, batch):
    images, _ = batch
    model.eval()
    strategy = APL(PseudoLabels(), FACTS)
    with torch.no_grad():
        labels, confidence = strategy.judge(model, images)
        mirrored, same = strategy.judge(model, images.flip(-1))
    assert torch.equal(labels, mirrored.flip(-1))
    assert torch.allclose(confidence, same.flip(-1), atol=1e-6)


def test_without_flips_labels_are_of_the_image_alone(model, batch):
    images, _ = batch
    model.eval()
    with torch.no_grad():
        p = model.probabilities(images)
        sided = FACTS.model_copy(update={"flips": False})
        _, confidence = APL(PseudoLabels(), sided).judge(model, images)
        assert torch.equal(confidence, certainty(p))
        assert not torch.equal(confidence, APL(PseudoLabels(), FACTS).judge(model, images)[1])


def gradients(module):
    return [p.grad for p in module.parameters() if p.grad is not None and bool(p.grad.any())]


@pytest.mark.parametrize("consistency", [True, False])
def test_each_loss_reaches_its_part_only(model, batch, consistency):
    chosen = PseudoLabels(
        consistency=consistency, self_training=not consistency, disagreement=float(consistency)
    )
    model.zero_grad()
    images, labels = batch
    APL(chosen, FACTS).loss(model, images, labels, torch.ones_like(images[:, 0])).backward()
    reached, spared = model.heads, model.encoder
    if not consistency:
        reached, spared = spared, reached
    assert gradients(reached)
    assert not gradients(spared)


def test_disagreement_adds_half_the_sum_of_both_divergences(model, batch):
    images, labels = batch
    model.eval()

    def loss(weight):
        settings = PseudoLabels(
            consistency=True, self_training=False, class_prior=0.0, disagreement=weight
        )
        with torch.no_grad():
            found = APL(settings, FACTS).loss(model, images, labels, torch.ones(2, SIZE, SIZE))
        return found.item()

    with torch.no_grad():
        p, q = (logits.softmax(1).double().numpy() for logits in model(images))
    both = scipy.stats.entropy(p, q, axis=1) + scipy.stats.entropy(q, p, axis=1)
    assert loss(3.0) - loss(0.0) == pytest.approx(1.5 * both.mean(), rel=1e-3)
    assert both.mean() > 1e-3


def test_the_loss_of_upl_is_of_its_votes_its_auxiliary_head_and_their_entropy(model, batch):
    images, labels = batch
    weights = draw(2, SIZE, SIZE, seed=2).round()
    model.eval()
    strategy = UPLSFDA(PseudoLabels(strategy="upl_sfda", perturbed_heads=3), FACTS)
    with torch.no_grad():
        torch.manual_seed(0)
        found = strategy.loss(model, images, labels, weights).item()
        torch.manual_seed(0)
        maps = model.encoder(images)
        votes = [model.decode([perturbed(m) for m in maps], SIZE)[0] for _ in range(3)]
        auxiliary = model.decode(maps, SIZE)[1]
    true = np.eye(CLASSES)[labels.numpy()].transpose(0, 3, 1, 2)

    def learned(logits):
        p = logits.softmax(1).double().numpy()
        return (-np.log((p * true).sum(1)) * weights.numpy()).mean()

    mean = np.mean([vote.softmax(1).double().numpy() for vote in votes], axis=0)
    expected = (np.mean([learned(vote) for vote in votes]) + learned(auxiliary)) / 2
    expected += scipy.stats.entropy(mean, axis=1).mean()
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "switches",
    [{"self_training": False}, {"consistency": False}, {}],
    ids=["L_con", "L_ssl", "both"],
)
@pytest.mark.parametrize("prior", [0.0, 10.0])
def test_apl_is_its_definition_with_the_prior_beside_each_loss(batch, switches, prior):
    images, labels = batch
    # Mostly of one class, which a random network does not expect.
    labels = torch.where(draw(2, SIZE, SIZE, seed=3) < 0.8, 0, labels)
    weights = draw(2, SIZE, SIZE, seed=2)
    chosen = PseudoLabels(**{"consistency": True, "class_prior": prior, **switches})
    network = build_segmenter("unet", CLASSES, SIZE, pretrained=False).eval()
    p, q = (logits.softmax(dim=1) for logits in network(images))
    true = one_hot(labels, CLASSES).movedim(-1, 1).float()
    wanted, shares = true.mean(dim=(2, 3)), ((p + q) / 2).mean(dim=(2, 3))
    beside = prior * (wanted * (wanted / shares).log()).sum(dim=1).mean()
    l_con = 1 - (p * q).sum(dim=1).mean() + beside
    errors = [-(head * true).sum(dim=1).log() for head in (p, q)]
    l_ssl = (weights * sum(errors) / 2).mean() + beside
    assert prior == 0 or beside > l_ssl / 2
    found = APL(chosen, FACTS).loss(network, images, labels, weights)
    found.backward()
    whole = 0.0
    for switch, loss, part in (
        (chosen.consistency, l_con, network.heads),
        (chosen.self_training, l_ssl, network.encoder),
    ):
        parameters = list(part.parameters())
        if not switch:
            assert all(parameter.grad is None for parameter in parameters)
            continue
        whole += loss.item()
        expected = torch.autograd.grad(loss, parameters, retain_graph=True)
        for parameter, gradient in zip(parameters, expected, strict=True):
            assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
    assert found.item() == pytest.approx(whole, rel=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 1))
def test_cbst_keeps_the_surest_share_of_each_class(seed, share):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, (2, 8, 8))
    confidence = generator.random((2, 8, 8)).astype(np.float32)
    kept = CBST(PseudoLabels(strategy="cbst", quantile=share), FACTS).weigh(
        torch.from_numpy(labels), torch.from_numpy(confidence)
    )
    for c in range(CLASSES):
        mine = np.sort(confidence[labels == c])[::-1]
        count = len(mine) - math.floor((1 - share) * (len(mine) - 1))
        assert set(confidence[(labels == c) & (kept.numpy() == 1)]) == set(mine[:count])


def test_the_threshold_itself_is_kept():
    weights = Threshold(PseudoLabels(threshold=0.75), FACTS).weigh(
        torch.zeros(1, 1, 3), torch.tensor([[[0.7, 0.75, 0.8]]])
    )
    assert weights.tolist() == [[[0, 1, 1]]]


def test_the_rectified_loss_by_hand():
    p, q = np.array([0.7, 0.3]), np.array([0.4, 0.6])
    v = float((p * np.log(p / q)).sum())
    expected = (-np.log(0.3) - np.log(0.6)) / 2 * math.exp(-v) + v
    main, auxiliary = (torch.tensor(np.log(x)).view(1, 2, 1, 1) for x in (p, q))
    label = torch.ones(1, 1, 1, dtype=torch.long)
    found = rectified(main, auxiliary, label, torch.ones(1, 1, 1))
    assert found.item() == pytest.approx(expected)


def test_entropy_is_that_of_the_definition_and_has_a_gradient_at_certainty():
    p = torch.tensor([[0.5, 1.0], [0.5, 0.0]]).t().reshape(2, 2, 1, 1).requires_grad_()
    found = entropy(p)
    assert found.flatten().tolist() == pytest.approx([math.log(2), 0])
    found.sum().backward()
    assert p.grad.isfinite().all()


def test_tent_trains_scales_and_shifts_only(model):
    chosen = {id(p) for p in Tent(PseudoLabels(strategy="tent"), FACTS).trained(model)}
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert chosen == {id(p) for m in norms for p in (m.weight, m.bias)}


def test_tent_predicts_without_dropout_and_by_the_batch(model):
    images = draw(4, 1, SIZE, SIZE)
    unused = torch.zeros(4, SIZE, SIZE)
    with torch.no_grad():
        found = [
            Tent(PseudoLabels(strategy="tent"), FACTS)
            .loss(copy.deepcopy(model).train(), images, unused.long(), unused)
            .item()
            for _ in range(2)
        ]
        norms = copy.deepcopy(model).eval()
        for module in norms.modules():
            module.training = isinstance(module, nn.BatchNorm2d)
        expected = entropy(norms.probabilities(images)).mean().item()
    assert found == [expected, expected]


def test_prototypes_by_hand():
    features = torch.tensor([0.0, 0.1, 0.8, 1.0, 1.1]).view(1, 1, 1, 5)
    labels = torch.tensor([[[0, 0, 0, 1, 1]]])
    weights = torch.tensor([[[1.0, 1.0, 0.0, 1.0, 1.0]]])
    assert near_own_prototype(features, labels, weights, 3).tolist() == [[[1, 1, 0, 1, 1]]]
    weights[labels == 1] = 0
    assert near_own_prototype(features, labels, weights, 3).tolist() == [[[1, 1, 1, 0, 0]]]


def near(features, labels, weights):
    """Whether a pixel's own class has the nearest mean of weighted features: by its definition."""
    vectors = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1]).double().numpy()
    labels, weights = labels.ravel(), weights.ravel().astype(np.float64)
    prototypes = [
        np.average(vectors[labels == c], axis=0, weights=weights[labels == c])
        for c in range(CLASSES)
    ]
    distances = np.stack([((vectors - mean) ** 2).sum(1) for mean in prototypes])
    return distances.argmin(0) == labels


def test_dpl_keeps_what_is_sure_stable_and_near_the_prototype_of_the_stable(model):
    x = draw(2, 1, SIZE, SIZE)
    threshold = 0.45
    teacher = copy.deepcopy(model).eval()
    with torch.no_grad():
        # A random network is unsure of one class everywhere; this one is of three, and varies.
        for head, logits in zip(teacher.heads, teacher(x), strict=True):
            layer = head.last if hasattr(head, "last") else head.pyramid[0]
            layer.bias -= logits.mean(dim=(0, 2, 3))
            layer.weight *= 200
            layer.bias *= 200
        strategy = DPL(PseudoLabels(strategy="dpl", threshold=threshold, passes=4), FACTS)
        torch.manual_seed(0)
        label, kept = strategy.judge(teacher, x)
        assert not any(m.training for m in teacher.modules())
        torch.manual_seed(0)
        maps = teacher.encoder(x)
        for module in teacher.modules():
            module.training = isinstance(module, nn.Dropout2d)
        passes = []
        for _ in range(4):
            main, auxiliary = teacher.decode(maps, SIZE)
            passes.append(((main.softmax(1) + auxiliary.softmax(1)) / 2).numpy())
        teacher.eval()
        features = penultimate(teacher, maps, SIZE)
    assert features.shape == (2, 16, SIZE, SIZE)
    passes = np.stack(passes)
    expected = passes.mean(0).argmax(1)
    assert np.array_equal(label, expected)
    probability = passes.mean(0).max(1)
    stable = np.take_along_axis(passes.std(0), expected[:, None], 1)[:, 0] < 0.05
    typical, sure = near(features, expected, stable * probability), probability > threshold
    typical = typical.reshape(stable.shape)
    assert np.array_equal(kept.numpy(), stable & typical & sure)
    # Each test drops pixels here that the other two keep, and unstable ones move the prototypes.
    loose = near(features, expected, probability).reshape(stable.shape)
    for other in (typical & sure, stable & sure, stable & typical, stable & loose & sure):
        assert not np.array_equal(kept.numpy(), other)


def test_dpl_keeps_nothing_below_its_threshold(model):
    strategy = DPL(PseudoLabels(strategy="dpl", threshold=0.999999), FACTS)
    with torch.no_grad():
        assert not strategy.judge(model.eval(), draw(2, 1, SIZE, SIZE))[1].any()


def test_the_least_probability_is_each_papers():
    usual = {
        s: PseudoLabels(strategy=s).least_probability for s in ("threshold", "dpl", "upl_sfda")
    }
    assert usual == {"threshold": 0.9, "dpl": 0.75, "upl_sfda": 0.9}
    assert PseudoLabels(strategy="dpl", threshold=0.9).least_probability == 0.9


def test_dpl_judges_by_its_own_threshold(model):
    steady = copy.deepcopy(model).eval()
    for module in steady.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    x = draw(2, 1, SIZE, SIZE)
    with torch.no_grad():
        for head in steady.heads:
            layer = head.last if hasattr(head, "last") else head.pyramid[0]
            # Three classes, of which the first has about .82 everywhere.
            layer.bias += torch.tensor([2.2, 0.0, 0.0])
        p = steady.probabilities(x)[:, 0]
        assert p.min() > 0.75 and p.max() < 0.9
        usual, own = PseudoLabels(strategy="dpl"), PseudoLabels(strategy="dpl", threshold=0.9)
        assert DPL(usual, FACTS).judge(steady, x)[1].all()
        assert not DPL(own, FACTS).judge(steady, x)[1].any()


def test_upl_votes_of_perturbed_heads(model):
    x = draw(2, 1, SIZE, SIZE)
    strategy = UPLSFDA(PseudoLabels(strategy="upl_sfda", threshold=0.5), FACTS)
    with torch.no_grad():
        first, again, other = [], [], []
        for seed, found in ((0, first), (0, again), (1, other)):
            torch.manual_seed(seed)
            found.extend(strategy.judge(model.eval(), x))
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert np.array_equal(strategy.weigh(*first), first[1].numpy() > 0.5)


def test_views_move_labels_and_weights_with_the_pixels():
    images = torch.zeros(16, 1, 8, 8)
    images[:, :, :, :4] = 1
    labels = images[:, 0].long()
    weights = images[:, 0] / 2
    x, y, w = Views(3)(images, labels, weights)
    assert torch.equal(w, y / 2)
    flipped = y[:, 0, 0] == 0
    assert 0 < flipped.sum() < 16
    assert torch.equal((x[:, 0] > 0.5).long(), y)
    assert x.min() >= 0 and x.max() <= 1
    assert torch.equal(Views(3)(images, labels, weights)[0], x)
    assert torch.equal(Views(3, flips=False)(images, labels, weights)[1], labels)
