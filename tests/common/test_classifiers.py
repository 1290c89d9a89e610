from __future__ import annotations

import pytest
import torch

from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.models.classifiers import (
    CLASSIFIERS,
    TwoViewClassifier,
    build_classifier,
    sees_lesions,
)
from sonofed_common.models.cnn_transformer import CnnTransformer
from sonofed_common.models.encoder import HypersphereEncoder, Predictor
from sonofed_common.models.shufflenet import ShuffleNetV2

torch.set_num_threads(1)

OURS = ("cnn_transformer", "cnn_transformer_channel")
"""Of these, after TransMed, no size was published."""
PUBLISHED_MILLIONS = {
    "resnet18": 11.7,
    "resnet50": 25.6,
    "densenet121": 8.0,
    "mobilenet_v2": 3.5,
    "shufflenet_v2": 2.3,
    "efficientnet_b0": 5.3,
    "efficientnet_lite0": 4.7,
    "vit16": 22.1,
}


@pytest.mark.parametrize("name", [*PUBLISHED_MILLIONS, *OURS])
def test_every_classifier_has_the_interface_and_the_published_size(name):
    model = build_classifier(name, classes=1000)
    parameters = sum(p.numel() for p in model.parameters())
    if name not in OURS:
        assert round(parameters / 1e6, 1) == pytest.approx(PUBLISHED_MILLIONS[name], abs=0.11)
    model.eval()
    images = torch.rand(2, 1, 48, 48)
    with torch.no_grad():
        features = model.features(images)
        assert features.shape == (2, model.feature_dim)
        assert torch.allclose(model(images), model.head(features), atol=1e-5)


def test_two_views_start_as_the_mean_of_two_classifiers():
    whole, lesion = (build_classifier("resnet18", seed=n).eval() for n in range(2))
    images = torch.rand(3, 2, 48, 48)
    with torch.no_grad():
        apart = [
            m(shown[:, n : n + 1])
            for shown in (images, images.flip(-1))
            for n, m in enumerate((whole, lesion))
        ]
        both = TwoViewClassifier(whole, lesion).eval()
        assert torch.allclose(both(images), torch.stack(apart).mean(0), atol=1e-5)
        assert torch.allclose(both(images), both(images.flip(-1)), atol=1e-5)
        assert not torch.allclose(both.features(images), both.judged(images), atol=1e-3)
        assert both.features(images).shape == (3, both.feature_dim) == (3, 1024)
        # The second view is looked at.
        assert not torch.allclose(both(images), both(images.flip(1)), atol=1e-3)


def test_two_views_are_known_by_their_name():
    names = [name for name in CLASSIFIERS if sees_lesions(name)]
    assert {*CLASSIFIERS} == {*PUBLISHED_MILLIONS, *OURS, *names}
    for name in names:
        model = build_classifier(name, pretrained=False)
        assert model.views == 2
        again = build_classifier(name, pretrained=False)
        again.load_state_dict(model.state_dict())
        # Nothing but the networks and the common head travels.
        single = build_classifier(name.removesuffix("_two_views"), pretrained=False)
        assert len(model.state_dict()) == 2 * len(single.state_dict()) - 2


