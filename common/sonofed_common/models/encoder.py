"""The hypersphere encoder and its predictor."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from sonofed_common.models.classifiers import Classifier


def _mlp(inputs: int, hidden: int, outputs: int, seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, outputs),
        )


class HypersphereEncoder(nn.Module):
    """Map images to points of the unit hypersphere (ADAptation, arXiv 2507.00474, stage III).

    Parameters
    ----------
    backbone : Classifier
        Source-trained classifier whose features are projected. It is trained in place: pass a copy
        to keep the classifier. Its head is not used.
    dimension : int
        d, length of an embedding.
    seed : int
        Seed of the projector's random weights: the same at every site, so that first rounds agree.
    """

    def __init__(self, backbone: Classifier, dimension: int = 256, seed: int = 0) -> None:
        super().__init__()
        self.backbone = backbone
        self.dimension = dimension
        self.projector = _mlp(backbone.feature_dim, 2 * dimension, dimension, seed)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 1, S, S) in [0, 1] to unit vectors (B, d)."""
        return normalize(self.projector(self.backbone.features(x)), dim=1)


class Predictor(nn.Module):
    """The student's predictor (BYOL, Grill et al., NeurIPS 2020), which guards against collapse.

    Parameters
    ----------
    dimension : int
        d, length of an embedding.
    seed : int
        Seed of the random weights.
    """

    def __init__(self, dimension: int = 256, seed: int = 0) -> None:
        super().__init__()
        self.mlp = _mlp(dimension, 2 * dimension, dimension, seed)

    def forward(self, z: Tensor) -> Tensor:
        """Map embeddings (B, d) to predicted unit vectors (B, d)."""
        return normalize(self.mlp(z), dim=1)
