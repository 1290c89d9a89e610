import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import psutil
import pytest
import tomli_w
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.run import RunNotRunningException
from safetensors.numpy import load

from sonofed_client.app import SITES_VARIABLE
from sonofed_client.enclave.store import Store
from sonofed_client.settings import read_site
from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.errors import (
    BundleError,
    CollapseError,
    ConfigurationError,
    DataMissingError,
    DivergenceError,
    EngineError,
    QuorumError,
    SonoFedError,
)
from sonofed_common.contract.recorddict import from_recorddict, to_recorddict
from sonofed_common.contract.records import Records, from_bytes, to_bytes
from sonofed_common.contract.results import read_results
from sonofed_common.contract.study import ACTIVE_LEARNING, Study
from sonofed_common.runtime import Events
from sonofed_common.security import load_or_create_signing_key, public_hex
from sonofed_server.phases import annotate, reconstruct, ship
from sonofed_server.phases.annotate import POLL_SECONDS
from sonofed_server.study import engine
from sonofed_server.study.desk import Entry
from sonofed_server.study.engine import run_study
from sonofed_server.study.workspace import StudyState, identity_of
from sonofed_simulations.engines.flower import run_flower
from sonofed_simulations.engines.guard import PREFIX
from sonofed_simulations.engines.inline import InlineGrid, run_inline
from sonofed_simulations.simulation import simulate

NETWORK = "shufflenet_v2"
SHORT = {
    "phases": ["enrol", "ship", "select", "annotate", "classifier", "publish"],
    "selection": {"strategy": "random", "budgets": [0.5]},
    "finetuning": {"rounds": 1},
}
"""What makes the tiny study one with few questions."""


def study_like(laboratory, **changes):
    """The tiny study with changes."""
    values = laboratory.scenario.study.model_dump(mode="json")
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return Study.model_validate(values)


def lay_out(laboratory, root, **changes):
    """A fresh workspace and fresh sites for the tiny study, or one like it."""
    study = study_like(laboratory, **changes)
    sites = laboratory.prepare_sites(0, root / "sites")
    return laboratory.workspace(study, laboratory.root / "source", root / "study"), sites


def checkpoint(workspace):
    return from_bytes(workspace.checkpoint.read_bytes())


def selection(site):
    store = Store(read_site(site).store)
    return store.get("study/tiny/selected").config["ids"]


def events(workspace):
    return [json.loads(line) for line in workspace.events.read_text().splitlines()]


def spoil(site):
    """Take a site's store and data away."""
    values = tomllib.loads(site.read_text())
    values["store"] += "-lost"
    values["data"]["path"] += "-lost"
    site.write_text(tomli_w.dumps(values))


BOTH = [
    pytest.param("short", SHORT, marks=pytest.mark.slow),
    pytest.param("inline", {}, marks=pytest.mark.long),
]
"""Fixtures of studies that ran to their end, and what makes the tiny study one of them."""


@pytest.fixture(scope="module")
def inline(laboratory, tmp_path_factory):
    """The tiny study, run to its end in this process."""
    workspace, sites = lay_out(laboratory, tmp_path_factory.mktemp("inline"))
    return workspace, sites, run_inline(workspace, sites, Events())


@pytest.fixture(scope="module")
def short(laboratory, tmp_path_factory):
    """A study with few questions, run to its end in this process."""
    workspace, sites = lay_out(laboratory, tmp_path_factory.mktemp("short"), **SHORT)
    return workspace, sites, run_inline(workspace, sites, Events())


def test_results_hold_every_phase_and_every_number(inline, laboratory):
    workspace, _, results = inline
    assert read_results(workspace.results) == results
    assert not workspace.failure.exists()
    assert [phase.name for phase in results.phases] == list(ACTIVE_LEARNING)
    for phase in results.phases:
        assert phase.seconds > 0 and phase.bytes_to_sites > 0 and phase.bytes_from_sites > 0
    assert results.seconds == pytest.approx(sum(phase.seconds for phase in results.phases))
    assert list(results.sites) == ["riverside", "hillview"] and results.missing_sites == ()
    for site in results.sites.values():
        assert site.images + site.test_images == 20
        assert site.selected == site.selected_by_budget[-1] and site.missing_reason is None
        classifier = site.classifiers[NETWORK]
        assert [point.budget for point in classifier.curve] == [0.3, 0.6]
        for measures in (classifier.source, classifier.bn_adapted, classifier.adapted):
            assert 0 <= measures["auroc_low"] <= measures["auroc"] <= measures["auroc_high"] <= 1
        assert site.reconstruction.ssim is not None
    pool = sum(site.images for site in results.sites.values())
    chosen = np.sum([s.selected_by_budget for s in results.sites.values()], axis=0).tolist()
    assert chosen == [round(0.3 * pool), round(0.6 * pool)]
    assert sum(results.clusters) == pool
    clustering = laboratory.scenario.study.clustering
    moves = [e["move"] for e in events(workspace) if e.get("task") == "cluster" and "move" in e]
    rested = moves[-1] <= clustering.tolerance
    assert results.converged == rested and (rested or len(moves) == clustering.iterations)


