"""Source training from labelled data to a signed bundle."""

from __future__ import annotations

import platform
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import save

from sonofed_common.contract.bundle import (
    MANIFEST,
    Bundle,
    BundleWriter,
    Manifest,
    Provenance,
)
from sonofed_common.contract.errors import BundleError
from sonofed_common.contract.manifest import SYNTHETIC_IMAGES
from sonofed_common.contract.names import CLASSES
from sonofed_common.contract.records import Records, to_bytes
from sonofed_common.data.images import load_images
from sonofed_common.models.classifiers import sees_lesions
from sonofed_common.models.diffusion import build_tiny, load_sd15
from sonofed_common.models.stack import DiffusionStack
from sonofed_common.runtime import SILENT, Events, derive_seed, device, set_threads
from sonofed_common.security import public_hex
from sonofed_common.synthesis.synthetic import Drawing, synthesise
from sonofed_common.synthesis.wgan import train_drawing
from sonofed_server.source.classifiers import (
    classifier_facts,
    features,
    train_classifier,
    train_two_views,
)
from sonofed_server.source.data import (
    Part,
    SourceSet,
    lesions_beside,
    load_source,
    read_data,
)
from sonofed_server.source.diffusion import train_diffusion
from sonofed_server.source.segmentation_data import (
    SegmentationPart,
    SegmentationSet,
    load_segmentation,
    united_provenance,
)
from sonofed_server.source.segmenter import segmentation_facts, segmenter_facts, train_segmenter
from sonofed_server.source.settings import SegmenterTraining, SourceSettings, SyntheticImages
from sonofed_server.source.statistics import feature_statistics
from sonofed_server.source.synthetic import EdgeDrawing

CHECKPOINTS = "checkpoints"
LIBRARIES = ("sonofed", "torch", "monai", "diffusers", "transformers")


def train_source(
    settings: SourceSettings,
    data_root: Path,
    out: Path,
    signing_key: Ed25519PrivateKey,
    events: Events = SILENT,
) -> Path:
    """Train classifiers, segmenter and diffusion stack, and write the signed bundle.

    Parameters
    ----------
    settings : SourceSettings
        What to train.
    data_root : Path
        Folder that the settings' data path starts from.
    out : Path
        Folder of the bundle. Checkpoints stand in it until the bundle is signed: the same call
        after an interruption goes on from them and ends with the same weights, on CPU bit for
        bit. A bundle of the same data, settings, versions and key that is already there is kept.
    signing_key : Ed25519PrivateKey
        The coordinator's.
    events : Events
        Gets progress, and the metrics of each classifier and of the segmenter.

    Returns
    -------
    Path
        The bundle: ``classifiers/<name>.safetensors``, ``source/<name>.safetensors`` (records with
        `feature_statistics`), ``segmenters/source.safetensors``, ``diffusion/...`` in diffusers'
        folder format, and ``synthetic/source.safetensors`` (records of `synthesise`).

    Raises
    ------
    DataMissingError, OneClassError, ConfigurationError
        See `load_source`, `load_segmentation`, `train_segmenter` and `synthesise`.
    BundleError
        The bundle that is there is damaged or was changed.
    DivergenceError
        A loss or a weight is not finite.
    """
    set_threads(settings.threads)
    before = _signed_before(out)
    reading = read_data(settings, data_root, events)
    source = segmentation = None
    if settings.classifiers:
        source = load_source(settings, data_root, events, reading)
    if settings.segmentation is not None:
        segmentation = load_segmentation(settings, data_root, events, reading)
    data = united_provenance(settings, source, segmentation)
    provenance = Provenance(
        data=data,
        seeds={"source": settings.seed},
        versions={
            "python": platform.python_version(),
            **{library: _version(library) for library in LIBRARIES},
        },
        settings=settings.digest(),
    )
    made = (provenance, public_hex(signing_key))
    if before is not None and (before.provenance, before.public_key) == made:
        events.emit("source bundle", state="already there")
        return out
    # Built first, so that a bad folder of weights is found before hours of training.
    stack = None if settings.diffusion.kind == "none" else _build(settings, data_root)
    # Named by data and settings: a changed run never goes on from weights of another one. No weight
    # depends on the synthetic images, which may have to be asked for anew.
    training = settings.model_copy(update={"synthetic": None})
    run = f"{training.digest()[:16]}-{data.digest[:16]}"
    checkpoints = out / CHECKPOINTS / run
    writer = BundleWriter(out, name=settings.name, kind="source", provenance=provenance)
    writer.facts = {"image_size": settings.image_size, "classes": settings.classes}
    writer.facts["classifiers"] = {}
    if source is not None:
        writer.facts["classifiers"] = {
            name: _add_classifier(writer, name, settings, source, checkpoints, events)
            for name in settings.classifiers
        }
    if segmentation is not None and settings.segmentation is not None:
        writer.facts |= _add_segmenter(
            writer, settings, settings.segmentation, segmentation, checkpoints, events
        )
    images = source or segmentation
    writer.facts["diffusion"] = (
        None
        if stack is None or images is None
        else _add_diffusion(writer, settings, stack, images.pool, checkpoints, events)
    )
    if source is not None and settings.synthetic is not None:
        wanted = [settings.synthetic.per_class] * len(CLASSES)
        drawing = _drawing(settings, settings.synthetic, source, stack, checkpoints, events)
        seed = derive_seed(settings.seed, "synthetic")
        records, facts = synthesise(
            drawing, source.pool.labelled, source.test.labelled, wanted, seed, events
        )
        writer.add(SYNTHETIC_IMAGES, to_bytes(records))
        writer.facts["synthetic"] = {"generator": settings.synthetic.generator, **facts}
        events.emit("synthetic source images", **writer.facts["synthetic"])
    bundle = writer.sign(signing_key)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    size = sum(bundle.manifest.blobs.values())
    events.emit("source bundle", state="signed", id=bundle.id, bytes=size)
    return out


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        # Run from a source tree that was not installed.
        return "unknown"


