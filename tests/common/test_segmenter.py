from __future__ import annotations

import pytest
import torch

from sonofed_common.models.encoders import ENCODERS
from sonofed_common.models.segmenter import build_segmenter


def draw(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ENCODERS)
def test_logits_have_a_class_a_pixel_at_sides_that_are_no_power_of_two(name):
    stride = build_segmenter(name, pretrained=False).encoder.strides[-1]
    side = 3 * stride
    model = build_segmenter(name, 5, side, pretrained=False).eval()
    images = draw(2, 1, side, side)
    with torch.inference_mode():
        main, auxiliary = model(images)
        p = model.probabilities(images)
    assert main.shape == auxiliary.shape == p.shape == (2, 5, side, side)
    assert bool(torch.isfinite(p).all())
    assert torch.allclose(p.sum(dim=1), torch.ones(2, side, side), atol=1e-5)
    assert torch.equal(p, (main.softmax(1) + auxiliary.softmax(1)) / 2)
    assert not torch.equal(p[0], p[1])


def test_mirrored_probabilities_are_those_of_the_mirrored_image_mirrored():
    model = build_segmenter("unet", 3, 48, pretrained=False).eval()
    images = draw(2, 1, 48, 48)
    with torch.inference_mode():
        plain = model.probabilities(images)
        both = model.probabilities(images, mirrored=True)
        other = model.probabilities(images.flip(-1), mirrored=True)
        of_mirror = model.probabilities(images.flip(-1)).flip(-1)
    torch.testing.assert_close(both, (plain + of_mirror) / 2)
    torch.testing.assert_close(both, other.flip(-1))
    assert not torch.allclose(both, plain)


@pytest.mark.parametrize("kind", ["unet", "aspp"])
def test_two_heads_of_one_kind_start_differently_and_repeat(kind):
    model, again = (build_segmenter("unet", 3, 48, (kind, kind), False, seed=4) for _ in range(2))
    assert model.state_dict().keys() == again.state_dict().keys()
    pairs = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    main, auxiliary = (dict(head.named_parameters()) for head in model.heads)
    assert main.keys() == auxiliary.keys()
    weights = [name for name, value in main.items() if value.ndim == 4]
    assert weights
    assert not any(torch.equal(main[name], auxiliary[name]) for name in weights)
    with torch.inference_mode():
        first, second = model.eval()(draw(1, 1, 48, 48))
    assert not torch.allclose(first, second)
