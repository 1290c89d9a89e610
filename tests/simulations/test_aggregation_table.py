"""Cells of the aggregation table, on phantoms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sonofed_client.adaptation.evaluation import predict
from sonofed_client.adaptation.finetuning import finetune_round
from sonofed_common.runtime import derive_seed
from sonofed_simulations.laboratory import Laboratory
from sonofed_simulations.tables.aggregation import ADAM, AggregationTable, Length, site_images
from sonofed_simulations.tables.hospitals import read_hospitals
from sonofed_simulations.tables.start import read_start


@pytest.fixture(scope="module")
def table(laboratory: Laboratory) -> AggregationTable:
    start = read_start(laboratory.prepare_source(), "shufflenet_v2")
    return AggregationTable(start, read_hospitals(laboratory, 32), {}, Length(32, (0,), 1))


def test_a_cell_of_fedavg_is_the_mean_of_the_sites_rounds(table: AggregationTable) -> None:
    sites = [site_images(hospital, 0) for hospital in table.hospitals]
    arm = next(arm for arm in table.arms if arm.name == "FedAvg")
    outcome = table.run(arm, 0)
    assert outcome.facts == {"labels": sum(len(site.chosen) for site in sites)} == {"labels": 6}
    settings = ADAM.model_copy(update={"rounds": 1})
    ends = []
    for site in sites:
        model, seed = table.start.model(), derive_seed(0, site.name, 0)
        torch.manual_seed(seed)
        finetune_round(model, site.pool[site.chosen], site.labels, settings, 0, seed)
        ends.append({name: value.double() for name, value in model.state_dict().items()})
    mean = {name: torch.stack([end[name] for end in ends]).mean(0) for name in ends[0]}
    model = table.start.model()
    model.load_state_dict({k: v.to(model.state_dict()[k].dtype) for k, v in mean.items()})
    for site in sites:
        labels, probabilities, _ = outcome.predictions[site.name]
        np.testing.assert_allclose(probabilities, predict(model, site.test), atol=1e-3)
        assert np.array_equal(labels, site.test_labels)


def test_a_cell_of_fedbn_averages_all_but_the_layers_of_each_site(laboratory: Laboratory) -> None:
    start = read_start(laboratory.prepare_source(), "shufflenet_v2")
    table = AggregationTable(start, read_hospitals(laboratory, 32), {}, Length(32, (0,), 2))
    outcome = table.run(next(arm for arm in table.arms if arm.name == "FedBN"), 0)
    settings = ADAM.model_copy(update={"rounds": 2})
    sites = [site_images(hospital, 0) for hospital in table.hospitals]
    models = {site.name: start.model() for site in sites}
    norms = [n for n, m in start.model().named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    sizes = torch.tensor([len(site.chosen) for site in sites], dtype=torch.float64)
    for number in range(2):
        for site in sites:
            seed = derive_seed(0, site.name, number)
            torch.manual_seed(seed)
            images = site.pool[site.chosen]
            finetune_round(models[site.name], images, site.labels, settings, number, seed)
        for name, tensor in start.weights.items():
            if name.rpartition(".")[0] in norms:
                continue
            ends = torch.stack([m.state_dict()[name].double() for m in models.values()], dim=-1)
            for model in models.values():
                model.state_dict()[name].copy_((ends @ sizes / sizes.sum()).to(tensor.dtype))
    for site in sites:
        expected = predict(models[site.name].eval(), site.test)
        np.testing.assert_allclose(outcome.predictions[site.name][1], expected, atol=1e-4)
    assert len(
        {models[site.name].state_dict()[f"{norms[0]}.weight"].numpy().tobytes() for site in sites}
    ) == len(sites)


def test_arms_differ_in_who_trains_and_are_tested_alike(table: AggregationTable) -> None:
    found = {
        arm.name: table.run(arm, 0)
        for arm in table.arms
        if arm.name in ("local only", "FedDG-GA", "pooled")
    }
    sites = [site_images(hospital, 0) for hospital in table.hospitals]
    for site in sites:
        probabilities = [outcome.predictions[site.name][1] for outcome in found.values()]
        assert all(len(p) == len(site.test) and np.isfinite(p).all() for p in probabilities)
        assert len({p.tobytes() for p in probabilities}) == 3
    shares = {k: v for k, v in found["FedDG-GA"].facts.items() if k.startswith("weight of")}
    assert set(shares) == {f"weight of {site.name}" for site in sites}
    assert sum(shares.values()) == pytest.approx(1)


def test_a_cell_is_made_anew_when_its_settings_change(table: AggregationTable) -> None:
    origins = [table.origin(arm, seed) for arm in table.arms for seed in (0, 1)]
    assert len({str(sorted(origin.items())) for origin in origins}) == 2 * len(table.arms)
    assert len(table.tested()["seed-0"]["riverside"]) == 4