def test_weights_travel_once_and_only_in_their_phases(inline, laboratory):
    _, _, results = inline
    cost = {phase.name: phase for phase in results.phases}
    bundle = Bundle.open(laboratory.root / "source")
    blobs = sum(bundle.manifest.blobs.values())
    assert 2 * blobs < cost["ship"].bytes_to_sites < 2 * blobs + 100_000
    assert all(cost[name].bytes_from_sites < 10_000 for name in ("enrol", "ship", "annotate"))
    assert cost["publish"].bytes_to_sites < cost["classifier"].bytes_to_sites


def test_the_selection_is_nested_and_labelled_at_the_sites(inline):
    _, sites, results = inline
    for site, name in zip(sites, results.sites, strict=True):
        small, large = selection(site)
        assert set(small) < set(large) and len(large) == results.sites[name].selected
        assert set(large) == set(Store(read_site(site).store).annotations())


def test_the_published_bundle_holds_the_averaged_weights(inline, laboratory):
    workspace, sites, _ = inline
    key = public_hex(load_or_create_signing_key(laboratory.key))
    bundle = Bundle.open(workspace.final_bundle, key)
    assert bundle.manifest.kind == "final"
    assert bundle.paths == ["MODEL_CARD.md", f"classifiers/{NETWORK}.safetensors"]
    averaged = checkpoint(workspace).group(f"classifier/{NETWORK}/1")
    published = load(bundle.read(f"classifiers/{NETWORK}.safetensors"))
    assert published.keys() == averaged.keys()
    assert all(np.array_equal(published[k], averaged[k]) for k in averaged)
    for site in sites:
        assert f"bundle/{bundle.id}" in Store(read_site(site).store).names("bundle/")


def test_the_published_bundle_names_its_source(inline, laboratory):
    workspace, _, _ = inline
    facts = Bundle.open(workspace.final_bundle).manifest.facts
    source = Bundle.open(laboratory.root / "source")
    assert facts["source"] == source.manifest.facts and NETWORK in facts["source"]["classifiers"]
    assert facts["source_bundle"] == source.id and facts["study"] == "tiny"


def test_nothing_of_an_image_is_in_what_the_coordinator_keeps(inline):
    workspace, sites, _ = inline
    kept = b"".join(p.read_bytes() for p in sorted(workspace.root.rglob("*")) if p.is_file())
    for site in sites:
        settings = read_site(site)
        for row in Store(settings.store).images():
            assert row.id.encode() not in kept and row.group.encode() not in kept
        assert str(settings.data.path).encode() not in kept


def test_a_finished_study_that_is_run_again_asks_no_phase_again(inline):
    workspace, sites, results = inline
    before, saved = checkpoint(workspace), workspace.checkpoint.stat().st_mtime_ns
    again = run_inline(workspace, sites, Events())
    phases = [e["phase"] for e in events(workspace) if e["event"] == "phase-started"]
    assert phases == [*ACTIVE_LEARNING, "enrol"]
    assert again.sites == results.sites and again.started == results.started
    assert before.digest() == checkpoint(workspace).digest()
    # That it enrolled again is no progress, by which a conductor sees that a study gets on.
    assert workspace.checkpoint.stat().st_mtime_ns == saved


@pytest.mark.parametrize(("first", "changes"), BOTH)
def test_the_same_study_anew_ends_bit_for_bit_the_same(
    request, laboratory, tmp_path, first, changes
):
    workspace, sites, results = request.getfixturevalue(first)
    second, other = lay_out(laboratory, tmp_path, **changes)
    again = run_inline(second, other, Events())
    assert checkpoint(second).digest() == checkpoint(workspace).digest()
    assert [selection(s) for s in other] == [selection(s) for s in sites]
    assert again.sites == results.sites


KILLED = """
import sys
from pathlib import Path
from sonofed_common.runtime import Events
from sonofed_server.study.workspace import Workspace
from sonofed_simulations.engines.inline import run_inline
run_inline(Workspace(Path(sys.argv[1])), [Path(p) for p in sys.argv[2:]], Events())
"""


