"""Studies whose hospitals share images of their own GANs, in one process and over real ones."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tomli_w
import torch
from safetensors.numpy import load

from deployed.deployment import Deployment, needs_front, run
from sonofed_client.enclave.enclave import HANDLERS
from sonofed_client.enclave.handlers import synthesis
from sonofed_client.enclave.policy import SYNTHETIC_RULE, policy_text_of_all
from sonofed_client.enclave.store import open_store
from sonofed_client.enclave.wall import open_ledger
from sonofed_client.settings import read_site
from sonofed_common.contract.bundle import Bundle, BundleWriter
from sonofed_common.contract.errors import BundleError, QuorumError
from sonofed_common.contract.manifest import SHARED_IMAGES
from sonofed_common.contract.records import Records, from_bytes
from sonofed_common.contract.results import read_results
from sonofed_common.contract.study import Study
from sonofed_common.runtime import SILENT, Events
from sonofed_common.security import load_signing_key, public_hex
from sonofed_common.synthesis.memorisation import dissimilarity
from sonofed_server.study.desk import find
from sonofed_simulations.engines.inline import run_inline
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.scenarios.scenario import read_scenario

pytestmark = pytest.mark.slow

SCENARIO = Path(__file__).with_name("tiny_synthesis.toml")
SMALL = "hillview"
"""Has too few labels for a GAN."""


@pytest.fixture(scope="module")
def sharing(tmp_path_factory) -> Laboratory:
    laboratory = Laboratory(
        read_scenario(str(SCENARIO)), tmp_path_factory.mktemp("sharing"), None, SILENT
    )
    laboratory.prepare_source()
    return laboratory


def lay_out(laboratory, root, **changes):
    values = laboratory.scenario.study.model_dump(mode="json", exclude_none=True)
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    sites = laboratory.prepare_sites(0, root / "sites")
    study = Study.model_validate(values)
    return laboratory.workspace(study, laboratory.root / "source", root / "study"), sites


@pytest.fixture(scope="module")
def inline(sharing, tmp_path_factory):
    workspace, sites = lay_out(sharing, tmp_path_factory.mktemp("inline"))
    return workspace, sites, run_inline(workspace, sites, Events())


def shared_images(workspace):
    bundle = Bundle.open(workspace.synthetic, public_hex(load_signing_key(workspace.key)))
    assert bundle.manifest.kind == "synthetic" and bundle.paths == [SHARED_IMAGES]
    return from_bytes(bundle.read(SHARED_IMAGES)).arrays


def weights(workspace):
    bundle = Bundle.open(workspace.final_bundle)
    return load(bundle.read("classifiers/shufflenet_v2.safetensors"))


def test_what_passes_one_sites_gate_reaches_every_site(inline):
    workspace, sites, results = inline
    images = shared_images(workspace)
    counts = {name: site.synthetic for name, site in results.sites.items()}
    assert counts[SMALL] == 0 < counts["riverside"] == len(images["images"])
    assert set(images["labels"]) == {0, 1}
    assert results == read_results(workspace.results) and results.missing_sites == ()
    digest = Bundle.open(workspace.synthetic).manifest.files[SHARED_IMAGES].sha256
    for site in sites:
        assert open_store(read_site(site)).get_bytes(f"blob/{digest}") is not None
    assert f"{counts['riverside']} of riverside, 0 of {SMALL}" in workspace.model_card.read_text()
    kept = open_store(read_site(sites[0])).get("pixels/16")
    real = torch.from_numpy(kept.arrays["pixels"]).float() / 255
    shown = torch.from_numpy(images["images"])[:, None].float() / 255
    assert float(dissimilarity(shown, real).amin()) > 0.05


def test_the_images_are_replayed_where_nothing_was_drawn(inline, sharing, tmp_path):
    """The site without GANs trains on the others' images: its own update changes with them."""
    workspace, sites, _ = inline
    other, other_sites = lay_out(sharing, tmp_path, synthesis={"per_class": 2})
    run_inline(other, other_sites, Events())
    assert len(shared_images(other)["images"]) < len(shared_images(workspace)["images"])

    def sent(of):
        entries = open_ledger(open_store(read_site(of))).entries()
        return [e["sha256"] for e in entries if e["action"] == "train.classifier" and e["sha256"]]

    small = [n for n, site in enumerate(sites) if read_site(site).name == SMALL]
    assert sent(sites[small[0]])[0] != sent(other_sites[small[0]])[0]


def test_an_interrupted_study_ends_with_the_same_bits(inline, sharing, tmp_path):
    workspace, sites = lay_out(sharing, tmp_path)

    def interrupt(event):
        if event["event"] == "phase-finished" and event.get("phase") == "synthesise":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_inline(workspace, sites, Events(listeners=[interrupt]))
    run_inline(workspace, sites, Events())
    whole, again = weights(inline[0]), weights(workspace)
    assert all(np.array_equal(whole[name], again[name]) for name in whole)


def standard_at(site):
    """Have a hospital keep to the standard policy."""
    read = read_site(site)
    read.policy.write_text(policy_text_of_all().replace(SYNTHETIC_RULE.read_text(), ""))


