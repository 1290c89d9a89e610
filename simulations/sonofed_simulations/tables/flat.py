"""ADAptation's contrastive stage without its hypersphere, for the ablation."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from sonofed_client.adaptation.embedding import teacher_momentum
from sonofed_common.contract.study import Embedding
from sonofed_common.models.encoder import HypersphereEncoder, Predictor
from sonofed_common.runtime import SILENT, Events
from sonofed_common.training import Training, fit


class FlatEncoder(HypersphereEncoder):
    """The hypersphere encoder, whose embeddings keep their lengths."""

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 1, S, S) in [0, 1] to vectors (B, d)."""
        embedding: Tensor = self.projector(self.backbone.features(x))
        return embedding


class FlatPredictor(Predictor):
    """The student's predictor, whose predictions keep their lengths."""

    def forward(self, z: Tensor) -> Tensor:
        """Map embeddings (B, d) to predicted vectors (B, d)."""
        predicted: Tensor = self.mlp(z)
        return predicted


def train_flat_round(
    student: HypersphereEncoder,
    predictor: Predictor,
    images: Tensor,
    partners: Tensor,
    settings: Embedding,
    round: int,
    seed: int,
    events: Events = SILENT,
) -> None:
    """Train student and predictor in place for one federated round.

    As `sonofed_client.adaptation.embedding.train_round`, but for the loss: the mean squared
    distance of the vectors as they are, in place of the squared angle of unit vectors.

    Parameters
    ----------
    student, predictor
        The student's incoming weights are also the teacher's first ones.
    images, partners : Tensor of float32 (N, 1, S, S)
        Target images for the teacher, their reconstructions for the student.
    settings : Embedding
        Its ``margin`` and ``loss`` are of the hypersphere, and not used.
    round : int
        Number of this round, from 0.
    seed : int
        Of this site.
    events : Events
        Progress.
    """
    teacher = copy.deepcopy(student).requires_grad_(False).train()
    place = next(student.parameters()).device

    def loss_of_batch(indices: Tensor) -> Tensor:
        with torch.no_grad():
            fixed = teacher(images[indices].to(place))
        return mse_loss(predictor(student(partners[indices].to(place))), fixed)

    def after_step(done: int, total: int) -> None:
        momentum = teacher_momentum(settings.teacher_momentum, done / total)
        with torch.no_grad():
            for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
                old.lerp_(new, 1 - momentum)

    trained = nn.ModuleList([student, predictor])
    fit(
        nn.ModuleList([trained, teacher]),
        len(images),
        loss_of_batch,
        Training(
            epochs=settings.local_epochs,
            learning_rate=settings.learning_rate,
            batch_size=settings.batch_size,
            seed=seed,
            first_epoch=round * settings.local_epochs,
            last_epoch=settings.rounds * settings.local_epochs,
        ),
        events=events,
        task="flat embedding",
        parameters=trained,
        after_step=after_step,
    )
