"""Studies whose classifier sees each lesion beside the whole image."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load

from sonofed_client.adaptation.typiclust import places
from sonofed_client.enclave.handlers.selection import selected
from sonofed_client.enclave.site import Site
from sonofed_client.enclave.views import redrawn_as_seen_by, seen_by
from sonofed_client.settings import read_site
from sonofed_common.batch_norm import adapt_batch_norm
from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.results import read_results
from sonofed_common.contract.selection import budget_count
from sonofed_common.contract.study import ACTIVE_LEARNING, Study
from sonofed_common.data.lesions import cut_out, lesion_boxes
from sonofed_common.runtime import SILENT, Events, derive_seed
from sonofed_server.source.data import boxes_of, lesions_beside, load_source
from sonofed_server.source.settings import SourceSettings
from sonofed_simulations.engines.inline import run_inline
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.report.view import ScoredView
from sonofed_simulations.scenarios.scenario import read_scenario
from sonofed_simulations.tables.hospitals import read_hospitals
from sonofed_simulations.tables.start import read_start
from sonofed_simulations.views import site_views

pytestmark = pytest.mark.long

NETWORK = "shufflenet_v2_two_views"
TINY = Path(__file__).parent / "tiny_two_views.toml"
REDRAWN = {
    "name": "redrawn",
    "preset": "default",
    "phases": ACTIVE_LEARNING,
    "reconstruction": {"steps": 2},
    "embedding": {"rounds": 1, "dimension": 16},
    "clustering": {"clusters": 2, "iterations": 5},
    "selection": {"budgets": [0.6]},
}
"""The dual score in place of the preset's choice."""


def a_study(own, **changes):
    return Study.model_validate(own.scenario.study.model_dump(exclude_unset=True) | changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A laboratory of two views, its bundle and the settings of its sites."""
    own = Laboratory(read_scenario(str(TINY)), tmp_path_factory.mktemp("two-views"), None, SILENT)
    return own, own.prepare_source(), own.prepare_sites(0)


@pytest.fixture(scope="module")
def two_views(trained):
    """The laboratory, its bundle, its sites and the folder of a finished study."""
    own, bundle, sites = trained
    workspace = own.workspace(a_study(own, **REDRAWN), bundle, own.root / "redrawn")
    run_inline(workspace, sites, SILENT)
    return own, bundle, [Site(read_site(path)) for path in sites], workspace


@pytest.fixture(scope="module")
def preset(trained):
    """The same of the preset's own study, on the same sites, with its results."""
    own, bundle, sites = trained
    workspace = own.workspace(own.scenario.study, bundle, own.root / "study")
    results = run_inline(workspace, sites, SILENT)
    return own, bundle, sites, workspace, results


def test_the_preset_from_source_to_published_network(preset):
    own, bundle, _, workspace, results = preset
    assert tuple(phase.name for phase in results.phases) == own.scenario.study.phases
    assert results.clusters == () and results.converged is None
    for name, site in results.sites.items():
        sizes = tuple(budget_count(share, site.images) for share in (0.3, 0.6))
        assert site.selected_by_budget == sizes and site.labelled == sizes[-1], name
        assert site.reconstruction is None
        assert 0 <= site.classifiers[NETWORK].adapted["auroc"] <= 1
    final = load(Bundle.open(workspace.final_bundle).read(f"classifiers/{NETWORK}.safetensors"))
    start = load(Bundle.open(bundle).read(f"classifiers/{NETWORK}.safetensors"))
    assert final.keys() == start.keys()
    assert any(not np.array_equal(final[name], start[name]) for name in final)
    card = workspace.model_card.read_text()
    assert f"- {NETWORK} sees a second one, the lesion cut out" in card


def test_the_preset_takes_what_is_typical_of_both_views(preset):
    own, bundle, sites, _, _ = preset
    study, identity = own.scenario.study, Bundle.open(bundle).id
    for path in sites:
        site = Site(read_site(path))
        rows, images = seen_by(NETWORK, site, "pool", identity, study.image_size)
        model = site.classifier(identity, NETWORK).eval()
        adapt_batch_norm(model, images)
        with torch.no_grad():
            unit = torch.nn.functional.normalize(model.features(images), dim=1).numpy()
        small, large = (budget_count(share, len(rows)) for share in study.selection.budgets)
        seed = derive_seed(study.seed, 0, site.settings.name, "typiclust")
        order = np.argsort(places(unit, (small, large), seed))
        ids = [rows[n].id for n in order[:large]]
        assert selected(site, study.name) == [ids[:small], ids]


def test_a_preset_study_that_is_cut_off_goes_on_to_the_same_choice(preset):
    own, bundle, sites, *_ = preset
    study = a_study(own, name="again", phases=["enrol", "ship", "select"])
    workspace = own.workspace(study, bundle, own.root / "again")

    def stop(event):
        if event.get("task") == "select" and event.get("done") == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_inline(workspace, sites, Events(listeners=[stop]))
    run_inline(workspace, sites, SILENT)
    for path in sites:
        site = Site(read_site(path))
        assert selected(site, "again") == selected(site, own.scenario.study.name)


def test_what_the_lab_shows_of_the_preset_is_pictures_and_what_was_chosen(preset):
    own, bundle, sites, workspace, results = preset
    views = site_views(workspace, own.scenario.study, Bundle.open(bundle).id, sites)
    assert [view.name for view in views] == list(results.sites)
    for view in views:
        assert not isinstance(view, ScoredView) and view.reconstructions is None
        assert view.selected.sum() == results.sites[view.name].selected
        assert len(view.features) == len(view.images) == len(view.labels)


def test_a_whole_study_of_two_views_with_the_dual_score(two_views):
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
