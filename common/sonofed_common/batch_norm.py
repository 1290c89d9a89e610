"""Batch normalisation: statistics of the images at hand, and which weights are its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sonofed_common.contract.names import BUFFERS

Statistics = Mapping[str, Tensor]
"""Running means and variances by their names in the state of a model."""


def statistics_of(model: nn.Module) -> Statistics:
    """Copy a model's normalisation statistics."""
    return {name: tensor.clone() for name, tensor in _running(model)}


def set_statistics(model: nn.Module, statistics: Statistics) -> None:
    """Give a model the statistics of one of its kind."""
    for name, tensor in _running(model):
        tensor.copy_(statistics[name])


def adapt_batch_norm(
    model: nn.Module, images: Tensor, batch_size: int = 32, prior: Statistics | None = None
) -> None:
    """Re-estimate batch-normalisation statistics on unlabelled images.

    After AdaBN (Li et al., 2018): running means and variances become the averages over batches of
    these images; no weight changes. With a prior they become the mean of those and of the prior's
    (after Schneider et al., NeurIPS 2020, at equal weights): it keeps a small or one-sided set of
    images from carrying the network too far from the images that it learned on.

    Parameters
    ----------
    model : Module
        Changed in place. Modes and momenta are restored.
    images : Tensor (N, 1, S, S)
        In [0, 1]. Fewer than two images estimate nothing and change nothing.
    batch_size : int
        Least number of images of a batch where there are that many; a batch holds less than twice
        as many.
    prior : mapping of str to Tensor, optional
        `statistics_of` the network on the images that it learned on.
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
            if prior is not None:
                for name, tensor in _running(model):
                    tensor.lerp_(prior[name], 0.5)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode


def layers_of(model: nn.Module) -> frozenset[str]:
    """Names of what normalisation layers hold: scales, shifts and statistics.

    These are what FedBN (Li et al., ICLR 2021) leaves at each site.
    """
    return frozenset(
        f"{place}.{name}"
        for place, layer in model.named_modules()
        if isinstance(layer, _BatchNorm)
        for name in layer.state_dict()
    )


def _running(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in model.named_buffers():
        if name.endswith(BUFFERS[:2]):
            yield name, buffer
