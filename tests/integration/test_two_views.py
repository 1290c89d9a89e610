"""A study whose classifier sees each lesion beside the whole image."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from sonofed_client.enclave.site import Site
from sonofed_client.enclave.views import redrawn_as_seen_by, seen_by
from sonofed_client.settings import read_site
from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.results import read_results
from sonofed_common.data.lesions import cut_out, lesion_boxes
from sonofed_common.runtime import SILENT
from sonofed_server.source.data import boxes_of, lesions_beside, load_source
from sonofed_server.source.settings import SourceSettings
from sonofed_simulations.engines.inline import run_inline
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.scenarios.scenario import Scenario
from sonofed_simulations.tables.hospitals import read_hospitals
from sonofed_simulations.tables.start import read_start

NETWORK = "shufflenet_v2_two_views"
PHASES = ("enrol", "ship", "reconstruct", "embed", "cluster", "select", "annotate", "classifier",
          "publish")  # fmt: skip


@pytest.fixture(scope="module")
def two_views(laboratory, tmp_path_factory):
    """A laboratory of two views, its sites and the folder of a finished study."""
    scenario = laboratory.scenario
    segmentation = {"encoder": "unet", "epochs": 3, "learning_rate": 3e-3, "batch_size": 8}
    source = scenario.source.model_dump(mode="json")
    source |= {"classifiers": [NETWORK], "segmentation": segmentation}
    study = scenario.study.model_dump(mode="json", exclude_unset=True)
    study |= {"classifiers": [NETWORK], "phases": PHASES}
    values = scenario.model_dump(mode="json", exclude_none=True)
    made = Scenario.model_validate({**values, "source": source, "study": study})
    root = tmp_path_factory.mktemp("two-views")
    own = Laboratory(made, root, None, SILENT)
    bundle, sites = own.prepare_source(), own.prepare_sites(0)
    workspace = own.workspace(made.study, bundle, root / "study")
    run_inline(workspace, sites, SILENT)
    return own, bundle, [Site(read_site(path)) for path in sites], workspace


def test_a_whole_study_of_two_views(two_views):
    _, bundle, sites, workspace = two_views
    results = read_results(workspace.results)
    for site in sites:
        measured = results.sites[site.settings.name]
        assert 0 <= measured.classifiers[NETWORK].adapted["auroc"] <= 1
        assert np.isfinite(measured.reconstruction.feature_distance)
        assert measured.labelled > 0
    final = load(Bundle.open(workspace.final_bundle).read(f"classifiers/{NETWORK}.safetensors"))
    start = load(Bundle.open(bundle).read(f"classifiers/{NETWORK}.safetensors"))
    assert final.keys() == start.keys()
    for view in ("whole.", "lesion."):
        changed = [
            n for n in final if n.startswith(view) and not np.array_equal(final[n], start[n])
        ]
        assert changed, view


def test_a_site_shows_the_lesion_that_its_segmenter_outlines(two_views):
    own, bundle, sites, _ = two_views
    identity, size = Bundle.open(bundle).id, own.scenario.study.image_size
    site = sites[0]
    rows, seen = seen_by(NETWORK, site, "test", identity, size)
    _, images = site.images("test", size)
    _, larger = site.images("test", 2 * size)
    assert seen.shape == (len(rows), 2, size, size) and torch.equal(seen[:, :1], images)
    (name,) = site.store.names("lesions/")
    kept = torch.from_numpy(np.array(site.store.get(name).arrays["boxes"]))
    boxes = kept[[row.position for row in rows]]
    assert torch.equal(seen[:, 1:], cut_out(larger, boxes, size))
    assert float(boxes[:, 2].min()) < 1
    _, single = seen_by("shufflenet_v2", site, "test", identity, size)
    assert torch.equal(single, images)
    _, pool = site.images("pool", size)
    redrawn = redrawn_as_seen_by(NETWORK, site, pool, identity)
    assert torch.equal(redrawn[:, :1], pool) and redrawn.shape[1] == 2


def test_a_table_shows_a_hospitals_images_as_its_site_does(two_views):
    own, bundle, sites, _ = two_views
    start, size = read_start(bundle, NETWORK), own.scenario.study.image_size
    site, hospital = sites[0], read_hospitals(own, size)[0]
    parts = [site.images(part, size) for part in ("pool", "test")]
    files = {sample.name: sample for sample in hospital.samples}
    samples = tuple(files[row.name] for rows, _ in parts for row in rows)
    images = torch.cat([images for _, images in parts])
    pool = range(len(parts[0][0]))
    seen = start.seen(replace(hospital, samples=samples, images=images), pool, SILENT)
    expected = [seen_by(NETWORK, site, part, start.bundle, size)[1] for part in ("pool", "test")]
    # A site keeps its images as bytes.
    assert torch.allclose(seen, torch.cat(expected), atol=1 / 255)


def test_the_source_cuts_lesions_out_by_their_masks(two_views):
    own = two_views[0]
    data = load_source(own.scenario.source, own.source_data)
    part = lesions_beside(data.test)
    boxes = boxes_of(data.test)
    assert part.images.shape[1] == 2 and torch.equal(part.images[:, :1], data.test.images)
    # Every phantom has a lesion, smaller than the image.
    assert len(boxes) == len(data.test.samples) and float(boxes[:, 2].max()) <= 1
    assert float(boxes[:, 2].mean()) < 0.95
    assert torch.equal(lesion_boxes(torch.zeros(1, 8, 8)), torch.tensor([[0.5, 0.5, 1.0]]))


def test_two_views_need_a_segmenter_and_masks(laboratory):
    source = laboratory.scenario.source.model_dump(mode="json")
    with pytest.raises(ValueError, match="add the section 'segmentation'"):
        SourceSettings.model_validate({**source, "classifiers": [NETWORK]})
    study = laboratory.scenario.study.model_dump(mode="json", exclude_unset=True)
    study |= {"classifiers": [NETWORK], "finetuning": {"replay": 0.5}}
    with pytest.raises((ValueError, ConfigurationError), match=r"set finetuning\.replay to 0"):
        type(laboratory.scenario.study).model_validate(study)
