"""The alerts and the panels of deploy/, and what they ask Prometheus."""

from __future__ import annotations

import json

import yaml

from tests.deploy.live import ROOT

ALERTS = yaml.safe_load((ROOT / "deploy/alerts.yaml").read_text())["groups"]
RULES = {rule["alert"]: rule for group in ALERTS for rule in group["rules"]}


def expressions() -> dict[str, list[str]]:
    dashboard = json.loads((ROOT / "deploy/dashboard.json").read_text())
    return {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in dashboard["panels"]}
