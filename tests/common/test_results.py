from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sonofed_common.contract.errors import ConfigurationError
from sonofed_common.contract.results import (
    METRICS,
    ClassifierResults,
    Estimate,
    Results,
    SiteResults,
    compared_sites,
    gain,
    mean_over_sites,
    over_sites,
    read_results,
    site_estimate,
    worst_site,
    write_results,
)


def measures(auroc: float, half: float = 0.08, **others: float) -> dict[str, float | None]:
    return {"auroc": auroc, "auroc_low": auroc - half, "auroc_high": auroc + half, **others}


def site(source: float, adapted: float | None, **facts: Any) -> SiteResults:
    found = ClassifierResults(
        source=measures(source, ece=1 - source),
        adapted=None if adapted is None else measures(adapted, ece=1 - adapted),
    )
    return SiteResults(
        images=100, selected=22, labelled=20, classifiers={"resnet18": found}, **facts
    )


def results(**sites: SiteResults) -> Results:
    return Results(
        study="trial",
        study_digest="0" * 64,
        seed=0,
        engine="in-process",
        started="2026-01-02T03:04:05Z",
        seconds=1.5,
        sites=sites,
    )


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_not_a_number_is_null_in_the_file_and_none_when_read(tmp_path: Path) -> None:
    one_class = ClassifierResults(source={"auroc": math.nan, "accuracy": 0.5})
    written = results(North=SiteResults(classifiers={"resnet18": one_class}))
    write_results(written, tmp_path / "deep" / "results.json")

    text = (tmp_path / "deep" / "results.json").read_text(encoding="utf-8")
    source = strict(text)["sites"]["North"]["classifiers"]["resnet18"]["source"]
    assert source == {"auroc": None, "accuracy": 0.5}
    assert read_results(tmp_path / "deep" / "results.json") == written
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["results.json"]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(METRICS), st.floats()), st.text(min_size=1))
def test_any_measure_and_any_name_survive_the_file(
    tmp_path: Path, metrics: dict[str, float], name: str
) -> None:
    name = name.encode("utf-8", "replace").decode()
    found = ClassifierResults(source=dict(metrics))
    written = results(**{name: SiteResults(classifiers={"resnet18": found})})
    write_results(written, tmp_path / "results.json")
    read = read_results(tmp_path / "results.json")
    assert read == written
    for key, value in read.sites[name].classifiers["resnet18"].source.items():
        assert value == (metrics[key] if math.isfinite(metrics[key]) else None)


def test_unknown_keys_and_measures_are_refused_with_a_hint(tmp_path: Path) -> None:
    write_results(results(North=site(0.7, 0.8)), tmp_path / "results.json")
    values = strict((tmp_path / "results.json").read_text())
    (tmp_path / "typo.json").write_text(json.dumps({**values, "enginee": "x"}))
    with pytest.raises(ConfigurationError, match="unknown key 'enginee'; did you mean 'engine'"):
        read_results(tmp_path / "typo.json")

    classifier = values["sites"]["North"]["classifiers"]["resnet18"]
    classifier["source"]["acuracy"] = 0.5
    (tmp_path / "measure.json").write_text(json.dumps(values))
    with pytest.raises(ConfigurationError, match="unknown measure 'acuracy'"):
        read_results(tmp_path / "measure.json")


@pytest.mark.parametrize("text", [None, "{", '{"study": NaN}', "[]"])
def test_a_broken_file_gives_one_sentence(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        read_results(path)
    assert "results.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_sites_with_both_measures_are_compared() -> None:
    found = results(North=site(0.7, 0.9), South=site(0.8, 0.85), Lost=site(0.4, None))
    assert compared_sites(found) == ("North", "South")
    before, after = mean_over_sites(found, "source"), mean_over_sites(found, "adapted")
    assert before is not None and before.value == pytest.approx(0.75)
    assert after is not None and after.value == pytest.approx(0.875)
    assert mean_over_sites(found, "bn_adapted") is None


def test_the_worst_site_may_change_and_low_is_good_for_errors() -> None:
    found = results(North=site(0.7, 0.9), South=site(0.8, 0.85))
    before, after = worst_site(found, "source"), worst_site(found, "adapted")
    assert before is not None and before[0] == "North"
    assert after is not None and after[0] == "South"
    error = worst_site(found, "source", "ece")
    assert error is not None and error[0] == "North" and error[1].value == pytest.approx(0.3)
    assert worst_site(results(Lost=site(0.4, None)), "source") is None


def test_classifiers_of_a_site_are_averaged_and_none_may_lack_the_measure() -> None:
    two = {
        "a": ClassifierResults(source=measures(0.7)),
        "b": ClassifierResults(source=measures(0.8, 0.04)),
    }
    assert site_estimate(SiteResults(classifiers=two), "source") == pytest.approx(
        (0.75, 0.69, 0.81)
    )
    two["c"] = ClassifierResults(source={"auroc": math.nan})
    assert site_estimate(SiteResults(classifiers=two), "source") is None


def test_interval_of_a_mean_over_sites_agrees_with_simulation() -> None:
    generator = np.random.default_rng(0)
    values, errors = np.array([0.7, 0.8, 0.9]), np.array([0.02, 0.05, 0.03])
    draws = generator.normal(values, errors, size=(200_000, 3)).mean(axis=1)
    mean = over_sites(
        Estimate(v, v - 1.96 * e, v + 1.96 * e) for v, e in zip(values, errors, strict=True)
    )
    assert mean is not None
    assert (mean.low, mean.high) == pytest.approx(
        tuple(np.quantile(draws, [0.025, 0.975])), abs=5e-4
    )


def test_gain_carries_its_sign_and_a_cautious_interval() -> None:
    change = gain(Estimate(0.8, 0.7, 0.9), Estimate(0.7, 0.6, 0.8))
    assert change is not None
    assert change == pytest.approx((-0.1, -0.1 - math.sqrt(2) / 10, -0.1 + math.sqrt(2) / 10))
    assert gain(None, Estimate(0.7)) is None
    assert gain(Estimate(0.6), Estimate(0.7)) == pytest.approx((0.1, None, None))
