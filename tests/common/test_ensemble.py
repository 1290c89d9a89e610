import copy

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.torch import save

from sonofed_common.batch_norm import adapt_batch_norm, set_statistics, statistics_of
from sonofed_common.contract.bundle import BundleWriter, DataProvenance, Provenance
from sonofed_common.contract.errors import BundleError, OrderError, SiteEmptyError
from sonofed_common.contract.records import Records, to_bytes
from sonofed_common.contract.segmentation import Normalisation, SegmentationFacts
from sonofed_common.contract.study_segmentation import Infusion
from sonofed_common.models.classifiers import build_classifier
from sonofed_common.models.ensemble import (
    INFUSION,
    OWN,
    SegmentationEnsemble,
    infusion_records,
    load_ensemble,
)
from sonofed_common.models.infusion import InfusionHead
from sonofed_common.models.segmenter import build_segmenter

SIZE, CLASSES = 32, 3
NETWORK = "shufflenet_v2"
FACTS = SegmentationFacts(
    encoder="unet",
    classes=CLASSES,
    heads=("unet", "aspp"),
    class_ratio=(0.8, 0.1, 0.1),
    foreground_range=(0.1, 0.3),
    flips=True,
)


def plain(model):
    return save({n: t.contiguous().clone() for n, t in model.state_dict().items()})


def said(**changes):
    """What a bundle says of its infusion, changed."""
    said = {"branches": ["target-north", "source"], "infusion": Infusion().model_dump(mode="json")}
    return to_bytes(Records({"temperatures": np.ones(2)}, said | changes))


@pytest.fixture(scope="module")
def networks():
    branches = {
        name: build_segmenter("unet", CLASSES, SIZE, FACTS.heads, False, seed)
        for seed, name in enumerate(("target-north", "source"))
    }
    return branches, {NETWORK: build_classifier(NETWORK, pretrained=False)}


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def ensemble_of(networks, rule="gate", normalisation=OWN, mirrored=False):
    # `adapt` changes them in place.
    branches, classifiers = copy.deepcopy(networks)
    head = InfusionHead(len(branches), Infusion(rule=rule, mirrored=mirrored), CLASSES)
    generator = torch.Generator().manual_seed(1)
    for weight in head.parameters():
        weight.data = torch.randn(weight.shape, generator=generator)
    head.temperatures.copy_(torch.tensor([0.5, 3.0]))
    return SegmentationEnsemble(branches, head, classifiers, normalisation)


def written(folder, ensemble, facts=FACTS, **changes):
    provenance = Provenance(
        data=DataProvenance(name="phantoms", digest="0" * 64, images=1, groups=1), settings="0" * 64
    )
    writer = BundleWriter(folder, name="trial", kind="final", provenance=provenance)
    files = {f"segmenters/{n}.safetensors": plain(m) for n, m in ensemble.branches.items()}
    files |= {f"classifiers/{n}.safetensors": plain(m) for n, m in ensemble.classifiers.items()}
    files[INFUSION] = to_bytes(infusion_records(list(ensemble.branches), ensemble.head))
    for path, data in (files | changes).items():
        if data is not None:
            writer.add(path, data)
    writer.facts = {
        "image_size": SIZE,
        "segmentation": facts.model_dump(mode="json"),
        "normalisation": ensemble.normalisation.model_dump(),
    }
    return writer.sign(Ed25519PrivateKey.generate())


@pytest.mark.parametrize(
    ("rule", "mirrored"), [("entropy", False), ("gate", False), ("gate", True)]
)
def test_a_published_ensemble_predicts_as_before(networks, images, tmp_path, rule, mirrored):
    ensemble = ensemble_of(networks, rule, mirrored=mirrored)
    again = load_ensemble(written(tmp_path, ensemble))
    assert list(again.branches) == ["target-north", "source"]
    ensemble.adapt(images)
    again.adapt(images)
    first, second = ensemble.predict(images), again.predict(images)
    for field in ("probabilities", "mask", "confidence", "weights"):
        assert torch.equal(getattr(first, field), getattr(second, field)), field
    assert torch.equal(first.classes[NETWORK], second.classes[NETWORK])


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_prediction_is_the_infusion_of_its_branches(networks, images, mirrored):
    ensemble = ensemble_of(networks, "mean", mirrored=mirrored)
    ensemble.adapt(images)
    said = ensemble.predict(images)
    assert said.mask.shape == (3, SIZE, SIZE) and said.mask.dtype == torch.uint8
    assert said.weights.shape == (2, 3, SIZE, SIZE)
    with torch.inference_mode():
        calibrated = [
            (model.probabilities(images, mirrored).log() / t).softmax(1)
            for model, t in zip(ensemble.branches.values(), (0.5, 3.0), strict=True)
        ]
        malignant = ensemble.classifiers[NETWORK](images).softmax(1)[:, 1]
    torch.testing.assert_close(said.probabilities, (calibrated[0] + calibrated[1]) / 2)
    torch.testing.assert_close(said.classes[NETWORK], malignant)
    first, second = said.probabilities.sort(1, descending=True).values[:, :2].unbind(1)
    torch.testing.assert_close(said.confidence, first - second)
    assert torch.equal(said.mask.long(), said.probabilities.argmax(1))


