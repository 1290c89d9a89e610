import shutil

import pytest
from enclave_talk import BRANCHES, IMAGES, talk
from safetensors.torch import save

from sonofed_client.enclave.enclave import InProcessEnclave
from sonofed_client.settings import SiteData, SiteSettings
from sonofed_common.contract.bundle import Bundle, BundleWriter
from sonofed_common.models.segmenter import build_segmenter
from sonofed_common.security import load_or_create_signing_key, public_hex
from sonofed_simulations.phantoms.dataset import write_dataset
from sonofed_simulations.phantoms.scanner import SCANNERS


@pytest.fixture(scope="session")
def hospital(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hospital") / "north"
    return write_dataset(folder, SCANNERS["riverside"], IMAGES, 5, 64, 0.4)


@pytest.fixture(scope="session")
def bundle(laboratory):
    return Bundle.open(laboratory.prepare_source())


@pytest.fixture(scope="session")
def coordinator(laboratory):
    return load_or_create_signing_key(laboratory.key)


@pytest.fixture
def site(tmp_path, hospital, coordinator):
    data = SiteData(kind="table", path=hospital, test_fraction=0.4)
    return SiteSettings(
        name="north",
        store=tmp_path / "store",
        data=data,
        coordinator_key=public_hex(coordinator),
        auto_approve=(public_hex(coordinator),),
        oracle=True,
        threads=1,
    )


@pytest.fixture
def own(site, hospital, tmp_path):
    """Settings over a copy of the data that a test may spoil."""
    copy = shutil.copytree(hospital, tmp_path / "copy")
    return site.model_copy(update={"data": site.data.model_copy(update={"path": copy})})


@pytest.fixture(scope="session")
def segmenters(coordinator, bundle, tmp_path_factory):
    """A bundle of two branches; their range of foreground lets every round through."""
    provenance = bundle.manifest.provenance
    folder = tmp_path_factory.mktemp("segmenters") / "branches"
    writer = BundleWriter(folder, name="branches", kind="source", provenance=provenance)
    for seed, name in enumerate(BRANCHES):
        model = build_segmenter("unet", 2, 32, pretrained=False, seed=seed)
        weights = {k: tensor.contiguous() for k, tensor in model.state_dict().items()}
        writer.add(f"segmenters/{name}.safetensors", save(weights))
    writer.facts["segmentation"] = {
        "encoder": "unet",
        "classes": 2,
        "heads": ["unet", "aspp"],
        "class_ratio": [0.9, 0.1],
        "foreground_range": [0.0, 1.0],
        "flips": True,
    }
    return writer.sign(coordinator)


@pytest.fixture(scope="module")
def talked(tmp_path_factory, hospital, bundle, coordinator):
    store = tmp_path_factory.mktemp("talked") / "store"
    data = SiteData(kind="table", path=hospital, test_fraction=0.4)
    key = public_hex(coordinator)
    enclave = InProcessEnclave(
        SiteSettings(
            name="north",
            store=store,
            data=data,
            coordinator_key=key,
            auto_approve=(key,),
            oracle=True,
            threads=1,
        )
    )
    talk(enclave, bundle)
    return enclave
