"""Studies under each aggregation strategy, whole and cut off in the middle of a round."""

import os

import numpy as np
import pytest

from sonofed_client.app import SITES_VARIABLE
from sonofed_client.enclave.store import Store
from sonofed_client.settings import read_site
from sonofed_common.contract.records import from_bytes
from sonofed_common.contract.study import Study
from sonofed_common.runtime import Events
from sonofed_server.study.engine import run_study
from sonofed_simulations.engines.inline import InlineGrid, run_inline

NETWORK = "shufflenet_v2"
GROUP = f"classifier/{NETWORK}/0"
SHORT = {
    "phases": ["enrol", "ship", "select", "annotate", "classifier"],
    "selection": {"strategy": "random", "budgets": [1.0]},
}
SETTINGS = {
    "fedavg": {},
    "fedprox": {"mu": 1.0},
    "fedadam": {},
    "feddg_ga": {},
    "scaffold": {},
}


def lay_out(laboratory, root, strategy):
    values = laboratory.scenario.study.model_dump(mode="json") | SHORT
    values["aggregation"] = {"strategy": strategy, **SETTINGS[strategy]}
    values["finetuning"]["rounds"] = 3
    if strategy == "scaffold":
        values["finetuning"] |= {"optimizer": "sgd", "learning_rate": 0.05}
    sites = laboratory.prepare_sites(0, root / "sites")
    study = Study.model_validate(values)
    return laboratory.workspace(study, laboratory.root / "source", root / "study"), sites


class CutOff(InlineGrid):
    """A grid that is gone once one of two sites has done the second round."""

    def __init__(self):
        super().__init__(2)
        self._asked = 0

    def pull_messages(self, message_ids):
        ids = list(message_ids)
        kinds = [self._waiting[i].metadata.message_type for i in ids]
        found = list(super().pull_messages(ids))
        self._asked += kinds.count("train.classifier")
        if self._asked == 3:
            raise KeyboardInterrupt
        return found


def weights(workspace):
    return from_bytes(workspace.checkpoint.read_bytes()).group(GROUP)


@pytest.fixture(scope="module")
def averaged(laboratory, tmp_path_factory):
    workspace, sites = lay_out(laboratory, tmp_path_factory.mktemp("fedavg"), "fedavg")
    run_inline(workspace, sites, Events())
    return weights(workspace)


@pytest.mark.parametrize("strategy", ["fedprox", "fedadam", "feddg_ga", "scaffold"])
def test_a_study_that_was_cut_off_ends_as_an_undisturbed_one(
    laboratory, tmp_path, monkeypatch, averaged, strategy
):
    whole, sites = lay_out(laboratory, tmp_path / "whole", strategy)
    run_inline(whole, sites, Events())
    broken, others = lay_out(laboratory, tmp_path / "broken", strategy)
    monkeypatch.setenv(SITES_VARIABLE, os.pathsep.join(map(str, others)))
    with pytest.raises(KeyboardInterrupt):
        run_study(broken, CutOff(), "inline")
    kept = from_bytes(broken.checkpoint.read_bytes())
    assert kept.config["position"] == {GROUP: 1}
    expected = {
        "fedprox": (set(), set()),
        "fedadam": ({"m", "v"}, set()),
        "feddg_ga": (set(), {"shares", "losses"}),
        "scaffold": ({"control"}, set()),
    }[strategy]
    state = kept.group(f"aggregation/{GROUP}")
    facts = kept.config["facts"].get("aggregation", {}).get(GROUP, {})
    assert ({name.partition("/")[0] for name in state}, set(facts)) == expected
    for site in others:
        # What was computed before is done anew, from what the site kept.
        Store(read_site(site).store).remove("job/")
    run_inline(broken, others, Events())
    assert broken.checkpoint.exists() and weights(broken).keys() == averaged.keys()
    ends = [from_bytes(w.checkpoint.read_bytes()).digest() for w in (whole, broken)]
    assert ends[0] == ends[1]
    assert any(not np.array_equal(weights(whole)[name], averaged[name]) for name in averaged)
    if strategy == "scaffold":
        prefix = f"study/tiny/control/{NETWORK}/0/"
        stores = [Store(read_site(site).store) for site in others]
        own = [store.get(f"{prefix}0002").arrays for store in stores]
        assert own[0].keys() < averaged.keys()
        assert any(np.abs(own[0][name] - own[1][name]).max() > 1e-4 for name in own[0])
