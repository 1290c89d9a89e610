from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sonofed_common.contract.bundle import Bundle
from sonofed_common.contract.results import SEGMENTATION_STAGES, read_results

LAB = Path(sys.executable).with_name("sonofed-lab")


@pytest.mark.demo
@pytest.mark.timeout(1500)
def test_the_demo_shows_a_domain_gap_and_closes_some_of_it(tmp_path: Path) -> None:
    command = [str(LAB), "demo", "--out", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "Mean" in finished.stdout
    results = read_results(tmp_path / "results.json")
    at_home = Bundle.open(tmp_path / "source").manifest.facts["classifiers"]["efficientnet_lite0"]
    away = []
    for name, site in results.sites.items():
        classifier = site.classifiers["efficientnet_lite0"]
        assert classifier.adapted is not None
        before, after = classifier.source["auroc"], classifier.adapted["auroc"]
        assert before is not None and after is not None
        assert after > before, name
        away.append(before)
        masks = site.segmentation
        assert masks.keys() == set(SEGMENTATION_STAGES), name
        assert all(0 < (m["dice"] or 0) < 1 for m in masks.values()), name
    assert at_home["metrics"]["auroc"] - sum(away) / len(away) >= 0.10
    assert max(phase.peak_memory_bytes or 0 for phase in results.phases) < 6e9
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in results.sites)
