"""Normalisation statistics of the images at hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def adapt_batch_norm(model: nn.Module, images: Tensor, batch_size: int = 32) -> None:
    """Re-estimate batch-normalisation statistics on unlabelled images.

    After AdaBN (Li et al., 2018): running means and variances become the averages over batches of
    these images; no weight changes.

    Parameters
    ----------
    model : Module
        Changed in place. Modes and momenta are restored.
    images : Tensor (N, 1, S, S)
        In [0, 1]. Fewer than two images estimate nothing and change nothing.
    batch_size : int
        Least number of images of a batch where there are that many; a batch holds less than twice
        as many.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if len(images) < 2 or not layers:
        return
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    try:
        # Strides mix the batches: images often come sorted by class or scanner.
        count = max(len(images) // max(batch_size, 2), 1)
        with torch.no_grad():
            for start in range(count):
                model(images[start::count].to(device))
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
