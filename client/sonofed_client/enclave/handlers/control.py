"""SCAFFOLD's control variates at a site: its own one is kept in its store from round to round."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from sonofed_client.adaptation.drift import Variate
from sonofed_client.enclave.rounds import keep, kept_before
from sonofed_client.enclave.site import Site
from sonofed_common.contract.actions import TrainClassifier
from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.records import Array, Records


def variates(
    site: Site, parameters: TrainClassifier, request: Records, model: nn.Module
) -> tuple[Variate | None, Variate | None]:
    """Return the common and the site's own control variate of a round; None where one is 0.

    Raises
    ------
    ParameterError
        The common one does not fit the model, or holds a value that is not finite.
    """
    if parameters.aggregation.strategy != "scaffold":
        return None, None
    kept = kept_before(site, parameters.study, _name(parameters), parameters.round)
    common = request.group("control")
    return (
        _tensors(common, model) if common else None,
        None if kept is None else _tensors(kept.arrays, model),
    )


def keep_variate(site: Site, parameters: TrainClassifier, variate: Variate) -> None:
    """Keep the site's control variate for the next round."""
    records = Records(to_arrays(variate))
    keep(site, parameters.study, _name(parameters), parameters.round, records)


def to_arrays(variate: Variate) -> dict[str, Array]:
    """Return a control variate as arrays."""
    return {name: tensor.cpu().numpy() for name, tensor in variate.items()}


def _name(parameters: TrainClassifier) -> str:
    return f"control/{parameters.classifier}/{parameters.budget}"


def _tensors(arrays: Mapping[str, Array], model: nn.Module) -> dict[str, Tensor]:
    weights = dict(model.named_parameters())
    wanted = {name: (tuple(weight.shape), "float32") for name, weight in weights.items()}
    if {name: (array.shape, array.dtype.name) for name, array in arrays.items()} != wanted:
        raise ParameterError("the control variates do not fit the model; check the aggregation")
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ParameterError("the control variates are not finite; the round was not started")
    return {
        name: torch.from_numpy(np.array(arrays[name])).to(weight.device)
        for name, weight in weights.items()
    }
