"""The source's classifiers, as the cells of a table start from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors.torch import load as load_safetensors
from torch import Tensor

from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.records import Records, from_bytes
from sonofed_common.models.classifiers import Classifier, build_classifier, sees_lesions
from sonofed_common.runtime import Events
from sonofed_simulations.rivals.pool import Floats
from sonofed_simulations.tables.hospitals import HospitalImages
from sonofed_simulations.tables.lesions import LesionFinder, read_lesion_finder


@dataclass(frozen=True)
class Begin:
    """The head that every cell of one kind starts from, on features of F values.

    Attributes
    ----------
    head : mapping of str to Tensor
        State of the linear layer: ``weight`` (C, F) and ``bias`` (C,).
    dropped : float
        Share of the features that is dropped in training.
    centroids : ndarray of float32 (k, F)
        Unit vectors of the source's images.
    """

    head: Mapping[str, Tensor]
    dropped: float
    centroids: Floats

    @cached_property
    def digest(self) -> str:
        """Of head and centroids."""
        arrays = {name: tensor.numpy() for name, tensor in self.head.items()}
        return Records({**arrays, "centroids": self.centroids}).digest()


@dataclass(frozen=True)
class Start:
    """A classifier of the source.

    Attributes
    ----------
    bundle : str
        Id of the signed bundle.
    name : str
        The classifier.
    weights : dict of str to Tensor
        Its state.
    digest : str
        SHA-256 of the file of its weights.
    centroids : ndarray of float32 (k, F)
        Unit vectors of the source's images.
    threshold : float
        Of P(malignant), at a specificity of .90 on held-out source images.
    lesions : LesionFinder or None
        What finds the lesions that a classifier of two views sees.
    """

    bundle: str
    name: str
    weights: dict[str, Tensor]
    digest: str
    centroids: Floats
    threshold: float
    lesions: LesionFinder | None = None

    @property
    def origin(self) -> dict[str, str]:
        """What its features are made of, beside the images."""
        origin = {"classifier": self.name, "weights": self.digest}
        if self.lesions is None:
            return origin
        return {**origin, "segmenter": self.lesions.digest, "judged": "with the mirror image"}

    @cached_property
    def begin(self) -> Begin:
        """The head that cells start from."""
        model = self.model()
        return Begin(model.head.state_dict(), model.dropout.p, self.centroids)

    def model(self) -> Classifier:
        """Build the classifier anew, in evaluation mode."""
        model = build_classifier(self.name, pretrained=False)
        model.load_state_dict(self.weights)
        return model.eval()

    def seen(self, hospital: HospitalImages, pool: Sequence[int], events: Events) -> Tensor:
        """Return a hospital's images as the classifier sees them (N, V, S, S), in [0, 1].

        Parameters
        ----------
        hospital : HospitalImages
            All its labelled images.
        pool : sequence of int
            Which of them are in the pool, whose statistics a segmenter has.
        events : Events
            Progress, where lesions are to be found.
        """
        if self.lesions is None:
            return hospital.images
        return self.lesions.beside(hospital, pool, events)


def read_start(bundle: Path, classifier: str) -> Start:
    """Read a classifier from the source's bundle, and its segmenter where lesions are seen."""
    opened = Bundle.open(bundle)
    facts = opened.manifest.facts["classifiers"][classifier]
    path = f"classifiers/{classifier}.safetensors"
    return Start(
        opened.id,
        classifier,
        load_safetensors(opened.read(path)),
        opened.manifest.files[path].sha256,
        from_bytes(opened.read(f"source/{classifier}.safetensors")).arrays["centroids"],
        facts["threshold_at_specificity_90"],
        read_lesion_finder(opened) if sees_lesions(classifier) else None,
    )