def test_a_hospital_that_does_not_share_is_left_out_of_nothing_else(inline, sharing, tmp_path):
    """No quorum is named, so that all hospitals are needed in every phase."""
    workspace, sites = lay_out(sharing, tmp_path)
    (refusing,) = (site for site in sites if read_site(site).name == SMALL)
    standard_at(refusing)
    results = run_inline(workspace, sites, Events())
    assert results.missing_sites == ()
    assert [site.synthetic is None for site in results.sites.values()] == [False, True]
    assert all(site.classifiers["shufflenet_v2"].adapted for site in results.sites.values())
    here, there = shared_images(workspace), shared_images(inline[0])
    assert all(np.array_equal(here[name], there[name]) for name in here)
    (entry,) = (
        e
        for e in open_ledger(open_store(read_site(refusing))).entries()
        if e["action"] == "train.synthesise"
    )
    assert entry["outcome"] == "refused" and entry["bytes"] == 0


def test_images_that_were_not_asked_for_cost_a_site_its_place(sharing, tmp_path, monkeypatch):
    """A site answers more than it was asked for: the study goes on without it, if it may."""
    answered = synthesis.synthesise_images

    def more(site, parameters, request):
        reply = answered(site, parameters, request)
        if site.settings.name == SMALL:
            return reply
        many = {name: np.repeat(array, 9, axis=0) for name, array in reply.arrays.items()}
        return Records(many, {"images": len(many["labels"])})

    monkeypatch.setitem(HANDLERS, "train.synthesise", more)
    workspace, sites = lay_out(sharing, tmp_path / "one", cohort={"quorum": 1})
    results = run_inline(workspace, sites, Events())
    assert not len(shared_images(workspace)["images"])
    assert results.sites["riverside"].classifiers["shufflenet_v2"].adapted
    workspace, sites = lay_out(sharing, tmp_path / "all")
    with pytest.raises(QuorumError, match="synthesis ended at 1 sites, below the quorum of 2"):
        run_inline(workspace, sites, Events())


def test_a_bundle_that_was_changed_is_not_sent(sharing, tmp_path):
    workspace, sites = lay_out(sharing, tmp_path)

    def change(event):
        if event["event"] == "phase-finished" and event.get("phase") == "synthesise":
            before = Bundle.open(workspace.synthetic)
            writer = BundleWriter(
                workspace.synthetic,
                name="other",
                kind="synthetic",
                provenance=before.manifest.provenance,
            )
            writer.add(SHARED_IMAGES, before.read(SHARED_IMAGES))
            writer.sign(load_signing_key(workspace.key))

    with pytest.raises(BundleError, match="not the bundle that this study signed"):
        run_inline(workspace, sites, Events(listeners=[change]))


def test_no_image_at_all_is_no_replay(sharing, tmp_path):
    """The only site has too few labels for a GAN: its classifier is trained on those alone."""
    workspace, sites = lay_out(sharing, tmp_path, cohort={"sites": [SMALL]})
    (own,) = (site for site in sites if read_site(site).name == SMALL)
    results = run_inline(workspace, [own], Events())
    assert results.sites[SMALL].synthetic == 0 and not len(shared_images(workspace)["images"])
    assert results.sites[SMALL].classifiers["shufflenet_v2"].adapted


@needs_front
@pytest.mark.timeout(3000)
def test_a_deployment_shares_what_its_hospitals_policies_let_leave(inline, sharing):
    """One hospital appended the rule, the other one did not: the bits of one process."""
    with tempfile.TemporaryDirectory(prefix="sonofed-", dir="/tmp") as folder:
        deployment = Deployment(sharing, Path(folder))
        file = deployment.project.with_name("tiny_synthesis.toml")
        study = sharing.scenario.study.model_dump(mode="json", exclude_none=True)
        file.write_text(tomli_w.dumps(study))
        willing, unwilling = (deployment.hospitals[name] for name in ("riverside", SMALL))
        with (willing.root / "policy.toml").open("a") as policy:
            policy.write(SYNTHETIC_RULE.read_text())
        test = ("sonofed-site", "policy", "test", file, "--site")
        assert "refuses nothing" in run(*test, willing.site)
        said = run(*test, unwilling.site)
        assert "train.synthesise: this site's policy does not allow" in said
        assert "the site would take part all the same" in said
        try:
            deployment.up()
            said = deployment.study("run", file, "--bundle", deployment.bundle, "--follow")
            assert re.search(r"^study tiny_synthesis: completed$", said, re.M), said
            workspace = find(deployment.coordinator, "tiny_synthesis").workspace
            here, there = shared_images(inline[0]), shared_images(workspace)
            assert all(np.array_equal(here[name], there[name]) for name in here)
            whole, again = weights(inline[0]), weights(workspace)
            assert all(np.array_equal(whole[name], again[name]) for name in whole)
            for hospital, outcome in ((willing, "sent"), (unwilling, "refused")):
                ledger = open_ledger(open_store(read_site(hospital.site)))
                ledger.verify()
                found = [e for e in ledger.entries() if e["action"] == "train.synthesise"]
                assert [e["outcome"] for e in found] == [outcome]
                assert (found[0]["bytes"] > here["images"].nbytes) is (outcome == "sent")
        finally:
            deployment.down()
