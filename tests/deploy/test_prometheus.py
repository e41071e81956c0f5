"""Prometheus itself reads the metrics, the alerts and the dashboard's expressions, where it is installed."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.expressions import RULES, expressions
from tests.deploy.live import ROOT, page, scraped, use
from tests.serve.waiting import until

pytestmark = pytest.mark.outside
HERE = Path(__file__).parent


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian's package prometheus has it)")
    return found


def promtool(*arguments: str | Path, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [tool("promtool"), *map(str, arguments)]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)


def test_the_page_is_as_prometheus_wants_it() -> None:
    checked = promtool("check", "metrics", text=page())
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_of_vllms_names_it_minds_the_colons_alone() -> None:
    checked = promtool("check", "metrics", text=page(vllm=True))
    said = re.findall(r"^(\S+) (.*)$", checked.stdout + checked.stderr, flags=re.MULTILINE)
    assert {about for _, about in said} == {"metric names should not contain ':'"}
    assert {name.partition(":")[0] for name, _ in said} == {"vllm"}


def test_the_alerts_are_rules() -> None:
    checked = promtool("check", "rules", ROOT / "deploy/alerts.yaml")
    assert checked.returncode == 0, checked.stderr
    assert f"{len(RULES)} rules found" in checked.stdout


def test_each_alert_fires_for_a_server_in_trouble_and_for_no_other(tmp_path: Path) -> None:
    for file in (ROOT / "deploy/alerts.yaml", HERE / "alerts_test.yaml"):
        shutil.copy(file, tmp_path)
    checked = promtool("test", "rules", tmp_path / "alerts_test.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_scraper_is_told_in_its_own_words(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/operating.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    # Debian's Prometheus is built without what asks Kubernetes.
    kubernetes, targets = "kubernetes_sd_configs:\n      - role: pod", "static_configs:\n      - targets: []"
    assert blocks[1].count(kubernetes) == 1
    for block in (blocks[0], blocks[1].replace(kubernetes, targets)):
        (tmp_path / "prometheus.yaml").write_text(block)
        checked = promtool("check", "config", "--syntax-only", tmp_path / "prometheus.yaml")
        assert checked.returncode == 0, checked.stderr


Ask = Callable[[str], list[Any]]
"""Evaluates an expression: what there is of it."""


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """A Prometheus that has scraped a server in use, several times."""
    folder, program = tmp_path_factory.mktemp("prometheus"), tool("prometheus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with scraped() as (url, served):
        target = {"job_name": "taper", "static_configs": [{"targets": [urllib.parse.urlsplit(url).netloc]}]}
        config = {"global": {"scrape_interval": "500ms"}, "scrape_configs": [target]}
        (folder / "prometheus.yaml").write_text(json.dumps(config))  # which is YAML, too
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder}/prometheus.yaml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stderr=subprocess.DEVNULL,
        )

        def query(expression: str) -> list[Any]:
            asked = urllib.parse.urlencode({"query": expression})
            with urllib.request.urlopen(
                f"http://127.0.0.1:{port}/api/v1/query?{asked}", timeout=10
            ) as answer:
                return json.load(answer)["data"]["result"]

        def ready() -> bool:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready"):
                return True
            return False

        try:
            until(lambda: ready() and bool(query("taper_queued_requests")), 30)
            use(served)
            until(lambda: bool(query('rate(taper_requests_total{code="OK"}[1m]) > 0')), 30)
            yield query
        finally:
            process.terminate()
            process.wait()


@pytest.mark.parametrize("alert", RULES)
def test_the_expression_of_an_alert_has_a_value_for_a_server(alert: str, ask: Ask) -> None:
    """Whatever it is compared with."""
    expression, *_ = re.split(r" (?:>|==) [\d.]+$", RULES[alert]["expr"])
    assert ask(expression)


@pytest.mark.parametrize("title", expressions())
def test_the_expressions_of_a_panel_have_values(title: str, ask: Ask) -> None:
    for each in expressions()[title]:
        assert ask(each.replace("$__rate_interval", "5m").replace("$instance", ".*")), each
