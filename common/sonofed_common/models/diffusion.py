"""The diffusion stacks of ADAptation's Stage I: small from scratch, or Stable Diffusion 1.5."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn

from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.models.codecs import DctCodec, VaeCodec
from sonofed_common.models.prompts import prompt_tokens
from sonofed_common.models.stack import DiffusionStack, read_part

__all__ = ["DiffusionStack", "build_tiny", "load_sd15"]

PROMPT = "Ultrasound of breast"


def build_tiny(image_size: int, seed: int) -> DiffusionStack:
    """A stack to train from scratch in minutes on CPU.

    Parameters
    ----------
    image_size : int
        Side of the images in pixels, a multiple of 8.
    seed : int
        Of the initial weights.
    """
    from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        codec = DctCodec()
        unet = UNet2DConditionModel(
            sample_size=image_size // codec.factor,
            in_channels=codec.factor**2,
            out_channels=codec.factor**2,
            block_out_channels=(48, 96, 96),
            down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=16,
            cross_attention_dim=32,
            attention_head_dim=4,
        )
        controlnet = ControlNetModel.from_unet(
            unet, conditioning_channels=1, conditioning_embedding_out_channels=(8, 16, 32)
        )
        # Zero convolutions protect a trained UNet from a new ControlNet. Here both start together,
        # and zeros would only delay the edges. Gain 2 carries a sparse map through SiLU, which
        # halves small values; the default gain leaves the edges unheard.
        for layer in controlnet.modules():
            if isinstance(layer, nn.Conv2d) and not layer.weight.any():
                layer.reset_parameters()
        for layer in controlnet.controlnet_cond_embedding.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=2 / math.sqrt(layer.weight[0].numel()))
        prompt, null = torch.randn(2, 1, 2, 32)
    scheduler = DDPMScheduler(
        # The cosine ends in pure noise (Nichol & Dhariwal 2021), where sampling from noise starts.
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    return DiffusionStack("tiny", unet, controlnet, codec, scheduler, prompt, null, image_size)


def load_sd15(folder: Path, biomedclip: Path, prompt: str = PROMPT) -> DiffusionStack:
    """Stable Diffusion 1.5 with BiomedCLIP's text tower and a new ControlNet.

    Parameters
    ----------
    folder : Path
        Diffusers checkpoint with ``unet/``, ``vae/`` and ``scheduler/`` (safetensors).
    biomedclip : Path
        BiomedCLIP's text tower in transformers format; see `prompts.prompt_tokens`.
    prompt : str
        The one prompt of all images.

    Raises
    ------
    ConfigurationError
        A folder or part is missing or unreadable, the UNet does not predict epsilon, or the text
        tower's hidden size differs from the UNet's cross-attention.
    """
    from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel

    unet = read_part(UNet2DConditionModel, folder, "unet")
    codec = VaeCodec(read_part(AutoencoderKL, folder, "vae"))
    scheduler = read_part(DDPMScheduler, folder, "scheduler")
    if scheduler.config.prediction_type != "epsilon":
        raise ConfigurationError(
            f"the checkpoint '{folder.name}' predicts {scheduler.config.prediction_type}; "
            "give one that predicts epsilon, as Stable Diffusion 1.5 does"
        )
    tokens, null = prompt_tokens(biomedclip, prompt)
    if tokens.shape[-1] != unet.config.cross_attention_dim:
        raise ConfigurationError(
            f"the text tower's features have size {tokens.shape[-1]}, the UNet's cross-attention "
            f"takes {unet.config.cross_attention_dim}; give BiomedCLIP's own text tower"
        )
    # The hint shrinks as the VAE shrinks the image: one stride-2 convolution less than channels.
    channels = (16, 32, 96, 256)[: codec.factor.bit_length()]
    controlnet = ControlNetModel.from_unet(
        unet, conditioning_channels=1, conditioning_embedding_out_channels=channels
    )
    size = int(unet.config.sample_size) * codec.factor
    return DiffusionStack("sd15", unet, controlnet, codec, scheduler, tokens, null, size)
