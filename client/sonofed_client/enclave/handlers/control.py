"""SCAFFOLD at a site: its control variate, kept in its store from round to round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sonofed_client.adaptation.drift import Variate, next_variate, trained, zeros
from sonofed_client.enclave.rounds import keep, kept_before
from sonofed_client.enclave.site import Site
from sonofed_common.contract.actions import TrainClassifier
from sonofed_common.contract.errors import ParameterError
from sonofed_common.contract.records import Array, Records
from sonofed_common.models.classifiers import Classifier


@dataclass(frozen=True)
class Control:
    """Control variates of one round.

    Attributes
    ----------
    common, own : mapping of str to Tensor
        The mean of all sites', and this site's.
    start : mapping of str to Tensor
        The weights that the round starts from.
    """

    common: Variate
    own: Variate
    start: Variate

    @classmethod
    def of(
        cls, site: Site, parameters: TrainClassifier, request: Records, model: Classifier
    ) -> Control:
        """Find the control variates that a round starts with.

        Raises
        ------
        ParameterError
            Those of the request do not fit the model, or hold a value that is not finite.
        """
        kept = kept_before(site, parameters.study, _name(parameters), parameters.round)
        start = zeros(model)
        common, own = request.group("control"), {} if kept is None else kept.arrays
        return cls(
            _tensors(common, start) if common else start,
            _tensors(own, start) if own else start,
            trained(model),
        )

    def end(
        self, site: Site, parameters: TrainClassifier, model: Classifier, total_rate: float
    ) -> dict[str, Array]:
        """Keep the site's next control variate and return its change."""
        after = next_variate(self.common, self.own, self.start, trained(model), total_rate)
        arrays = {name: tensor.cpu().numpy() for name, tensor in after.items()}
        keep(site, parameters.study, _name(parameters), parameters.round, Records(arrays))
        return {name: (after[name] - self.own[name]).cpu().numpy() for name in after}


def _name(parameters: TrainClassifier) -> str:
    return f"control/{parameters.classifier}/{parameters.budget}"


def _tensors(arrays: Mapping[str, Array], like: Variate) -> dict[str, Tensor]:
    shapes = {name: (tuple(tensor.shape), np.dtype(np.float32)) for name, tensor in like.items()}
    if {name: (array.shape, array.dtype) for name, array in arrays.items()} != shapes:
        raise ParameterError("the control variates do not fit the model; check the aggregation")
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ParameterError("the control variates are not finite; the round was not started")
    return {
        name: torch.from_numpy(np.array(arrays[name])).to(tensor.device)
        for name, tensor in like.items()
    }
