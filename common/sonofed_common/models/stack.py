"""DiffusionStack: UNet, ControlNet, codec, prompt tokens and noise schedule as one model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Generator, Tensor, nn
from torch.nn.functional import mse_loss

from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.models.codecs import Codec, DctCodec, VaeCodec
from sonofed_common.models.edges import CANNY, canny
from sonofed_common.runtime import write_atomically

if TYPE_CHECKING:
    # Loaded where they are used: diffusers takes seconds, and most processes draw nothing.
    from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel

DROP = 0.2
"""Probability with which training drops the prompt, and the edge map, of an image."""
DETAIL = 0.15
"""Standard deviation of an image's fine detail in `DctCodec`'s latents."""

Kind = Literal["tiny", "sd15"]
Part = TypeVar("Part")


class DiffusionStack(nn.Module):
    """Edge-conditioned diffusion model of source images.

    Parameters
    ----------
    kind : {"tiny", "sd15"}
        ``tiny``: pixel space, all is trained; ``sd15``: latent space, only the ControlNet is.
    unet, controlnet : UNet2DConditionModel, ControlNetModel
        The denoiser, and the copy of its encoder that sees the edge map (B, 1, S, S).
    codec : Codec
        Between images and latents.
    scheduler : DDPMScheduler
        Noise schedule and kind of prediction (epsilon or sample).
    prompt, null : Tensor
        (1, L, D) tokens of the prompt and of its absence.
    image_size : int
        S of the training images, pixels.
    edge_settings : mapping
        As `edges.CANNY`.
    """

    def __init__(
        self,
        kind: Kind,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel,
        codec: Codec,
        scheduler: DDPMScheduler,
        prompt: Tensor,
        null: Tensor,
        image_size: int,
        edge_settings: Mapping[str, float] = CANNY,
    ) -> None:
        super().__init__()
        self.kind: Kind = kind
        learned = kind == "tiny"
        self.unet = unet.requires_grad_(learned)
        self.controlnet = controlnet.requires_grad_(True)
        self.codec = codec
        self.scheduler = scheduler
        self.prompt = nn.Parameter(prompt.clone(), requires_grad=learned)
        self.null = nn.Parameter(null.clone(), requires_grad=learned)
        self.image_size = image_size
        self.edge_settings = dict(edge_settings)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.prompt.device

    def edges(self, images: Tensor) -> Tensor:
        """Edge maps (B, 1, S, S) in {0, 1} of images (B, 1, S, S) in [0, 1]."""
        return canny(images, self.edge_settings)

    def forward(self, latents: Tensor, times: Tensor, tokens: Tensor, edges: Tensor) -> Tensor:
        """Predict what the noise schedule names: the noise, or the clean latents ("sample").

        Parameters
        ----------
        latents : Tensor
            (B, C, S / factor, S / factor).
        times : Tensor
            (B,) integer timesteps.
        tokens : Tensor
            (B, L, D) prompt tokens.
        edges : Tensor
            (B, 1, S, S).
        """
        down, middle = self.controlnet(
            latents, times, encoder_hidden_states=tokens, controlnet_cond=edges, return_dict=False
        )
        prediction: Tensor = self.unet(
            latents,
            times,
            encoder_hidden_states=tokens,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        if self.predicts_sample:
            skip, scale = self.preconditioning(times)
            prediction = skip * latents + scale * prediction
        return prediction

    @property
    def predicts_sample(self) -> bool:
        """Whether the networks' output is preconditioned to clean latents."""
        return bool(self.scheduler.config.prediction_type == "sample")

    def preconditioning(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Share of the noisy latents, and of the networks' output, in the predicted clean latents.

        Parameters
        ----------
        times : Tensor
            (B,) integer timesteps.

        Returns
        -------
        tuple of Tensor
            Two of shape (B, 1, 1, 1).

        Notes
        -----
        Karras et al. 2022 (EDM, table 1), but with the spread of an image's fine detail, not of its
        pixels, as the data's deviation: latents pass straight to the result only where their noise
        is weaker than that detail. Elsewhere a small network predicts the image itself and need not
        carry noise through its narrow middle, which prediction of epsilon or v would ask of it.
        """
        kept = self.scheduler.alphas_cumprod.to(times.device)[times].view(-1, 1, 1, 1)
        total = kept * DETAIL**2 + 1 - kept
        return kept.sqrt() * DETAIL**2 / total, ((1 - kept) / total).sqrt()

    def training_loss(self, images: Tensor, edges: Tensor, generator: Generator) -> Tensor:
        """Mean squared error of the predicted noise: Stage I's loss (arXiv 2507.00474).

        Parameters
        ----------
        images, edges : Tensor
            (B, 1, S, S), in [0, 1] and {0, 1}.
        generator : Generator
            On CPU; draws times, noise and what is dropped.
        """
        count, device = len(images), self.device
        with torch.no_grad():
            latents = self.codec.encode(images.to(device))
        steps = int(self.scheduler.config.num_train_timesteps)
        # One time in each of B equal slices: the same expectation, with less variance
        # (Kingma et al. 2021, Variational Diffusion Models, appendix I).
        slices = (torch.arange(count) + torch.rand(1, generator=generator)) / count
        times = (slices * steps).long().clamp(max=steps - 1).to(device)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        dropped = torch.rand(2, count, generator=generator).to(device) < DROP
        tokens = torch.where(dropped[0].view(-1, 1, 1), self.null, self.prompt)
        hint = edges.to(device) * (~dropped[1]).view(-1, 1, 1, 1)
        noisy = self.scheduler.add_noise(latents, noise, times)
        prediction = self(noisy, times, tokens, hint).float()
        if self.predicts_sample:
            # The error of the networks' own output, about equally hard at all times.
            _, scale = self.preconditioning(times)
            return mse_loss(prediction / scale, latents / scale)
        return mse_loss(prediction, noise)

    def save(self, folder: Path) -> None:
        """Write diffusers folders, prompt tokens and, last, ``stack.json``: whole only with it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "stack.json").unlink(missing_ok=True)
        self.unet.save_pretrained(folder / "unet")
        self.controlnet.save_pretrained(folder / "controlnet")
        self.scheduler.save_pretrained(folder / "scheduler")
        if isinstance(self.codec, VaeCodec):
            self.codec.vae.save_pretrained(folder / "vae")
        tokens = {"prompt": self.prompt.detach().cpu(), "null": self.null.detach().cpu()}
        write_atomically(folder / "prompt_tokens.safetensors", save(tokens))
        facts = {"kind": self.kind, "image_size": self.image_size, "canny": self.edge_settings}
        write_atomically(folder / "stack.json", json.dumps(facts, indent=2).encode())

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote, on CPU, in evaluation mode.

        Raises
        ------
        ConfigurationError
            The folder or a part of it is missing or unreadable.
        """
        from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel

        try:
            facts = json.loads((folder / "stack.json").read_bytes())
            kind, size, settings = facts["kind"], int(facts["image_size"]), dict(facts["canny"])
            tokens = load_file(folder / "prompt_tokens.safetensors")
            prompt, null = tokens["prompt"], tokens["null"]
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise ConfigurationError(
                f"the folder '{folder.name}' holds no whole diffusion stack; train or copy it again"
            ) from error
        codec: Codec = DctCodec()
        if kind == "sd15":
            codec = VaeCodec(read_part(AutoencoderKL, folder, "vae"))
        unet = read_part(UNet2DConditionModel, folder, "unet")
        controlnet = read_part(ControlNetModel, folder, "controlnet")
        scheduler = read_part(DDPMScheduler, folder, "scheduler")
        stack = cls(kind, unet, controlnet, codec, scheduler, prompt, null, size, settings)
        return stack.eval()


def read_part(part: type[Part], folder: Path, name: str) -> Part:
    """Read one folder of a diffusers checkpoint from disk, never from the network.

    Raises
    ------
    ConfigurationError
        The part is missing or unreadable.
    """
    options: dict[str, Any] = {"subfolder": name, "local_files_only": True}
    if issubclass(part, nn.Module):
        options |= {"use_safetensors": True, "low_cpu_mem_usage": False}
    try:
        if not (folder / name).is_dir():
            raise FileNotFoundError(name)
        loaded: Part = part.from_pretrained(folder, **options)  # type: ignore[attr-defined]
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"the checkpoint '{folder.name}' has no readable part '{name}'; "
            "give a whole diffusers folder with safetensors weights"
        ) from error
    return loaded