def kill_in(phase, workspace, sites, until):
    """Run a study in a process of its own and kill that once ``until`` of a phase's event holds."""
    command = [sys.executable, "-c", KILLED, str(workspace.root), *map(str, sites)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 400
    try:
        while time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read().decode()
            log = events(workspace) if workspace.events.exists() else []
            if any(e["event"] == "progress" and until in e["task"] for e in log):
                return
            time.sleep(0.02)
        raise AssertionError(f"phase {phase} was not reached")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize(
    ("undisturbed", "changes", "deaths"),
    [
        pytest.param("short", SHORT, [("classifier", "classifier")], marks=pytest.mark.slow),
        pytest.param(
            "inline",
            {},
            [("embed", "embed, round 2"), ("classifier", "classifier")],
            marks=pytest.mark.long,
        ),
    ],
)
def test_a_killed_study_resumes_to_the_same_bits(
    request, laboratory, tmp_path, undisturbed, changes, deaths
):
    workspace, sites, results = request.getfixturevalue(undisturbed)
    broken, other = lay_out(laboratory, tmp_path, **changes)
    for phase, task in deaths:
        kill_in(phase, broken, other, task)
        assert not broken.results.exists() and not broken.failure.exists()
        assert phase not in checkpoint(broken).config["done"]
    again = run_inline(broken, other, Events())
    assert checkpoint(broken).digest() == checkpoint(workspace).digest()
    assert [selection(s) for s in other] == [selection(s) for s in sites]
    assert again.sites == results.sites
    assert [phase.name for phase in again.phases] == [phase.name for phase in results.phases]
    assert traffic(again) == traffic(results)
    assert not list(broken.root.glob(".*.tmp"))


def traffic(results):
    return [(p.name, p.bytes_to_sites, p.bytes_from_sites) for p in results.phases]


def test_without_a_quorum_the_sites_reason_ends_the_study(laboratory, tmp_path):
    workspace, sites = lay_out(laboratory, tmp_path)
    spoil(sites[1])
    workspace.results.write_text("{}")
    with pytest.raises(DataMissingError, match=r"1 of 2 sites.*hillview.*node: ") as error:
        run_inline(workspace, sites, Events())
    assert error.value.exit_code == 10
    assert json.loads(workspace.failure.read_text()) == {
        "error": "data-missing",
        "message": error.value.message,
    }
    assert not workspace.results.exists()
    assert events(workspace)[-1]["event"] == "study-failed"


def test_with_a_quorum_the_study_goes_on_and_names_the_missing_site(laboratory, tmp_path):
    workspace, sites = lay_out(laboratory, tmp_path, cohort={"quorum": 1}, **SHORT)
    spoil(sites[1])
    results = run_inline(workspace, sites, Events())
    assert read_results(workspace.results).missing_sites == results.missing_sites == ("hillview",)
    assert "[data-missing]" in results.sites["hillview"].missing_reason
    assert results.sites["riverside"].classifiers[NETWORK].adapted is not None
    assert not results.sites["hillview"].classifiers


class Failing(InlineGrid):
    """A grid whose first site comes to harm once an action is asked for."""

    def __init__(self, action, site, silent, calls=1):
        super().__init__(2)
        self._left = calls
        self._action, self._site, self._silent = action, site, silent
        self._harmed = False

    def push_messages(self, messages):
        messages = list(messages)
        asked = any(m.metadata.message_type == self._action for m in messages)
        if asked and messages[0].metadata.dst_node_id == 1 and not self._harmed:
            self._left -= 1
            self._harmed = self._left == 0
            if self._harmed and not self._silent:
                damage(self._site)
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        ids = list(message_ids)
        if self._harmed and self._silent:
            ids = [i for i in ids if self._waiting[i].metadata.dst_node_id != 1]
        return super().pull_messages(ids)


def damage(site):
    for blob in (read_site(site).store / "blobs").rglob("*"):
        if blob.is_file():
            blob.write_bytes(b"")


@pytest.mark.parametrize("action", ["query.missing", "train.classifier"])
@pytest.mark.parametrize("silent", [True, False])
def test_a_site_that_fails_in_the_middle(laboratory, tmp_path, monkeypatch, action, silent):
    cohort = {"quorum": 1, "deadline_seconds": 1.0 if silent else 60.0}
    workspace, sites = lay_out(laboratory, tmp_path, cohort=cohort, **SHORT)
    monkeypatch.setenv(SITES_VARIABLE, os.pathsep.join(map(str, sites)))
    results = run_study(workspace, Failing(action, sites[0], silent), "inline")
    assert results.missing_sites == ("riverside",)
    reason = results.sites["riverside"].missing_reason
    assert ("deadline" if silent else "damaged") in reason
    assert results.sites["hillview"].classifiers[NETWORK].adapted is not None
    failed = [e for e in events(workspace) if e["event"] == "site-failed"]
    assert failed and {e["site"] for e in failed} == {"riverside"}


def test_a_site_lost_while_selecting_leaves_no_trace_in_the_selection(
    laboratory, tmp_path, monkeypatch
):
    # Two budgets: the third query is the first of its kind, and shows no change of a count.
    change = {
        "phases": ["enrol", "ship", "select"],
        "selection": {"strategy": "random", "budgets": [0.3, 0.6]},
        "cohort": {"quorum": 1},
    }
    absent, others = lay_out(laboratory, tmp_path / "absent", **change)
    spoil(others[0])
    run_inline(absent, others, Events())
    workspace, sites = lay_out(laboratory, tmp_path / "lost", **change)
    monkeypatch.setenv(SITES_VARIABLE, os.pathsep.join(map(str, sites)))
    results = run_study(workspace, Failing("query.histogram", sites[0], False, calls=3), "inline")
    assert "selection-restarted" in {e["event"] for e in events(workspace)}
    assert selection(sites[1]) == selection(others[1])
    assert results.missing_sites == ("riverside",)
    assert results.sites["riverside"].selected == 0


class Deaf(InlineGrid):
    """A grid that loses what the first site answered, once, to an action that it did."""

    def __init__(self, action=None):
        super().__init__(2)
        self._lost = action
        self.asked = set()

    def push_messages(self, messages):
        messages = list(messages)
        self.asked |= {(m.metadata.message_type, m.metadata.dst_node_id) for m in messages}
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        replies = []
        for reply in super().pull_messages(message_ids):
            if (reply.metadata.message_type, reply.metadata.src_node_id) == (self._lost, 1):
                self._lost = None
            else:
                replies.append(reply)
        return replies


NEEDS_SELECTION = {("query.annotations", 1), ("train.classifier", 1)}


def test_a_site_that_marked_a_selection_without_being_heard_trains_on_none(
    laboratory, tmp_path, monkeypatch
):
    change = {**SHORT, "cohort": {"quorum": 1, "deadline_seconds": 1.0}}
    absent, others = lay_out(laboratory, tmp_path / "absent", **change)
    spoil(others[0])
    run_inline(absent, others, Events())
    workspace, sites = lay_out(laboratory, tmp_path / "lost", **change)
    monkeypatch.setenv(SITES_VARIABLE, os.pathsep.join(map(str, sites)))
    grid = Deaf("train.select")
    results = run_study(workspace, grid, "inline")
    assert len(selection(sites[0])[-1]) > 0
    assert not grid.asked & NEEDS_SELECTION
    assert results.missing_sites == ("riverside",)
    assert "no part in the selection" in results.sites["riverside"].missing_reason
    group = f"classifier/{NETWORK}/0"
    alone, together = (checkpoint(w).group(group) for w in (absent, workspace))
    assert alone and alone.keys() == together.keys()
    assert all(np.array_equal(alone[name], together[name]) for name in alone)


def test_a_site_that_joins_a_resumed_study_after_the_selection_trains_on_none(
    laboratory, tmp_path, monkeypatch
):
    change = {**SHORT, "cohort": {"quorum": 1, "deadline_seconds": 1.0}}
    workspace, sites = lay_out(laboratory, tmp_path, **change)
    run_inline(workspace, sites, Events())
    # A coordinator that lost its state selects anew, here without the first site.
    workspace.checkpoint.unlink()
    alone, grid = Deaf(), Deaf()
    monkeypatch.setattr(alone, "get_node_ids", lambda: [2])

    def stop(event):
        if event["event"] == "phase-started" and event["phase"] == "annotate":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(workspace, alone, "inline", Events(workspace.events, [stop]))
    results = run_study(workspace, grid, "inline")
    assert len(selection(sites[0])[-1]) > 0
    assert ("query.describe", 1) in grid.asked and not grid.asked & NEEDS_SELECTION
    assert "no part in the selection" in results.sites["riverside"].missing_reason
    assert results.sites["hillview"].classifiers[NETWORK].adapted is not None


def forget_labels(site):
    """Take the label of every image but each patient's first; return the settings' new file."""
    values = tomllib.loads(site.read_text())
    folder = Path(shutil.copytree(values["data"]["path"], site.parent / "unlabelled"))
    with (folder / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    seen = set()
    for row in rows:
        row["label"] = "" if row["patient"] in seen else row["label"]
        seen.add(row["patient"])
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    values["data"]["path"] = str(folder)
    site.write_text(tomli_w.dumps(values))


def test_nobody_waits_for_labels_that_an_oracle_does_not_have(laboratory, tmp_path):
    change = {**SHORT, "phases": ["enrol", "ship", "select", "annotate", "classifier"]}
    change["selection"] = {"strategy": "random", "budgets": [0.5, 1.0]}
    workspace, sites = lay_out(laboratory, tmp_path, **change)
    forget_labels(sites[0])
    results = run_inline(workspace, sites, Events())
    store = Store(read_site(sites[0]).store)
    unlabelled = [row for row in store.images("pool") if row.label is None]
    assert unlabelled and {row.id for row in unlabelled} <= set(selection(sites[0])[-1])
    assert {p.name: p for p in results.phases}["annotate"].seconds < POLL_SECONDS
    # What was chosen is not what was learnt from.
    found, curve = results.sites["riverside"], results.sites["riverside"].classifiers[NETWORK].curve
    pool = store.images("pool")
    assert (found.selected, found.labelled) == (len(pool), len(pool) - len(unlabelled))
    labelled = {row.id for row in pool if row.label is not None}
    assert [point.labels for point in curve] == [
        len(labelled & set(chosen)) for chosen in selection(sites[0])
    ]


class Unlabelled(InlineGrid):
    """A grid whose sites answer a training as sites without a label do."""

    def pull_messages(self, message_ids):
        replies = list(super().pull_messages(message_ids))
        for reply in replies:
            if reply.metadata.message_type == "train.classifier":
                reply.content = to_recorddict(Records(config={"examples": 0}))
        return replies


def test_without_any_label_nothing_is_passed_off_as_adapted(laboratory, tmp_path, monkeypatch):
    workspace, sites = lay_out(laboratory, tmp_path, **SHORT)
    monkeypatch.setenv(SITES_VARIABLE, os.pathsep.join(map(str, sites)))
    with pytest.raises(QuorumError, match="no site has a label to fine-tune on at 50%"):
        run_study(workspace, Unlabelled(2), "inline")
    assert not workspace.results.exists() and not workspace.final_bundle.exists()


@pytest.mark.parametrize("patient", [True, False])
def test_experts_have_a_deadline_of_their_own(laboratory, tmp_path, monkeypatch, patient):
    monkeypatch.setattr(annotate, "POLL_SECONDS", 0.1)
    exchange, experts = (1.0, 60.0) if patient else (60.0, 0.3)
    change = {**SHORT, "phases": ["enrol", "ship", "select", "annotate"]}
    change["cohort"] = {"deadline_seconds": exchange, "annotation_seconds": experts}
    workspace, sites = lay_out(laboratory, tmp_path, **change)
    for site in sites:
        site.write_text(site.read_text().replace("oracle = true", "oracle = false"))
    seen = []

    def label(event):
        """Label everything, once an exchange would have been over."""
        if event["event"] == "progress" and event["task"] == "annotate":
            seen.append(event["done"])
            if patient and len(seen) == 1:
                time.sleep(exchange)
                for site in sites:
                    chosen = [(image, 0) for image in selection(site)[-1]]
                    Store(read_site(site).store).annotate(chosen, "expert")

    if patient:
        run_inline(workspace, sites, Events(listeners=[label]))
        assert seen[0] == 0 and seen[-1] == sum(len(selection(site)[-1]) for site in sites)
    else:
        with pytest.raises(QuorumError, match="only 0 sites have labels"):
            run_inline(workspace, sites, Events(listeners=[label]))


def test_two_nodes_of_one_name_are_refused(laboratory, tmp_path):
    workspace, sites = lay_out(laboratory, tmp_path, **SHORT)
    with pytest.raises(ConfigurationError, match="two nodes say that they are site riverside"):
        run_inline(workspace, [sites[0], sites[0]], Events())


class Slow(InlineGrid):
    """A grid whose first site answers each slice of a reconstruction late, or as the first."""

    def __init__(self, seconds, stalled):
        super().__init__(2)
        self._seconds, self._stalled = seconds, stalled
        self._first = None

    def pull_messages(self, message_ids):
        replies = list(super().pull_messages(message_ids))
        for n, reply in enumerate(replies):
            if (reply.metadata.message_type, reply.metadata.src_node_id) == (
                "train.reconstruct",
                1,
            ):
                time.sleep(self._seconds)
                self._first = self._first or reply
                replies[n] = self._first if self._stalled else reply
        return replies


@pytest.mark.parametrize("stalled", [False, True])
def test_a_reconstruction_may_take_as_long_as_it_goes_on(
    laboratory, tmp_path, monkeypatch, stalled
):
    monkeypatch.setattr(reconstruct, "SLICE_SECONDS", 1e-3)
    deadline = 1.0
    change = {
        "phases": ["enrol", "ship", "reconstruct"],
        "cohort": {"quorum": 1, "deadline_seconds": deadline},
        "reconstruction": {"steps": 1, "batch_size": 2},
    }
    workspace, sites = lay_out(laboratory, tmp_path, **change)
    monkeypatch.setenv(SITES_VARIABLE, os.pathsep.join(map(str, sites)))
    results = run_study(workspace, Slow(0.3, stalled), "inline")
    seconds = {p.name: p for p in results.phases}["reconstruct"].seconds
    assert seconds > deadline
    assert results.sites["hillview"].reconstruction is not None
    if stalled:
        assert "no image was redrawn" in results.sites["riverside"].missing_reason
        assert results.missing_sites == ("riverside",)
    else:
        assert results.missing_sites == ()
        assert results.sites["riverside"].reconstruction is not None


class Lossy(InlineGrid):
    """A grid that loses a blob of every bundle on its way to the first site."""

    def __init__(self, digest):
        super().__init__(2)
        self._digest = digest
        self.messages = 0

    def push_messages(self, messages):
        messages = list(messages)
        for message in messages:
            if message.metadata.message_type == "train.install":
                self.messages += 1
                records = from_recorddict(message.content)
                if message.metadata.dst_node_id == 1:
                    records.arrays.pop(f"blobs/{self._digest}", None)
                message.content = to_recorddict(records)
        return super().push_messages(messages)


@pytest.mark.parametrize("lost", [True, False])
def test_a_bundle_in_many_messages_arrives_whole_or_not_at_all(
    laboratory, tmp_path, monkeypatch, lost
):
    monkeypatch.setattr(ship, "MESSAGE_BYTES", 1000)
    workspace, sites = lay_out(laboratory, tmp_path, phases=["enrol", "ship"])
    monkeypatch.setenv(SITES_VARIABLE, os.pathsep.join(map(str, sites)))
    bundle = Bundle.open(workspace.bundle)
    digest = sorted(bundle.manifest.blobs)[0]
    grid = Lossy(digest if lost else None)
    if lost:
        with pytest.raises(BundleError, match="riverside still lacks"):
            run_study(workspace, grid, "inline")
    else:
        run_study(workspace, grid, "inline")
        assert grid.messages > 2 * 2
    for site in sites[: None if not lost else 1]:
        names = Store(read_site(site).store).names("b")
        held = {name.removeprefix("blob/") for name in names if name.startswith("blob/")}
        assert held == set(bundle.manifest.blobs) - ({digest} if lost else set())
        assert (f"bundle/{bundle.id}" in names) is not lost


class Hiccup(InlineGrid):
    """A grid that loses the first site's answer to one action."""

    def __init__(self, action):
        super().__init__(2)
        self._action = action

    def pull_messages(self, message_ids):
        kept = [(i, self._waiting[i].metadata) for i in message_ids if i in self._waiting]
        lost = (self._action, 1)
        return super().pull_messages(
            [i for i, m in kept if (m.message_type, m.dst_node_id) != lost]
        )


def test_a_site_that_comes_back_is_not_missing(laboratory, tmp_path, monkeypatch):
    cohort = {"quorum": 1, "deadline_seconds": 1.0}
    workspace, sites = lay_out(laboratory, tmp_path, cohort=cohort, **SHORT)
    monkeypatch.setenv(SITES_VARIABLE, os.pathsep.join(map(str, sites)))
    results = run_study(workspace, Hiccup("query.annotations"), "inline")
    assert {e["event"] for e in events(workspace)} >= {"site-failed", "study-completed"}
    assert results.missing_sites == ()
    assert results.sites["riverside"].classifiers[NETWORK].adapted is not None


def test_a_simulation_that_lost_a_site_still_writes_its_report(laboratory, prepared):
    study = study_like(laboratory, cohort={"quorum": 1}, **SHORT)
    scenario = laboratory.scenario.model_copy(update={"study": study})

    def lose(event):
        if event["event"] == "phase-started" and event["phase"] == "classifier":
            damage(prepared / "sites" / "riverside" / "site-0.toml")

    results = simulate(scenario, prepared, None, "inline", 0, Events(None, [lose]))
    assert results.missing_sites == ("riverside",)
    assert (prepared / "report.html").is_file()


def test_changed_images_start_the_study_anew(laboratory, tmp_path):
    change = {**SHORT, "phases": ["enrol", "ship", "select"]}
    workspace, sites = lay_out(laboratory, tmp_path, **change)
    before = run_inline(workspace, sites, Events())
    values = tomllib.loads(sites[0].read_text())
    values["data"]["test_fraction"] = 0.2
    # A name of its own: in one process an enclave stays open under its settings' path.
    sites[0] = sites[0].with_name("changed.toml")
    sites[0].write_text(tomli_w.dumps(values))
    after = run_inline(workspace, sites, Events())
    (restart,) = [e for e in events(workspace) if e["event"] == "study-restarted"]
    assert restart["sites"] == ["riverside"]
    assert after.sites["riverside"].images > before.sites["riverside"].images
    assert len(selection(sites[0])[-1]) == after.sites["riverside"].selected


def test_a_state_belongs_to_one_study_and_one_bundle(laboratory, tmp_path):
    study, path = laboratory.scenario.study, tmp_path / "checkpoint"
    StudyState(done=["enrol"]).save(path, identity_of(study, "a"))
    assert StudyState.load(path, identity_of(study, "a")).done == ["enrol"]
    assert StudyState.load(path, identity_of(study, "b")).done == []
    other = study.model_copy(update={"seed": 1})
    assert StudyState.load(path, identity_of(other, "a")).done == []
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ConfigurationError, match=r"checkpoint .* delete it"):
        StudyState.load(path, identity_of(study, "a"))


def test_a_state_that_does_not_say_who_was_lost_goes_on_with_all(laboratory, tmp_path):
    path, identity = tmp_path / "checkpoint", identity_of(laboratory.scenario.study, "a")
    state = StudyState(["enrol"], {"round": 1}, facts={"started": "now"})
    state.missing, state.forgiven = {"riverside": "lost [order]"}, {"hillview": "lost [order]"}
    state.save(path, identity)
    assert StudyState.load(path, identity) == state
    records = from_bytes(path.read_bytes())
    del records.config["missing"], records.config["forgiven"]
    path.write_bytes(to_bytes(records))
    older = StudyState.load(path, identity)
    assert older.position == state.position and not older.missing and not older.forgiven


def test_a_laboratory_folder_of_another_study_starts_anew(laboratory, tmp_path):
    study, bundle = laboratory.scenario.study, laboratory.root / "source"

    def lay_out_again(study):
        return laboratory.workspace(study, bundle, tmp_path / "study").checkpoint

    state = StudyState(facts={"started": "now"})
    state.save(lay_out_again(study), identity_of(study, Bundle.open(bundle).id))
    assert lay_out_again(study).exists()
    assert not lay_out_again(study_like(laboratory, seed=1)).exists()


def test_an_error_of_the_program_is_recorded_without_its_text(laboratory, tmp_path, monkeypatch):
    workspace, sites = lay_out(laboratory, tmp_path, **SHORT)
    monkeypatch.setenv(SITES_VARIABLE, os.pathsep.join(map(str, sites)))
    grid = InlineGrid(2)
    monkeypatch.setattr(grid, "get_node_ids", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_study(workspace, grid, "inline")
    reason = json.loads(workspace.failure.read_text())
    assert reason["error"] == "internal" and "division" not in reason["message"]
    assert events(workspace)[-1]["event"] == "study-failed"


@pytest.mark.parametrize("cut", [ObjectPushError("0", 1, ""), RunNotRunningException()], ids=repr)
def test_a_superlink_that_gives_the_run_up_is_no_error_of_the_program(
    laboratory, tmp_path, monkeypatch, cut
):
    workspace, _ = lay_out(laboratory, tmp_path, **SHORT)

    def give_up(*_):
        raise cut

    monkeypatch.setitem(engine.PHASES, "enrol", give_up)
    with pytest.raises(EngineError, match="goes on when it is back"):
        run_study(workspace, InlineGrid(2), "inline")
    assert Entry(workspace).failure is None and workspace.failure.exists()


@pytest.mark.parametrize("silent", [True, False])
def test_a_site_that_fails_without_a_quorum(laboratory, tmp_path, monkeypatch, silent):
    cohort = {"deadline_seconds": 1.0 if silent else 60.0}
    workspace, sites = lay_out(laboratory, tmp_path, cohort=cohort, **SHORT)
    monkeypatch.setenv(SITES_VARIABLE, os.pathsep.join(map(str, sites)))
    with pytest.raises(SonoFedError, match="below the quorum of 2; riverside: ") as error:
        run_study(workspace, Failing("train.classifier", sites[0], silent), "inline")
    assert ("deadline" if silent else "damaged") in error.value.message
    assert json.loads(workspace.failure.read_text())["message"] == error.value.message
    assert not workspace.results.exists()


def test_a_site_that_does_not_connect_is_waited_for_until_the_deadline(laboratory, tmp_path):
    cohort = {"quorum": 1, "deadline_seconds": 3.0}
    workspace, sites = lay_out(laboratory, tmp_path, cohort=cohort, **SHORT)
    results = run_inline(workspace, sites[:1], Events())
    assert results.missing_sites == ("hillview",)
    assert "deadline" in results.sites["hillview"].missing_reason


def test_without_reconstruction(laboratory, tmp_path):
    phases = [p for p in ACTIVE_LEARNING if p != "reconstruct"]
    once = {"embedding": {"rounds": 1}, "finetuning": {"rounds": 1}}
    workspace, sites = lay_out(
        laboratory, tmp_path, phases=phases, selection={"budgets": [0.5]}, **once
    )
    results = run_inline(workspace, sites, Events())
    assert [phase.name for phase in results.phases] == phases
    for site in results.sites.values():
        assert site.reconstruction is None and site.classifiers[NETWORK].adapted is not None


def test_random_selection_with_few_phases(short):
    *_, results = short
    assert [phase.name for phase in results.phases] == SHORT["phases"]
    assert results.clusters == ()
    pool = sum(site.images for site in results.sites.values())
    assert sum(site.selected for site in results.sites.values()) == round(pool / 2)


@pytest.mark.parametrize(
    "settings",
    [
        {"scope": "per_site"},
        {"scope": "global_with_site_floor"},
        {"combine": "radians", "uncertainty": "range"},
    ],
)
def test_selection_settings_run(laboratory, tmp_path, settings):
    phases = [p for p in ACTIVE_LEARNING if p not in ("reconstruct", "classifier", "publish")]
    small = {"embedding": {"rounds": 1}, "selection": settings}
    workspace, sites = lay_out(laboratory, tmp_path, phases=phases, **small)
    results = run_inline(workspace, sites, Events())
    assert sum(site.selected for site in results.sites.values()) > 0


def test_a_study_of_another_classifier_than_the_sources_is_refused(laboratory, tmp_path):
    workspace, sites = lay_out(laboratory, tmp_path, **{**SHORT, "classifiers": ["mobilenet_v2"]})
    with pytest.raises(ConfigurationError, match="no classifier 'mobilenet_v2', which the study"):
        run_inline(workspace, sites, Events())
    assert workspace.failure.exists()


def test_training_that_diverges_ends_the_study_readably(laboratory, tmp_path):
    change = {"phases": ["enrol", "ship", "embed"], "embedding": {"margin": 1e39}}
    workspace, sites = lay_out(laboratory, tmp_path, **change)
    with pytest.raises((DivergenceError, CollapseError)):
        run_inline(workspace, sites, Events())
    assert json.loads(workspace.failure.read_text())["error"] == "divergence"


def flower_processes(workspace):
    """Living processes that were started for a workspace, by id: they inherit its Flower home."""
    home = str(workspace.root / "flower")
    found = {}
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if environment.get("FLWR_HOME") == home:
                name = " ".join(process.cmdline()) or process.name()
                found[process.pid] = name, environment.get("TMPDIR")
        except psutil.Error:
            continue
    return found


def ended(workspace):
    until = time.monotonic() + 5
    while (left := flower_processes(workspace)) and time.monotonic() < until:
        time.sleep(0.1)
    return left == {} or left


def temporary(processes):
    """What the engine and Ray keep for processes in the folder for temporary files."""
    own = {Path(folder) for _, folder in processes.values() if folder}
    sessions = {path for n in processes for path in Path("/tmp/ray").glob(f"session_*_{n}")}
    return {path for path in own if path.name.startswith(PREFIX) and path.exists()} | sessions


@pytest.mark.long
def test_flower_and_inline_do_the_same(laboratory, tmp_path, inline):
    workspace, sites, results = inline
    other, others = lay_out(laboratory, tmp_path)
    seen, met, kept = [], {}, set()

    def look(event):
        seen.append(event)
        if event["event"] == "phase-started":
            met.update(flower_processes(other))
            kept.update(temporary(met))

    federated = run_flower(other, others, Events(listeners=[look]), 1)
    assert ended(other) is True
    assert kept and not temporary(met)
    assert [selection(s) for s in others] == [selection(s) for s in sites]
    first, second = checkpoint(workspace).arrays, checkpoint(other).arrays
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.dtype == second[name].dtype
        np.testing.assert_allclose(second[name], array, rtol=0, atol=1e-6, err_msg=name)
    assert federated.engine == "flower" and federated.missing_sites == ()
    finished = [e["phase"] for e in seen if e["event"] == "phase-finished"]
    assert finished == [phase.name for phase in results.phases]
    assert [p.bytes_to_sites for p in federated.phases] == pytest.approx(
        [p.bytes_to_sites for p in results.phases], rel=0.01, abs=2000
    )


@pytest.mark.long
def test_flower_ends_readably_and_leaves_no_process(laboratory, tmp_path):
    workspace, sites = lay_out(laboratory, tmp_path, **SHORT)
    spoil(sites[0])
    with pytest.raises(DataMissingError) as error:
        run_flower(workspace, sites, Events(), 1)
    assert error.value.exit_code == 10
    assert ended(workspace) is True
    assert json.loads(workspace.failure.read_text())["error"] == "data-missing"
    assert not workspace.results.exists()