def _signed_before(out: Path) -> Manifest | None:
    """Return the manifest of the bundle that is there, if one was signed."""
    if not (out / MANIFEST).exists():
        return None
    try:
        return Bundle.open(out).manifest
    except BundleError as error:
        raise BundleError(
            f"the bundle {out} is not as it was signed ({error.message.partition(';')[0]}); find "
            "out who changed it, or delete the folder to train anew"
        ) from None


def _add_classifier(
    writer: BundleWriter,
    name: str,
    settings: SourceSettings,
    source: SourceSet,
    checkpoints: Path,
    events: Events,
) -> dict[str, Any]:
    seed = derive_seed(settings.seed, "classifier", name)
    checkpoint = checkpoints / f"{name}.safetensors"
    pool, test, train = source.pool, source.test, train_classifier
    if sees_lesions(name):
        pool, test, train = lesions_beside(pool), lesions_beside(test), train_two_views
    model = train(name, pool, settings.training, seed, checkpoint, events)
    facts = classifier_facts(model, test)
    events.emit("source classifier", classifier=name, **facts["metrics"])
    statistics = feature_statistics(features(model, pool.images), seed)
    writer.add(f"classifiers/{name}.safetensors", weights_bytes(model))
    arrays = {key: tensor.numpy() for key, tensor in statistics.items()}
    writer.add(f"source/{name}.safetensors", to_bytes(Records(arrays)))
    return facts


def _add_segmenter(
    writer: BundleWriter,
    settings: SourceSettings,
    wanted: SegmenterTraining,
    data: SegmentationSet,
    checkpoints: Path,
    events: Events,
) -> dict[str, Any]:
    seed = derive_seed(settings.seed, "segmenter")
    checkpoint = checkpoints / "segmenter.safetensors"
    model = train_segmenter(data.pool, wanted, seed, checkpoint=checkpoint, events=events)
    facts = segmenter_facts(model, data.test)
    events.emit("source segmenter", temperature=facts["temperature"], **facts["metrics"])
    writer.add("segmenters/source.safetensors", weights_bytes(model))
    return {
        "segmentation": segmentation_facts(wanted, data.pool).model_dump(mode="json"),
        "segmenters": {"source": facts},
    }


def weights_bytes(model: torch.nn.Module) -> bytes:
    """Encode a model's parameters and buffers as one safetensors file."""
    # safetensors takes neither channels-last tensors nor shared storage.
    return save(
        {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in model.state_dict().items()
        }
    )


def _add_diffusion(
    writer: BundleWriter,
    settings: SourceSettings,
    stack: DiffusionStack,
    pool: Part | SegmentationPart,
    checkpoints: Path,
    events: Events,
) -> dict[str, Any]:
    stack.to(device())
    images = pool.images
    if stack.image_size != settings.image_size:
        images, _, _ = load_images(list(pool.samples), stack.image_size)
    train_diffusion(
        stack,
        images,
        epochs=settings.diffusion.epochs,
        learning_rate=settings.diffusion.learning_rate,
        batch_size=settings.diffusion.batch_size,
        seed=derive_seed(settings.seed, "diffusion"),
        checkpoint=checkpoints / "diffusion.safetensors",
        events=events,
    )
    with tempfile.TemporaryDirectory() as folder:
        stack.save(Path(folder))
        writer.add_tree("diffusion", Path(folder))
    return {
        "kind": settings.diffusion.kind,
        "image_size": stack.image_size,
        "prompt": settings.diffusion.prompt,
        "canny": dict(stack.edge_settings),
    }


def _drawing(
    settings: SourceSettings,
    wanted: SyntheticImages,
    source: SourceSet,
    stack: DiffusionStack | None,
    checkpoints: Path,
    events: Events,
) -> Drawing:
    """Return what draws the synthetic images; a GAN is trained for it, the stack is there."""
    if wanted.generator == "wgan":
        seed = derive_seed(settings.seed, "wgan")
        pool, files = source.pool, [checkpoints / f"wgan-{name}.safetensors" for name in CLASSES]
        return train_drawing(pool.images, pool.labels, settings.wgan, seed, files, events)
    # The settings refuse a section `synthetic` that has no model to draw with.
    assert stack is not None
    return EdgeDrawing(stack, source.pool, wanted)


def _build(settings: SourceSettings, data_root: Path) -> DiffusionStack:
    diffusion = settings.diffusion
    if diffusion.sd15 is not None and diffusion.biomedclip is not None and diffusion.kind == "sd15":
        folders = data_root / diffusion.sd15, data_root / diffusion.biomedclip
        return load_sd15(*folders, prompt=diffusion.prompt)
    return build_tiny(settings.image_size, derive_seed(settings.seed, "stack"))
