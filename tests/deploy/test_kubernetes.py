"""The cluster's files fit together, the image and the server's options."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.config import ServerConfig
from serve.config.command_line import configured
from serve.health_command import parser
from tests.deploy.dockerfile import the
from tests.deploy.live import ROOT, faults, page, series

FILE = ROOT / "deploy/kubernetes.yaml"
ALL = [*yaml.safe_load_all(FILE.read_text())]
OBJECTS: dict[str, Any] = {each["kind"]: each for each in ALL if each["metadata"]["name"] == "taper"}
GATEWAY: dict[str, Any] = {each["kind"]: each for each in ALL if each["metadata"]["name"] == "smg"}
DEPLOYMENT = OBJECTS["Deployment"]["spec"]
POD = DEPLOYMENT["template"]["spec"]
(CONTAINER,) = POD["containers"]
OPTIONS = OBJECTS["ConfigMap"]["data"]["server.toml"]
SCALED = yaml.safe_load((ROOT / "deploy/keda.yaml").read_text())["spec"]
BOUNDS = (
    15  # seconds that a server takes beyond its --drain-timeout: for the engine to end, for last messages
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ServerConfig:
    file = tmp_path_factory.mktemp("options") / "server.toml"
    file.write_text(OPTIONS)
    return configured(["--config", str(file)])


def test_there_are_two_servers_and_one_of_them_always_serves() -> None:
    assert DEPLOYMENT["replicas"] == 2
    assert OBJECTS["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    assert DEPLOYMENT["strategy"]["rollingUpdate"]["maxUnavailable"] == 1
    assert SCALED["minReplicaCount"] == 2
    assert SCALED["scaleTargetRef"]["name"] == OBJECTS["Deployment"]["metadata"]["name"]


def test_everything_finds_the_servers() -> None:
    labels = DEPLOYMENT["template"]["metadata"]["labels"]
    assert DEPLOYMENT["selector"]["matchLabels"] == labels
    assert OBJECTS["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    service = OBJECTS["Service"]["spec"]
    assert (service["clusterIP"], service["selector"]) == ("None", labels), "a client sees every server"
    assert {port["targetPort"]: port["port"] for port in service["ports"]} == ports_of_callers()


def ports_of_callers() -> dict[str, int]:
    """All but the gateways'."""
    return {port["name"]: port["containerPort"] for port in CONTAINER["ports"] if port["name"] != "gateway"}


def test_the_ports_are_those_that_the_server_listens_on(config: ServerConfig) -> None:
    ports = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}
    assert ports == {"grpc": config.port, "metrics": config.metrics_port, "gateway": config.gateway_port}
    assert {config.host, config.metrics_host, config.gateway_host} == {"0.0.0.0"}


def test_the_port_that_asks_nobody_is_the_gateways_alone() -> None:
    policy, labels = OBJECTS["NetworkPolicy"]["spec"], DEPLOYMENT["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"] == labels
    open_to_all, of_gateways = policy["ingress"]
    assert {each["port"] for each in open_to_all["ports"]} == ports_of_callers().keys()
    assert [each["port"] for each in of_gateways["ports"]] == ["gateway"]
    [its] = of_gateways["from"]
    assert its == {"podSelector": {"matchLabels": GATEWAY["Deployment"]["spec"]["selector"]["matchLabels"]}}


def test_the_gateway_finds_the_servers_and_may_look_for_them(config: ServerConfig) -> None:
    spec = GATEWAY["Deployment"]["spec"]
    pod, labels = spec["template"]["spec"], spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == GATEWAY["Service"]["spec"]["selector"] == labels
    [container] = pod["containers"]
    options = dict(each.partition("=")[::2] for each in container["args"])
    [(key, value)] = DEPLOYMENT["template"]["metadata"]["labels"].items()
    assert options["--selector"] == f"{key}={value}"
    assert options["--service-discovery-port"] == str(config.gateway_port)
    assert [each["containerPort"] for each in container["ports"]] == [int(options["--port"])]
    names = {pod["serviceAccountName"], *(each["metadata"]["name"] for each in GATEWAY.values())}
    assert (
        names
        == {GATEWAY["RoleBinding"]["subjects"][0]["name"]}
        == {GATEWAY["RoleBinding"]["roleRef"]["name"]}
    )
    assert GATEWAY["Role"]["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    ]


def test_a_server_has_the_time_to_drain(config: ServerConfig) -> None:
    pause = int(CONTAINER["lifecycle"]["preStop"]["exec"]["command"][1])
    assert POD["terminationGracePeriodSeconds"] > pause + config.drain_timeout + BOUNDS


def mounted() -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each volume is."""
    volumes = {each["name"]: each for each in POD["volumes"]}
    for mount in CONTAINER["volumeMounts"]:
        yield mount["mountPath"], volumes.pop(mount["name"])
    assert not volumes


def test_every_file_that_is_named_is_mounted(config: ServerConfig) -> None:
    places = dict(mounted())
    assert places[json.loads(the("ENTRYPOINT"))[2]]["configMap"]["name"] == "taper"
    assert places[the("VOLUME")].keys() == {"name", "emptyDir"}
    secrets = {place: each["secret"]["secretName"] for place, each in places.items() if "secret" in each}
    tls = {config.tls_cert_path, config.tls_key_path}
    assert {str(Path(str(path)).parent) for path in tls} == {"/etc/taper/tls"}
    assert str(Path(str(config.tokens)).parent) == "/etc/taper/tokens"
    assert secrets == {"/etc/taper/tls": "taper-tls", "/etc/taper/tokens": "taper-tokens"}


def test_the_server_is_the_images_user_and_can_do_little() -> None:
    user, context = the("USER").partition(":")[0], POD["securityContext"]
    assert {str(context[each]) for each in ("runAsUser", "runAsGroup", "fsGroup")} == {user}
    assert CONTAINER["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert (context["runAsNonRoot"], POD["automountServiceAccountToken"]) == (True, False)


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_health_is_asked_for_by_the_images_own_command(probe: str) -> None:
    command, *arguments = CONTAINER[probe]["exec"]["command"]
    assert json.loads(the("HEALTHCHECK").partition("CMD ")[2]) == [command]
    asked = parser().parse_args(arguments)
    assert asked.tls_ca_cert_path.startswith("/etc/taper/tls/")
    assert CONTAINER[probe]["timeoutSeconds"] > asked.timeout


def test_autoscaling_asks_for_what_there_is() -> None:
    there = series(page())
    assert [faults(each["metadata"]["query"], there) for each in SCALED["triggers"]] == [[]]


@pytest.mark.outside
def test_the_objects_are_valid_by_kubernetes_own_schemas(tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", tmp_path, "kubernetes-validate"]
    subprocess.run(install, check=True, timeout=300)
    checked = subprocess.run(
        [tmp_path / "bin/kubernetes-validate", "--strict", FILE],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path)},
        timeout=60,
    )
    said = checked.stdout + checked.stderr
    assert (checked.returncode, said.count(" passed for resource ")) == (0, len(ALL)), said
