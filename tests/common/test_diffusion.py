from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from torch import Tensor

from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.models.codecs import MEAN, DctCodec
from sonofed_common.models.diffusion import (
    DiffusionStack,
    build_tiny,
    load_sd15,
)
from sonofed_common.models.edges import CANNY, canny
from sonofed_common.runtime import Events
from sonofed_server.source.diffusion import train_diffusion

SIZE = 32
HIDDEN = 16


def lesions(count: int, size: int = SIZE, seed: int = 0) -> Tensor:
    """Dark discs in bright speckle."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centres = size * (0.35 + 0.3 * torch.rand(count, 2, 1, 1, generator=generator))
    inside = (y - centres[:, 0]) ** 2 + (x - centres[:, 1]) ** 2 < (size / 5) ** 2
    speckle = 0.1 * torch.rand(count, size, size, generator=generator)
    return (torch.where(inside, 0.1, 0.7) + speckle).unsqueeze(1)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def sd15_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A miniature Stable Diffusion checkpoint and text tower, in the format of the real ones."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(0)
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=HIDDEN,
        attention_head_dim=2,
    ).save_pretrained(checkpoint / "unet")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    ).save_pretrained(checkpoint / "vae")
    PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
    ).save_pretrained(checkpoint / "scheduler")
    tower = tmp_path_factory.mktemp("tower")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ultrasound", "of", "breast"]
    (tower / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tower / "vocab.txt")).save_pretrained(tower)
    BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        )
    ).save_pretrained(tower)
    return checkpoint, tower


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(before: dict[str, Tensor], module: torch.nn.Module) -> bool:
    return any(not torch.equal(before[k], v) for k, v in module.state_dict().items())


def predict(stack: DiffusionStack, seed: int = 0) -> Tensor:
    with torch.no_grad():
        images = lesions(2, seed=seed)
        latents = stack.codec.encode(images)
        tokens = stack.prompt.expand(2, -1, -1)
        return stack(latents, torch.tensor([10, 500]), tokens, stack.edges(images))


def test_edges_keep_the_lesion_and_drop_the_speckle():
    edges = canny(lesions(4, size=128))
    assert set(edges.unique().tolist()) == {0.0, 1.0}
    rows, columns = np.nonzero(edges[0, 0].numpy())
    # The outline of a disc of radius 25.6: about 2 pi r pixels, all at that distance of its centre.
    radii = np.hypot(rows - rows.mean(), columns - columns.mean())
    assert np.abs(radii - 128 / 5).max() < 4
    assert 100 < len(radii) < 250


def test_edges_of_a_blank_image_are_empty():
    assert canny(torch.zeros(1, 1, 16, 16)).sum() == 0


def test_edge_settings_must_be_complete():
    with pytest.raises(ConfigurationError, match="floor"):
        canny(torch.zeros(1, 1, 16, 16), {k: v for k, v in CANNY.items() if k != "floor"})


def test_dct_codec_loses_nothing():
    images = lesions(3)
    codec = DctCodec()
    latents = codec.encode(images)
    assert latents.shape == (3, 16, SIZE // 4, SIZE // 4)
    assert torch.allclose(codec.decode(latents), images, atol=1e-5)


def test_dct_codec_agrees_with_scipy():
    images = lesions(1)
    codec = DctCodec()
    patch = 2 * images[0, 0, 4:8, 8:12].numpy() - 1
    frequencies = dctn(patch, norm="ortho").flatten()
    frequencies[0] -= MEAN
    expected = frequencies / codec.spread.flatten().numpy()
    assert np.allclose(codec.encode(images)[0, :, 1, 2], expected, atol=1e-5)


def test_training_lowers_the_loss():
    stack = build_tiny(SIZE, seed=1)
    losses = train_diffusion(stack, lesions(8), epochs=5, learning_rate=2e-3, batch_size=4, seed=3)
    assert losses[-1] < 0.7 * losses[0]


def test_training_repeats_and_goes_on_from_its_checkpoint_bit_for_bit(tmp_path: Path):
    settings = {"epochs": 2, "learning_rate": 1e-3, "batch_size": 4, "seed": 3}
    whole = build_tiny(SIZE, seed=1)
    losses = train_diffusion(whole, lesions(4), **settings)

    class PowerCutError(Exception):
        pass

    def cut(event: dict[str, object]) -> None:
        if event.get("epoch") == 2:
            raise PowerCutError

    checkpoint = tmp_path / "diffusion.safetensors"
    with pytest.raises(PowerCutError):
        train_diffusion(
            build_tiny(SIZE, seed=1),
            lesions(4),
            **settings,
            checkpoint=checkpoint,
            events=Events(listeners=[cut]),
        )
    resumed = build_tiny(SIZE, seed=1)
    assert train_diffusion(resumed, lesions(4), **settings, checkpoint=checkpoint) == losses
    assert not changed(state(whole), resumed)


def test_tiny_is_small_and_trained_whole():
    stack = build_tiny(SIZE, seed=0)
    assert sum(p.numel() * 4 for p in stack.parameters()) < 20e6
    assert all(parameter.requires_grad for parameter in stack.parameters())


def test_building_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_tiny(SIZE, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_saved_tiny_stack_gives_the_same_bits(tmp_path: Path):
    stack = build_tiny(SIZE, seed=2)
    train_diffusion(stack, lesions(4), epochs=1, learning_rate=1e-3, batch_size=4, seed=0)
    stack.save(tmp_path)
    loaded = DiffusionStack.load(tmp_path)
    assert torch.equal(predict(loaded), predict(stack))
    assert loaded.scheduler.config.prediction_type == "sample"
    assert torch.equal(loaded.scheduler.alphas_cumprod, stack.scheduler.alphas_cumprod)
    assert loaded.edge_settings == dict(CANNY)
    assert not [p for p in tmp_path.rglob("*") if p.suffix in {".bin", ".pt", ".pkl", ".ckpt"}]


@pytest.mark.parametrize("part", ["stack.json", "prompt_tokens.safetensors", "unet", "controlnet"])
def test_an_incomplete_stack_is_refused(tmp_path: Path, part: str):
    build_tiny(SIZE, seed=2).save(tmp_path)
    (tmp_path / part).rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigurationError) as error:
        DiffusionStack.load(tmp_path)
    assert part in str(error.value) or "whole diffusion stack" in str(error.value)


def trained(stack: DiffusionStack) -> set[int]:
    return {id(p) for p in stack.parameters() if p.requires_grad}


def test_sd15_trains_only_its_controlnet(sd15_folders: tuple[Path, Path], tmp_path: Path):
    stack = load_sd15(*sd15_folders)
    unet, vae, prompt = state(stack.unet), state(stack.codec), stack.prompt.clone()
    controlnet = state(stack.controlnet)
    assert trained(stack) == {id(p) for p in stack.controlnet.parameters()}
    losses = train_diffusion(
        stack, lesions(4, 64), epochs=2, learning_rate=1e-3, batch_size=4, seed=0
    )
    assert np.isfinite(losses).all()
    assert changed(controlnet, stack.controlnet)
    assert not changed(unet, stack.unet)
    assert not changed(vae, stack.codec)
    assert torch.equal(prompt, stack.prompt)

    stack.save(tmp_path)
    loaded = DiffusionStack.load(tmp_path)
    assert loaded.kind == "sd15"
    assert torch.equal(predict(loaded), predict(stack))
    assert trained(loaded) == {id(p) for p in loaded.controlnet.parameters()}


def test_sd15_prompt_is_the_towers_token_features(sd15_folders: tuple[Path, Path]):
    from transformers import BertModel

    checkpoint, tower = sd15_folders
    stack = load_sd15(checkpoint, tower, "Ultrasound of breast")
    bert = BertModel.from_pretrained(tower).eval()
    # [CLS] ultrasound of breast [SEP], by the vocabulary above.
    expected = bert(torch.tensor([[2, 5, 6, 7, 3]])).last_hidden_state
    empty = bert(torch.tensor([[2, 3]])).last_hidden_state
    assert torch.allclose(stack.prompt, expected, atol=1e-5)
    assert stack.null.shape == stack.prompt.shape
    assert torch.allclose(stack.null[:, :2], empty, atol=1e-5)


def test_sd15_codec_halves_three_times(sd15_folders: tuple[Path, Path]):
    codec = load_sd15(*sd15_folders).codec
    latents = codec.encode(lesions(2, 64))
    assert latents.shape == (2, 4, 8, 8)
    images = codec.decode(latents)
    assert images.shape == (2, 1, 64, 64)
    assert images.min() >= 0 and images.max() <= 1


def test_sd15_needs_every_folder(sd15_folders: tuple[Path, Path], tmp_path: Path):
    checkpoint, tower = sd15_folders
    with pytest.raises(ConfigurationError, match="no readable part 'unet'"):
        load_sd15(tmp_path, tower)
    with pytest.raises(ConfigurationError, match="no text tower"):
        load_sd15(checkpoint, tmp_path)
    (tmp_path / "config.json").write_bytes((tower / "config.json").read_bytes())
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_sd15(checkpoint, tmp_path)


def test_sd15_refuses_a_tower_of_another_width(sd15_folders: tuple[Path, Path], tmp_path: Path):
    from transformers import BertConfig, BertModel

    checkpoint, tower = sd15_folders
    for file in tower.glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    BertModel(
        BertConfig(
            vocab_size=8,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="size 8"):
        load_sd15(checkpoint, tmp_path)
