"""Corrections of a site's gradients, so that its weights do not drift off the federation's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Correction = Callable[[], None]
"""Changes a model's gradients in place, between backward pass and step."""

Variate = Mapping[str, Tensor]
"""A mean gradient: one tensor for each trained parameter, by its name."""


def proximal(model: nn.Module, mu: float) -> Correction:
    """Return FedProx's correction (Li et al., MLSys 2020, equation 2).

    Parameters
    ----------
    model : Module
        With the weights ``w_t`` that the round starts from.
    mu : float
        Weight of ``mu / 2 |w - w_t|^2`` beside the loss; its gradient ``mu (w - w_t)`` is added.
    """
    start = trained(model)

    def correct() -> None:
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                weight.grad.add_(weight.detach() - start[name], alpha=mu)

    return correct


def scaffold(model: nn.Module, common: Variate, own: Variate) -> Correction:
    """Return SCAFFOLD's correction (Karimireddy et al., ICML 2020, equation 3).

    Parameters
    ----------
    model : Module
        Its gradients become ``g + c - c_i``.
    common : mapping of str to Tensor
        The mean ``c`` of the sites' control variates.
    own : mapping of str to Tensor
        This site's control variate ``c_i``.
    """

    def correct() -> None:
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                weight.grad.add_(common[name] - own[name])

    return correct


def next_variate(
    common: Variate, own: Variate, start: Variate, end: Variate, total_rate: float
) -> dict[str, Tensor]:
    """Return a site's next control variate (the paper's option II).

    Parameters
    ----------
    common, own : mapping of str to Tensor
        ``c`` and ``c_i`` of the round.
    start, end : mapping of str to Tensor
        The site's weights before and after it: steps of plain gradient descent.
    total_rate : float
        Sum of these steps' learning rates, the paper's ``K eta``.

    Returns
    -------
    dict of str to Tensor
        ``c_i - c + (start - end) / total_rate``: the mean of the round's gradients, weighed by
        their learning rates.
    """
    return {name: own[name] - common[name] + (start[name] - end[name]) / total_rate for name in own}


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Copy a model's trained parameters."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def zeros(model: nn.Module) -> dict[str, Tensor]:
    """Return the control variate that every site starts with."""
    return {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
