"""The chart of a coordinator, rendered by Helm's own library; no cluster is asked."""

import base64
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from sonofed_common.contract.configuration import validate
from sonofed_server.provisioning.keys import make_keys
from sonofed_server.provisioning.project import Coordinator, Project

helm = pytest.importorskip("helm_python", reason="needs helm-python-sdk")

ROOT = Path(__file__).parent.parent
CHART = ROOT / "deploy" / "helm" / "sonofed-coordinator"
PROJECT = {
    "name": "trial",
    "address": "fed.example.org:8444",
    "sites": ["north", "south"],
    "contact": 'it@example.org, "day" and night',
    "health_port": 8101,
    "body_megabytes": 128,
}


def rendered(**values):
    with helm.Chart.load(CHART) as chart:
        found = chart.render({"project": PROJECT, **values}, name="demo", namespace="fed")
    texts = [text for path, text in found.items() if path.endswith(".yaml")]
    objects = [yaml.safe_load(text) for text in texts]
    assert len({each["kind"] for each in objects}) == len(objects)
    return {each["kind"]: each for each in objects}


@pytest.fixture(scope="module")
def objects():
    return rendered()


@pytest.fixture(scope="module")
def pod(objects):
    return objects["StatefulSet"]["spec"]["template"]["spec"]


def test_helm_finds_nothing_wrong_with_the_chart():
    report = helm.lint(CHART, {"project": PROJECT}, strict=True)
    # Of severity 2 are warnings; the chart has no picture, which is of severity 1.
    assert report["errors"] == [] and all(said["severity"] < 2 for said in report["messages"])


def test_the_settings_are_those_of_the_project_file(objects):
    text = objects["ConfigMap"]["data"]["project.toml"]
    project = validate(Project, tomllib.loads(text), "project.toml")
    assert project == Project.model_validate(PROJECT)
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["properties"]["project"]["properties"].keys() == Project.model_fields.keys()
    needed = {name for name, field in Project.model_fields.items() if field.is_required()}
    assert set(schema["properties"]["project"]["required"]) == needed


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"project": {}}, "address"),
        ({"project": {**PROJECT, "adress": "fed.example.org:8443"}}, "adress"),
        ({"project": {**PROJECT, "address": "fed.example.org:443"}}, "/project/address"),
        ({"project": {**PROJECT, "sites": []}}, "/project/sites"),
        ({"hospitals": []}, "/hospitals"),
        ({"key": "other"}, "key"),
    ],
)
def test_values_that_cannot_serve_are_refused(values, named):
    with pytest.raises(helm.HelmValuesError, match=re.escape(named)):
        rendered(**values)


def test_the_pod_is_nobody_special_and_writes_nothing_but_its_state(pod):
    (container,) = pod["containers"]
    security = {**pod["securityContext"], **container["securityContext"]}
    assert security["runAsNonRoot"] and security["readOnlyRootFilesystem"]
    assert security["allowPrivilegeEscalation"] is False and "privileged" not in security
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    recipe = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()
    assert re.search(rf"useradd --uid {security['runAsUser']} .* sonofed-user\b", recipe)
    writable = [m["mountPath"] for m in container["volumeMounts"] if not m.get("readOnly")]
    assert writable == ["/srv/sonofed/coordinator", "/tmp"]


def test_keys_come_of_a_secret_that_lacks_the_authoritys_own(pod, tmp_path):
    """Every key that the coordinator's programs read, where they look for it."""
    (container,) = pod["containers"]
    place = Coordinator(Project.model_validate(PROJECT), Path("/srv/sonofed/coordinator"))
    mounted = {m["mountPath"] for m in container["volumeMounts"] if m["name"] == "keys"}
    read = (
        *(place.authority, place.front, place.superlink_certificate, place.superlink_key),
        place.signing_key,
    )
    assert mounted == set(map(str, read))
    made = Coordinator(place.project, tmp_path / "coordinator")
    make_keys(made)
    files = {path.name for path in made.root.iterdir() if path.is_file()}
    assert files - {Path(path).name for path in mounted} == {made.authority_key.name}
    named = re.search(r"for name in ([^;]+);", (CHART / "values.yaml").read_text())[1]
    assert set(re.findall(r"[\w.]+", named.replace("#", ""))) == {Path(p).name for p in mounted}
    (secret,) = [v["secret"] for v in pod["volumes"] if v["name"] == "keys"]
    assert secret == {"secretName": "sonofed-keys", "defaultMode": 0o400}
    for other in rendered(keys="another")["ConfigMap"]["data"].values():
        assert "PRIVATE" not in other and base64.b64encode(b"PRIVATE").decode() not in other


def test_the_front_alone_can_be_reached_and_nobody_is_called(objects, pod):
    (container,) = pod["containers"]
    assert container["ports"] == [{"name": "front", "containerPort": 8444}]
    service, policy = objects["Service"]["spec"], objects["NetworkPolicy"]["spec"]
    assert service["ports"] == [{"name": "front", "port": 8444, "targetPort": "front"}]
    labels = objects["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    for selector in (
        service["selector"],
        policy["podSelector"]["matchLabels"],
        objects["StatefulSet"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items() and selector
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"} and policy["egress"] == []
    (way,) = rendered(hospitals=["192.0.2.0/24"])["NetworkPolicy"]["spec"]["ingress"]
    assert way["from"] == [{"ipBlock": {"cidr": "192.0.2.0/24"}}]
    assert way["ports"] == [{"port": "front", "protocol": "TCP"}]


def test_every_probe_asks_the_supervisors_healthz(objects, pod):
    (container,) = pod["containers"]
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        program, _, script = container[name]["exec"]["command"]
        assert program == "python"
        compile(script, name, "exec")
        assert f"http://127.0.0.1:{PROJECT['health_port']}/healthz" in script
    # A supervisor's longest pause is a minute, which must not end the pod.
    live = container["livenessProbe"]
    assert live["failureThreshold"] * live["periodSeconds"] >= 600
    assert container["command"] == [
        *("sonofed-coordinator", "up", "--project", "/srv/sonofed/project.toml")
    ]
    assert objects["StatefulSet"]["spec"]["replicas"] == 1
    (claim,) = objects["StatefulSet"]["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["name"] == "state"
