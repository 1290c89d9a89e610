"""Scenarios: what validates, what is refused, and what a laboratory lays out."""

from __future__ import annotations

import copy
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from sonofed_client.enclave.site import Site
from sonofed_client.settings import read_site
from sonofed_common.contract.configuration import validate
from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.study import SEGMENTATION
from sonofed_common.runtime import SILENT
from sonofed_server.study.source import SourceFile
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.scenarios.scenario import Scenario, built_in, read_scenario

TINY: dict[str, Any] = {
    "name": "tiny",
    "title": "Tiny",
    "source": {
        "image_size": 32,
        "classifiers": [],
        "segmentation": {"encoder": "unet", "classes": 5},
        "diffusion": {"kind": "none"},
    },
    "source_phantoms": {"scanner": "source", "anatomy": "abdomen", "images": 4},
    "hospitals": {
        "hillview": {"phantoms": {"scanner": "hillview", "anatomy": "abdomen", "images": 12}}
    },
    "study": {"phases": ["enrol", "ship", "evaluate"]},
}


def tiny(**changes: Any) -> Scenario:
    """Make the tiny scenario with some of its values changed: ``source__classifiers=[...]``."""
    values = copy.deepcopy(TINY)
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = values
        for section in sections:
            place = place[section]
        place[key] = value
    return validate(Scenario, values, "tiny")


@pytest.mark.parametrize("name", sorted(built_in()))
def test_built_in_scenarios_validate_and_share_the_source(name: str) -> None:
    scenario = read_scenario(name)
    assert scenario.name == name
    assert scenario.study.image_size == scenario.source.image_size
    assert scenario.study.classifiers == scenario.source.classifiers
    assert set(scenario.study.cohort.sites) == set(scenario.hospitals)


def test_segmentation_scenarios_go_through_the_whole_track() -> None:
    expected = {"breast_segmentation": 2, "cross_device": 2, "nerves": 3, "phantom_multiclass": 5}
    for name, classes in expected.items():
        scenario = read_scenario(name)
        assert scenario.study.phases == SEGMENTATION
        assert scenario.study.classifiers == ()
        assert scenario.source.segmentation is not None
        assert scenario.source.segmentation.classes == classes


def test_the_organs_keep_their_sides() -> None:
    scenario = read_scenario("phantom_multiclass")
    assert scenario.source.segmentation is not None and not scenario.source.segmentation.flips
    breast = read_scenario("breast_segmentation")
    assert breast.source.segmentation is not None and breast.source.segmentation.flips


def test_no_device_is_both_source_and_hospital() -> None:
    for name in ("cross_device", "nerves"):
        scenario = read_scenario(name)
        devices = [*scenario.source.data.devices]
        for hospital in scenario.hospitals.values():
            assert hospital.kind == scenario.source.data.kind
            devices += hospital.devices
        assert len(set(devices)) == len(devices)
        assert not any(a != b and a.startswith(b) for a in devices for b in devices)


def test_a_study_that_segments_needs_a_source_that_does() -> None:
    with pytest.raises(ConfigurationError, match="'evaluate' needs a segmenter"):
        tiny(source__segmentation=None, source__classifiers=["efficientnet_lite0"])


def test_organs_have_no_class_labels() -> None:
    with pytest.raises(ConfigurationError, match="no class labels"):
        tiny(source__classifiers=["efficientnet_lite0"])


def test_reconstruction_is_measured_with_a_classifier() -> None:
    with pytest.raises(ConfigurationError, match="needs a classifier"):
        tiny(source__diffusion={"kind": "tiny"}, study__phases=["enrol", "ship", "reconstruct"])


def test_a_classifier_of_the_study_must_be_the_sources() -> None:
    with pytest.raises(ConfigurationError, match="name it in"):
        tiny(study__classifiers=["efficientnet_lite0"])


def test_replay_needs_synthetic_images_of_the_source() -> None:
    source = {"image_size": 32, "classifiers": ["shufflenet_v2"]}
    phantoms = {"scanner": "source", "images": 4}
    breast = {"hillview": {"phantoms": {"scanner": "hillview", "images": 12}}}
    study = {"finetuning": {"replay": 0.5}}
    values = {"source_phantoms": phantoms, "hospitals": breast, "study": study}
    with pytest.raises(ConfigurationError, match="give \\[source\\] a section 'synthetic'"):
        tiny(source=source, **values)
    scenario = tiny(source=source | {"synthetic": {"per_class": 5}}, **values)
    assert scenario.source.synthetic is not None and scenario.source.synthetic.per_class == 5


def test_a_real_source_needs_no_labels() -> None:
    values = {k: v for k, v in TINY.items() if k != "source_phantoms"}
    data = {"kind": "usgra_seg", "path": "usgra-seg", "devices": ["Mindray TE7 bright"]}
    scenario = validate(Scenario, {**values, "source": {**TINY["source"], "data": data}}, "real")
    assert scenario.needs_data and scenario.study.classifiers == ()


def test_a_scenario_file_is_read_by_path(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(TINY), encoding="utf-8")
    assert read_scenario(str(path)) == tiny()


def test_the_laboratory_lays_out_organs_and_shares_trained_branches(tmp_path: Path) -> None:
    scenario = tiny()
    laboratory = Laboratory(scenario, tmp_path, None, SILENT)
    (settings,) = laboratory.prepare_sites(0)
    site = Site(read_site(settings))
    index, masks = site.masks("pool", 32)
    assert len(index) == len(site.images("pool", 32)[0])
    assert 1 < int(masks.max()) <= 4

    laboratory.key.write_bytes(b"key")
    (tmp_path / "source").mkdir()
    spaces = [
        laboratory.workspace(scenario.study, tmp_path / "source", tmp_path / name)
        for name in ("first", "second", "first")
    ]
    (spaces[0].cache / "branch.safetensors").write_bytes(b"weights")
    assert (spaces[1].cache / "branch.safetensors").read_bytes() == b"weights"
    assert spaces[0].bundle.resolve() == tmp_path / "source"
    written = validate(SourceFile, tomllib.loads(spaces[1].source.read_text()), "source.toml")
    assert written.settings.digest() == scenario.source.digest()
    assert written.root == laboratory.source_data.resolve()
