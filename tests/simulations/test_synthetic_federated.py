from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sonofed_common.contract.records import from_bytes
from sonofed_common.runtime import SILENT
from sonofed_common.synthesis.memorisation import RefusedError
from sonofed_server.source.settings import DiffusionTraining, SourceData, WganTraining
from sonofed_simulations.tables import synthetic_federated
from sonofed_simulations.tables.arm_summary import MEAN
from sonofed_simulations.tables.equal_steps import Steps
from sonofed_simulations.tables.request import Request
from sonofed_simulations.tables.synthetic_federated import FederatedTable
from sonofed_simulations.tables.synthetic_federated_page import about, arms
from sonofed_simulations.tables.synthetic_federated_settings import FULL, QUICK, FederatedSettings
from sonofed_simulations.tables.synthetic_sets import SyntheticSet

torch.set_num_threads(1)

SIZE = 16
SITES = {name: SourceData(kind="table", path=Path(name)) for name in ("north", "south")}
SETTINGS = FederatedSettings(
    image_size=SIZE,
    seeds=(0,),
    sites=tuple(SITES),
    test_fraction=0.3,
    network="shufflenet_v2",
    rounds=1,
    # At the first step of a round nothing has drifted yet.
    local=Steps(steps=2, batch_size=4),
    wgan=WganTraining(steps=1, batch_size=4, width=16),
    diffusion=DiffusionTraining(epochs=1),
    synthetic=2,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sites of noise with a dark disc (benign) or a dark bar (malignant)."""
    root = tmp_path_factory.mktemp("data")
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    for number, site in enumerate(SITES):
        draws = np.random.default_rng(number)
        (root / site).mkdir()
        rows = ["image,label,patient"]
        for n in range(16):
            pixels = draws.integers(120, 255, (SIZE, SIZE))
            pixels[abs(x - y) < 3 if n % 2 else x**2 + y**2 < 16] //= 5
            Image.fromarray(pixels.astype(np.uint8)).save(root / site / f"{n}.png")
            rows.append(f"{n}.png,{'malignant' if n % 2 else 'benign'},p{n}")
        (root / site / "table.csv").write_text("\n".join(rows))
    return root


def table(data: Path, out: Path, **changes: object) -> FederatedTable:
    request = Request("federated", True, out, data, (1, 1), SILENT)
    return FederatedTable(SETTINGS.model_copy(update=changes), request, SITES)


def test_fedprox_without_its_weight_is_fedavg_and_with_it_is_not(
    data: Path, tmp_path: Path
) -> None:
    plain, pulled = table(data, tmp_path, proximal=0.0), table(data, tmp_path, proximal=100.0)
    named = {arm.name: arm for arm in plain.arms}
    average = plain.run(named["FedAvg"], 0)
    same, other = (made.run(named["FedProx"], 0) for made in (plain, pulled))
    assert average.predictions.keys() == {"north", "south"} and not average.facts
    for site, (labels, probabilities, patients) in average.predictions.items():
        assert np.array_equal(same.predictions[site][1], probabilities)
        assert len(labels) == len(probabilities) == len(set(patients.tolist())) >= 4
    assert any(
        not np.array_equal(other.predictions[site][1], average.predictions[site][1])
        for site in SITES
    )


def test_every_site_shares_what_passes_its_own_gate(data: Path, tmp_path: Path) -> None:
    made = table(data, tmp_path)
    arm = next(arm for arm in made.arms if arm.name == "FedAvg + diffusion images")
    outcome = made.run(arm, 0)
    assert 2 <= outcome.facts["images shared"] <= 4
    assert outcome.facts["least distance allowed"] > 0
    folder = tmp_path / "work" / "synthetic" / "seed-0" / "diffusion"
    assert {path.parent.name for path in folder.glob("*/2-images.safetensors")} == set(SITES)
    assert set(made.origin(arm, 0)["synthetic"]) == set(SITES)
    digests = made.origin(arm, 0)["data"]
    assert len(set(digests.values())) == len(SITES)
    for name, digest in digests.items():
        kept = from_bytes((folder / name / "2-images.safetensors").read_bytes())
        assert kept.config["origin"]["data"] == digest


def test_a_site_whose_images_are_refused_shares_none_and_the_others_go_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = table(data, tmp_path)
    arm = next(arm for arm in made.arms if arm.name == "FedAvg + diffusion images")
    refused = set(list(SITES)[:1])
    original = synthetic_federated.synthetic_set

    def refuse(*given: Any) -> SyntheticSet:
        if given[4].name in refused:
            raise RefusedError("too little passes")
        return original(*given)

    monkeypatch.setattr(synthetic_federated, "synthetic_set", refuse)
    assert made.run(arm, 0).facts["sites that share"] == len(SITES) - 1
    refused |= set(SITES)
    with pytest.raises(RefusedError, match="no site's diffusion images"):
        table(data, tmp_path).run(arm, 0)


def test_arms_and_claims_are_of_rows_that_there_are() -> None:
    names = {arm.name for arm in arms()}
    assert len(names) == 6 and all(arm.against in {None, *names} for arm in arms())
    for settings in (QUICK, FULL):
        for claim in about(settings).claims:
            assert set(claim.arms) <= names and claim.site == MEAN