def test_classifiers_are_optional(networks, images, tmp_path):
    branches, _ = copy.deepcopy(networks)
    alone = {"source": branches["source"]}
    ensemble = SegmentationEnsemble(alone, InfusionHead(1, Infusion(), CLASSES))
    again = load_ensemble(written(tmp_path, ensemble))
    again.adapt(images)
    ensemble.adapt(images)
    said = again.predict(images)
    assert said.classes == {}
    assert bool((said.weights == 1).all())
    with torch.inference_mode():
        torch.testing.assert_close(
            said.probabilities, branches["source"].probabilities(images), atol=1e-5, rtol=1e-4
        )


def test_classifiers_whose_layers_stayed_at_the_sites_are_left_out(networks, tmp_path):
    rule = Normalisation(segmenters="site", classifiers="local")
    bundle = written(tmp_path, ensemble_of(networks, normalisation=rule))
    assert f"classifiers/{NETWORK}.safetensors" in bundle.paths
    again = load_ensemble(bundle)
    assert not again.classifiers and again.branches.keys() == networks[0].keys()


def changed(model, carried):
    pairs = zip(statistics_of(model).values(), carried.values(), strict=True)
    return any(not torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("segmenters", ["site", "mixed"])
@pytest.mark.parametrize("classifiers", ["site", "global"])
def test_statistics_follow_the_rule_of_the_study(
    networks, images, tmp_path, segmenters, classifiers
):
    rule = Normalisation(segmenters=segmenters, classifiers=classifiers)
    ensemble = load_ensemble(written(tmp_path, ensemble_of(networks, normalisation=rule)))
    assert ensemble.normalisation == rule
    everyone = {**ensemble.branches, **ensemble.classifiers}
    carried = {name: statistics_of(model) for name, model in everyone.items()}
    ensemble.adapt(1 - images)
    ensemble.adapt(images)  # replaces the first call: the mix is with what the weights carry
    for name, model in ensemble.branches.items():
        expected = copy.deepcopy(model)
        set_statistics(expected, carried[name])
        prior = carried[name] if segmenters == "mixed" else None
        adapt_batch_norm(expected, images, prior=prior)
        assert not changed(model, statistics_of(expected)) and changed(model, carried[name])
    classifier = ensemble.classifiers[NETWORK]
    assert changed(classifier, carried[NETWORK]) == (classifiers == "site")


def test_nothing_is_predicted_with_statistics_of_nobody(networks, images, tmp_path):
    ensemble = load_ensemble(written(tmp_path, ensemble_of(networks)))
    with pytest.raises(OrderError, match=r"call adapt\(images\)"):
        ensemble.predict(images)
    with pytest.raises(SiteEmptyError, match="two images or more"):
        ensemble.adapt(images[:1])
    with pytest.raises(OrderError):
        ensemble.predict(images)
    ensemble.adapt(images)
    assert ensemble.predict(images[:1]).mask.shape == (1, SIZE, SIZE)


def test_a_bundle_must_say_whose_statistics_its_weights_take(networks, tmp_path):
    bundle = written(tmp_path, ensemble_of(networks))
    facts = {k: v for k, v in bundle.manifest.facts.items() if k != "normalisation"}
    bundle.manifest = bundle.manifest.model_copy(update={"facts": facts})
    with pytest.raises(BundleError, match="take the final bundle"):
        load_ensemble(bundle)


@pytest.mark.parametrize(
    ("path", "data"),
    [
        (INFUSION, None),
        (INFUSION, to_bytes(Records())),
        (INFUSION, b"nonsense"),
        (INFUSION, said(branches=3)),
        (INFUSION, said(infusion={"rule": "loudest"})),
        ("segmenters/source.safetensors", None),
        ("segmenters/source.safetensors", save({"weight": torch.zeros(1)})),
        ("segmenters/source.safetensors", b"nonsense"),
    ],
)
def test_a_bundle_that_holds_no_whole_ensemble_is_refused(networks, tmp_path, path, data):
    with pytest.raises(BundleError):
        load_ensemble(written(tmp_path, ensemble_of(networks), **{path: data}))


@pytest.mark.parametrize(
    "change", [{"encoder": "resnet999"}, {"classes": 1}, {"heads": ("unet", "none")}]
)
def test_facts_of_another_version_are_refused_by_name(networks, tmp_path, change):
    facts = FACTS.model_copy(update=change)
    with pytest.raises(BundleError, match=r"not of this version: .*(resnet999|classes|heads)"):
        load_ensemble(written(tmp_path, ensemble_of(networks), facts))
