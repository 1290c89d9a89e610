"""``make deploy-demo``: docs/deploy.md, followed to the letter on one machine."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest

from sonofed_common.contract.results import read_results
from sonofed_common.supervision.supervisor import read_status

ROOT = Path(__file__).parent.parent.parent
PORTS = (8443, 8000, 8001, 9200, 9201, 9202)


def is_free(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.mark.demo
@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") is None,
    reason="needs nginx, the front",
)
def test_one_command_brings_a_deployment_up_and_a_study_to_its_report():
    taken = [port for port in PORTS if not is_free(port)]
    if taken:
        pytest.skip(f"ports that the page names are taken here: {taken}")
    # A short path: that of a socket may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="sonofed-", dir="/tmp") as name:
        folder = Path(name) / "demo"
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        done = subprocess.run(
            [ROOT / "deploy" / "demo.sh", folder], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        sites = tomllib.loads((folder / "project.toml").read_text())["sites"]
        report = (folder / "report.txt").read_text()
        assert len(sites) == 3 and all(site in report for site in sites)
        results = read_results(folder / "coordinator" / "studies" / "deployment" / "results.json")
        assert results.engine == "deployment" and results.missing_sites == ()
        assert set(results.sites) == set(sites)
        for name, site in results.sites.items():
            (classifier,) = site.classifiers.values()
            assert classifier.adapted is not None and classifier.adapted["auroc"] is not None, name
        calls = (folder / "coordinator" / "run" / "front-access.log").read_text().splitlines()
        assert calls and all(json.loads(call)["tls"].startswith("TLSv1.") for call in calls)
        for run in (folder / "coordinator" / "run", *(folder / "sites" / s / "run" for s in sites)):
            assert read_status(run) is None
        assert all(map(is_free, PORTS))