@pytest.mark.parametrize(
    "name", ["efficientnet_lite0", "shufflenet_v2", "mobilenet_v2", "vit16", "cnn_transformer"]
)
def test_every_weight_gets_a_gradient_and_the_seed_decides_the_weights(name):
    state = torch.get_rng_state()
    model = build_classifier(name, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    model(torch.rand(2, 1, 64, 64)).logsumexp(1).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    again, other = build_classifier(name, seed=1), build_classifier(name, seed=2)
    first = build_classifier(name, seed=1).state_dict()
    assert all(torch.equal(v, first[k]) for k, v in again.state_dict().items())
    assert not torch.equal(other.head.weight, again.head.weight)


def test_pretrained_weights_come_from_the_installed_package():
    pretrained = build_classifier("efficientnet_lite0", seed=1)
    other = build_classifier("efficientnet_lite0", seed=2)
    scratch = build_classifier("efficientnet_lite0", pretrained=False, seed=1)
    for (name, weight), same in zip(
        pretrained.backbone.state_dict().items(),
        other.backbone.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(weight, same), name
    key = "network._conv_stem.weight"
    assert not torch.equal(
        pretrained.backbone.state_dict()[key], scratch.backbone.state_dict()[key]
    )


def test_an_unknown_name_gets_the_nearest_known_one():
    with pytest.raises(ConfigurationError, match="did you mean 'resnet50'"):
        build_classifier("resnet_50")
    with pytest.raises(ConfigurationError, match="known: resnet50"):
        build_classifier("zzz")


def torchvision_names():
    """Names and shapes of torchvision's shufflenet_v2_x1_0, written down from its definition."""
    shapes = {}

    def convolution(prefix, index, shape):
        shapes[f"{prefix}.{index}.weight"] = shape
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{prefix}.{index + 1}.{name}"] = shape[:1]
        shapes[f"{prefix}.{index + 1}.num_batches_tracked"] = ()

    convolution("conv1", 0, (24, 3, 3, 3))
    before = 24
    for stage, units, width in (("stage2", 4, 116), ("stage3", 8, 232), ("stage4", 4, 464)):
        half = width // 2
        convolution(f"{stage}.0.branch1", 0, (before, 1, 3, 3))
        convolution(f"{stage}.0.branch1", 2, (half, before, 1, 1))
        for unit in range(units):
            entering = before if unit == 0 else half
            convolution(f"{stage}.{unit}.branch2", 0, (half, entering, 1, 1))
            convolution(f"{stage}.{unit}.branch2", 3, (half, 1, 3, 3))
            convolution(f"{stage}.{unit}.branch2", 5, (half, half, 1, 1))
        before = width
    convolution("conv5", 0, (1024, 464, 1, 1))
    return {**shapes, "fc.weight": (1000, 1024), "fc.bias": (1000,)}


def test_shufflenet_takes_torchvision_weights():
    ours = {name: tuple(t.shape) for name, t in ShuffleNetV2().state_dict().items()}
    assert ours == torchvision_names()


def test_shufflenet_mixes_the_two_halves_of_every_unit():
    unit = ShuffleNetV2().stage2[1].eval()
    x = torch.rand(1, 116, 6, 6)
    y = unit(x)
    assert torch.equal(y[:, 0::2], x[:, :58])
    assert torch.allclose(y[:, 1::2], unit.branch2(x[:, 58:]))


@pytest.mark.parametrize(
    ("tokens", "count", "dimension"), [("spatial", 1024, 64), ("channel", 64, 1024)]
)
def test_a_cnn_transformers_tokens_are_places_or_maps(tokens, count, dimension):
    network = CnnTransformer(tokens).eval()
    assert network.positions.shape == (1, count + 1, dimension)
    x = torch.rand(2, 3, 64, 64)
    maps = network.encoder(x)
    assert maps.shape == (2, 64, 32, 32)
    seen = []
    network.layers.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    assert network(x).shape == (2, dimension)
    placed = seen[0][:, 1:] - network.positions[:, 1:]
    expected = maps.flatten(2).transpose(1, 2) if tokens == "spatial" else maps.flatten(2)
    assert torch.allclose(placed, expected, atol=1e-6)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("name", ["vit16", "cnn_transformer"])
def test_transformers_take_both_image_sizes_and_see_where_things_are(name, size):
    model = build_classifier(name, seed=0).eval()
    image = torch.zeros(1, 1, size, size)
    image[..., : size // 4, : size // 4] = 1
    with torch.no_grad():
        one, other = model.features(image), model.features(image.flip(-1))
    assert one.shape == (1, model.feature_dim)
    assert not torch.allclose(one, other, atol=1e-4)


def test_encoder_and_predictor_give_points_of_the_sphere_from_the_seed():
    state = torch.get_rng_state()
    encoder = HypersphereEncoder(build_classifier("shufflenet_v2"), dimension=16)
    predictor = Predictor(16)
    assert torch.equal(torch.get_rng_state(), state)
    z = encoder(torch.rand(3, 1, 48, 48))
    assert z.shape == (3, 16)
    for vectors in (z, predictor(z)):
        assert torch.allclose(vectors.norm(dim=1), torch.ones(3), atol=1e-5)
    again = HypersphereEncoder(build_classifier("shufflenet_v2"), dimension=16)
    for one, other in zip(encoder.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
