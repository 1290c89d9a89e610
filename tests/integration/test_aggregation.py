"""Studies under each aggregation strategy, whole and cut off in the middle of a round."""

import os

import numpy as np
import pytest
from safetensors.numpy import load

from sonofed_client.app import SITES_VARIABLE
from sonofed_client.enclave.store import Store
from sonofed_client.settings import read_site
from sonofed_common.batch_norm import layers_of
from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.records import from_bytes
from sonofed_common.contract.study import Study
from sonofed_common.models.classifiers import build_classifier
from sonofed_common.runtime import Events
from sonofed_server.study.engine import run_study
from sonofed_simulations.engines.inline import InlineGrid, run_inline

NETWORK = "shufflenet_v2"
GROUP = f"classifier/{NETWORK}/0"
SHORT = {
    "phases": ["enrol", "ship", "select", "annotate", "classifier"],
    "selection": {"strategy": "random", "budgets": [1.0]},
}


def lay_out(laboratory, root, name, strategy, more=(), **finetuning):
    values = laboratory.scenario.study.model_dump(mode="json") | SHORT | {"name": name}
    if strategy == "fedbn":
        values["finetuning"] |= {"batch_norm": "local"}
    else:
        values["aggregation"] = {"strategy": strategy}
    if strategy == "scaffold":
        values["finetuning"] |= {"optimizer": "sgd", "batch_size": 16}
    values["phases"] = [*SHORT["phases"], *more]
    values["finetuning"] |= finetuning
    study = Study.model_validate(values)
    return laboratory.workspace(study, laboratory.root / "source", root / name)


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


KEPT = {
    "fedadam": ({"m", "v"}, set()),
    "feddg_ga": (set(), {"shares", "losses"}),
    "scaffold": ({"control"}, set()),
    "fedbn": (set(), set()),
}
"""Groups of arrays, and facts, that a strategy goes on from."""

STAYS = {"scaffold": f"control/{NETWORK}/0", "fedbn": f"layers/{NETWORK}/0"}
"""What a strategy keeps in a site's store."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        "scaffold",
        pytest.param("fedbn", marks=pytest.mark.long),
        pytest.param("fedadam", marks=pytest.mark.long),
        pytest.param("feddg_ga", marks=pytest.mark.long),
    ],
)
def test_a_study_that_was_cut_off_ends_as_an_undisturbed_one(
    laboratory, tmp_path, monkeypatch, strategy
):
    sites = laboratory.prepare_sites(0, tmp_path / "sites")
    stores = [Store(read_site(site).store) for site in sites]
    whole, broken = (lay_out(laboratory, tmp_path, name, strategy) for name in ("whole", "broken"))
    run_inline(whole, sites, Events())
    monkeypatch.setenv(SITES_VARIABLE, os.pathsep.join(map(str, sites)))
    with pytest.raises(KeyboardInterrupt):
        run_study(broken, CutOff(), "inline")
    kept = from_bytes(broken.checkpoint.read_bytes())
    assert kept.config["position"] == {GROUP: 1}
    state = kept.group(f"aggregation/{GROUP}")
    facts = kept.config["facts"]["aggregation"].get(GROUP, {})
    assert ({name.partition("/")[0] for name in state}, set(facts)) == KEPT[strategy]
    for store in stores:
        # Or what was computed before the cut would be given again.
        store.remove("job/")
    run_inline(broken, sites, Events())
    first, second = (from_bytes(w.checkpoint.read_bytes()) for w in (whole, broken))
    assert first.group(GROUP).keys() == second.group(GROUP).keys() != set()
    assert first.digest() == second.digest()
    for store in stores if strategy in STAYS else ():
        names = [f"study/{study}/{STAYS[strategy]}/0001" for study in ("whole", "broken")]
        own = [store.get(name) for name in names]
        assert own[0].digest() == own[1].digest()
        assert max(np.abs(array).max() for array in own[0].arrays.values()) > 1e-3


@pytest.mark.slow
def test_fedbn_publishes_the_mean_with_the_sources_layers(laboratory, tmp_path):
    sites = laboratory.prepare_sites(0, tmp_path / "sites")
    workspace = lay_out(laboratory, tmp_path, "published", "fedbn", ["publish"], rounds=1)
    run_inline(workspace, sites, Events())
    mean = from_bytes(workspace.checkpoint.read_bytes()).group(GROUP)
    source, final = Bundle.open(laboratory.root / "source"), Bundle.open(workspace.final_bundle)
    before, after = (load(b.read(f"classifiers/{NETWORK}.safetensors")) for b in (source, final))
    layers = layers_of(build_classifier(NETWORK, pretrained=False))
    assert after.keys() == before.keys() and mean.keys() == before.keys() - layers
    for name, array in after.items():
        np.testing.assert_array_equal(array, before[name] if name in layers else mean[name])
    assert final.manifest.facts["normalisation"]["classifiers"] == "local"
    assert "in place of the source's in this bundle" in workspace.model_card.read_text()
    stores = [Store(read_site(site).store) for site in sites]
    first, second = (store.get(f"study/published/{STAYS['fedbn']}/0000") for store in stores)
    assert first.arrays.keys() == layers and first.digest() != second.digest()
