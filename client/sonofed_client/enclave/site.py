"""The site as its handlers see it: settings, store, images and warm models."""

from __future__ import annotations

import hmac
import json
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from sonofed_client.enclave.intake import masks, pixels, take_in
from sonofed_client.enclave.policy import read_policy
from sonofed_client.enclave.store import CataloguedImage, open_store
from sonofed_client.settings import SiteSettings
from sonofed_common.contract.actions import Parameters
from sonofed_common.contract.bundle import Manifest, verify_manifest
from sonofed_common.contract.configuration import validate
from sonofed_common.contract.errors import OrderError, ParameterError, SonoFedError
from sonofed_common.contract.records import Array, Records
from sonofed_common.contract.segmentation import SegmentationFacts
from sonofed_common.models.classifiers import Classifier, build_classifier
from sonofed_common.models.diffusion import DiffusionStack
from sonofed_common.models.segmenter import Segmenter, build_segmenter
from sonofed_common.runtime import Events, device
from sonofed_common.security import sha256

T = TypeVar("T")
WARM_MODELS = 8
FEATURE_BATCH = 64
INTERRUPTED = 4
"""Most checkpoints of trainings that were broken off: of cancelled studies nobody takes them up."""


class Site:
    """A hospital's images and models, inside the enclave.

    Parameters
    ----------
    settings : SiteSettings
        The images are taken in at once.

    Attributes
    ----------
    policy : Policy
        Which its settings name, as it was read when the site was opened.
    events : Events
        Progress of the work at hand; a listener that raises ends that work.
    """

    def __init__(self, settings: SiteSettings) -> None:
        self.settings = settings
        self.store = open_store(settings)
        take_in(settings, self.store)
        self.policy = read_policy(settings.policy)
        self.device = device()
        self.events = Events()
        self._warm: OrderedDict[tuple[str, ...], Any] = OrderedDict()

    @property
    def snapshot(self) -> str:
        """Digest of the catalogue, which an intake beside this process may have replaced."""
        return take_in(self.settings, self.store)

    @contextmanager
    def checkpoint(
        self, parameters: Parameters, request: Records, *others: object
    ) -> Iterator[Path]:
        """Name the file in which one training keeps its state from epoch to epoch.

        Parameters
        ----------
        parameters : Parameters
            Of the action.
        request : Records
            Its arrays.
        others : object
            What else the training is made of, as JSON.

        Yields
        ------
        Path
            An interruption leaves the file, and the same request goes on from it; an end takes it
            away, and so does an error of the catalogue, which the same request would meet again. Of
            trainings that nobody took up again the newest `INTERRUPTED` files stay.
        """
        facts = [
            version("sonofed"),
            type(parameters).__name__,
            parameters.model_dump(mode="json"),
            request.digest(),
            self.snapshot,
            *others,
        ]
        name = sha256(json.dumps(facts, sort_keys=True).encode())
        path = self.store.folder / "checkpoints" / f"{name}.safetensors"
        self._forget_interrupted(path)
        try:
            yield path
        except SonoFedError:
            path.unlink(missing_ok=True)
            raise
        path.unlink(missing_ok=True)

    def _forget_interrupted(self, wanted: Path) -> None:
        others = [path for path in wanted.parent.glob("*") if path != wanted]
        others.sort(key=lambda path: (path.stat().st_mtime_ns, path.name))
        for path in others[:-INTERRUPTED]:
            path.unlink()

    def images(self, part: str, image_size: int) -> tuple[list[CataloguedImage], Tensor]:
        """Return one part (``pool`` or ``test``): rows, and images (N, 1, S, S) in [0, 1]."""
        key = ("pixels", self.snapshot, str(image_size))
        rows = self.store.images(part)
        whole = self._keep_warm(key, lambda: pixels(self.store, image_size))
        chosen = whole[torch.tensor([row.position for row in rows], dtype=torch.long)]
        return rows, chosen.to(torch.float32) / 255

    def masks(self, part: str, image_size: int) -> tuple[list[int], Tensor]:
        """Return the masks of one part.

        Parameters
        ----------
        part : str
            ``pool`` or ``test``.
        image_size : int
            S, pixels.

        Returns
        -------
        index : list of int
            Which of the rows and images of `images` have masks, ascending.
        masks : Tensor (M, 1, S, S)
            Classes, uint8, 0 is background; each lies over its image.
        """
        key = ("masks", self.snapshot, str(image_size))
        places = {row.position: n for n, row in enumerate(self.store.images(part))}
        positions, whole = self._keep_warm(key, lambda: masks(self.store, image_size))
        held = [n for n, position in enumerate(positions) if position in places]
        return [places[positions[n]] for n in held], whole[torch.tensor(held, dtype=torch.long)]

    def manifest(self, bundle: str) -> Manifest:
        """Return the manifest of an installed bundle.

        Raises
        ------
        OrderError
            The bundle is not installed here.
        """
        kept = self.store.get(f"bundle/{bundle}")
        if kept is None:
            raise OrderError("the study's bundle is not installed at this site; ship it first")
        return verify_manifest(
            kept.arrays["manifest"].tobytes(),
            kept.arrays["signature"].tobytes(),
            self.settings.coordinator_key,
        )

    def blob(self, bundle: str, path: str) -> bytes:
        """Return one file of an installed bundle."""
        manifest = self.manifest(bundle)
        if path not in manifest.files:
            raise ParameterError(f"the bundle holds no '{path}'; train the source with it")
        data = self.store.get_bytes(f"blob/{manifest.files[path].sha256}")
        if data is None:
            raise OrderError("the study's bundle is not whole at this site; ship it again")
        return data

    def classifier(self, bundle: str, name: str) -> Classifier:
        """Return a fresh copy of a source-trained classifier, on the site's device."""
        model = build_classifier(name, pretrained=False)
        weights = self._keep_warm(
            ("classifier", bundle, name),
            lambda: load_safetensors(self.blob(bundle, f"classifiers/{name}.safetensors")),
        )
        model.load_state_dict(weights)
        return model.to(self.device)

    def segmentation(self, bundle: str) -> SegmentationFacts:
        """Return what a bundle says of its segmenters.

        Raises
        ------
        ParameterError
            It holds none.
        """
        facts = self.facts(bundle).get("segmentation")
        if facts is None:
            raise ParameterError("the bundle holds no segmenter; train the source with one")
        return validate(SegmentationFacts, facts, "the bundle's facts")

    def segmenter(self, bundle: str, branch: str, image_size: int) -> Segmenter:
        """Return a fresh copy of a branch of a bundle, on the site's device."""
        facts = self.segmentation(bundle)
        model = build_segmenter(
            facts.encoder, facts.classes, image_size, facts.heads, pretrained=False
        )
        weights = self._keep_warm(
            ("segmenter", bundle, branch),
            lambda: load_safetensors(self.blob(bundle, f"segmenters/{branch}.safetensors")),
        )
        model.load_state_dict(weights)
        return model.to(self.device)

    def diffusion(self, bundle: str) -> DiffusionStack:
        """Return the bundle's diffusion stack, frozen."""
        return self._keep_warm(("diffusion", bundle), lambda: self._load_diffusion(bundle))

    def _load_diffusion(self, bundle: str) -> DiffusionStack:
        prefix = "diffusion/"
        paths = [path for path in self.manifest(bundle).files if path.startswith(prefix)]
        if not paths:
            raise ParameterError(
                "the bundle holds no diffusion stack; train the source with one, or leave the "
                "phase 'reconstruct' out"
            )
        with tempfile.TemporaryDirectory(dir=self.store.folder) as folder:
            for path in paths:
                target = Path(folder) / path.removeprefix(prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(self.blob(bundle, path))
            stack = DiffusionStack.load(Path(folder))
        return stack.to(self.device).eval().requires_grad_(False)

    def source_features(self, bundle: str, name: str, images: Tensor) -> Tensor:
        """Unit-length features (N, F) of images (N, V, S, S) under a source-trained classifier."""
        backbone = self.classifier(bundle, name).eval()
        with torch.inference_mode():
            batches = [
                backbone.features(images[start : start + FEATURE_BATCH].to(self.device)).cpu()
                for start in range(0, len(images), FEATURE_BATCH)
            ]
        return torch.nn.functional.normalize(torch.cat(batches), dim=1)

    def facts(self, bundle: str) -> dict[str, Any]:
        """Return the facts of a bundle's manifest."""
        return dict(self.manifest(bundle).facts)

    def study_artifact(self, study: str, name: str) -> str:
        """Name of an artifact that belongs to one study."""
        return f"study/{study}/{name}"

    def tie_secret(self, study: str, scores: Records) -> bytes | None:
        """Return the secret by which ties of one study's scores are broken.

        Other scores have another, so that their counts cannot be joined image by image. An oracle
        has none: in a simulation the ids themselves break ties, and results repeat.
        """
        if self.settings.oracle:
            return None
        use = f"ties {study} {scores.digest()}"
        return hmac.digest(self.store.image_key(), use.encode(), "sha256")

    def need(self, name: str, what: str) -> Records:
        """Return an artifact.

        Raises
        ------
        OrderError
            It is not there; ``what`` names it for the sentence.
        """
        kept = self.store.get(name)
        if kept is None:
            raise OrderError(f"this site has no {what} yet; run that phase first")
        return kept

    def _keep_warm(self, key: tuple[str, ...], make: Callable[[], T]) -> T:
        if key not in self._warm:
            self._warm[key] = make()
            while len(self._warm) > WARM_MODELS:
                self._warm.popitem(last=False)
        self._warm.move_to_end(key)
        return cast(T, self._warm[key])


def load_weights(model: nn.Module, arrays: Mapping[str, Array]) -> None:
    """Load named arrays into a model.

    Raises
    ------
    ParameterError
        Names, shapes or types do not fit, a value is not finite or a variance is negative.
    """
    state = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    if any(not bool(torch.isfinite(t).all()) for t in state.values() if t.is_floating_point()):
        raise ParameterError("the received weights are not finite; the round was not started")
    if any(n.endswith("running_var") and bool((t < 0).any()) for n, t in state.items()):
        raise ParameterError("the received weights hold a negative variance; check the aggregation")
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    misfit = ParameterError(
        "the received weights do not fit the model; check the study's classifier"
    )
    if any(types.get(name) != tensor.dtype for name, tensor in state.items()):
        raise misfit
    try:
        model.load_state_dict(state)
    except RuntimeError:
        raise misfit from None


def weights_of(model: nn.Module) -> dict[str, Array]:
    """Return a model's parameters and buffers as arrays."""
    return {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
