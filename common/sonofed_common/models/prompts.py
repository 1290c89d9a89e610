"""Prompt tokens from BiomedCLIP's text tower, computed once and cached."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sonofed_common.contract.errors import ConfigurationError


def prompt_tokens(folder: Path, prompt: str) -> tuple[Tensor, Tensor]:
    """Token features of a prompt and of the empty prompt.

    Parameters
    ----------
    folder : Path
        BiomedCLIP's text tower (PubMedBERT) in transformers format: config.json, model.safetensors
        and the tokenizer's files. Nothing is fetched from the network.
    prompt : str
        For example ``"Ultrasound of breast"``.

    Returns
    -------
    tuple of Tensor
        Two float32 tensors (1, L, D), L tokens of hidden size D (768 for PubMedBERT, just what the
        cross-attention of Stable Diffusion 1.5 takes: no projection).

    Raises
    ------
    ConfigurationError
        The folder or a part of it is missing or unreadable.
    """
    from transformers import AutoTokenizer, BertModel

    if not (folder / "config.json").is_file():
        raise ConfigurationError(
            f"there is no text tower in the folder '{folder.name}'; "
            "give BiomedCLIP's PubMedBERT in transformers format"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        bert = BertModel.from_pretrained(
            folder, add_pooling_layer=False, local_files_only=True, use_safetensors=True
        ).eval()
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"the text tower in the folder '{folder.name}' cannot be read; it needs config.json, "
            "model.safetensors and the tokenizer's files"
        ) from error
    # The empty prompt is padded to the prompt's length so that both halves of a guided step fit one
    # batch; the mask keeps padding out of the other tokens' features.
    encoded = tokenizer([prompt, ""], padding=True, return_tensors="pt")
    with torch.no_grad():
        features = bert(**encoded).last_hidden_state.float()
    return features[:1].clone(), features[1:].clone()
