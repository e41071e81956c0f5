"""docs/operating.md and deploy/ name what a server reports, and nothing else."""

from __future__ import annotations

import re

import pytest

from taper_client.errors import RETRY_AFTER
from tests.deploy.expressions import RULES, expressions
from tests.deploy.live import ROOT, faults, page, selectors, series

SUFFIXES = ("_bucket", "_sum", "_count")
GUIDE = (ROOT / "docs/operating.md").read_text()


@pytest.fixture(scope="module")
def there():
    return series(page(vllm=True))


def rows() -> list[list[set[str]]]:
    """Of each row about metrics in the page's tables: what is named in each of its cells."""
    lines = re.findall(r"^\| (`(?:taper_|vllm:).*) \|$", GUIDE, flags=re.MULTILINE)
    return [[set(re.findall(r"`(.+?)`", cell)) for cell in line.split(" |")] for line in lines]


def test_the_page_for_operators_has_every_metric_with_its_labels(there) -> None:
    reported: dict[str, set[str]] = {}
    for name, labels in there.items():
        family = name
        for suffix in SUFFIXES:
            if f"{name.removesuffix(suffix)}_bucket" in there:
                family = name.removesuffix(suffix)
        reported.setdefault(family, set()).update(labels.keys() - {"le"})
    del reported["up"]
    assert {name: labels for names, labels, *_ in rows() for name in names} == reported
    assert sum(len(names) for names, *_ in rows()) == len(reported), "each has one row"


def test_the_page_says_which_metric_each_alert_uses_and_what_to_do() -> None:
    said = {
        (alert, name) for names, *_, alerts in rows() for alert in alerts & RULES.keys() for name in names
    }
    used = {
        (alert, each.name.removesuffix("_count"))
        for alert, rule in RULES.items()
        for each in selectors(rule["expr"])
        if each.name != "up"
    }
    assert said == used
    advice = GUIDE[GUIDE.index("\n## Alerts") :]
    assert RULES.keys() == set(re.findall(r"`(Taper\w+)`", advice))


@pytest.mark.parametrize("alert", RULES)
def test_an_alert_asks_for_what_there_is(alert: str, there) -> None:
    rule = RULES[alert]
    assert faults(rule["expr"], there) == []
    assert {*rule["labels"], *rule["annotations"]} == {"severity", "summary", "description"}


def test_an_alert_of_a_label_that_is_not_there_is_found(there) -> None:
    assert faults('sum by (who) (rate(taper_slo_total{meet="no"}[5m])) / taper_none', there) == [
        "there is no taper_none",
        "taper_slo_total has no label meet",
        "nothing has a label who",
    ]
    assert faults('taper_slo_total{met="no"} > 0.05', there) == ["taper_slo_total has no met {'no'}"]


def test_reasons_that_alerts_name_are_reasons() -> None:
    named = {
        reason
        for rule in RULES.values()
        for each in selectors(rule["expr"])
        for reason in each.labels.get("reason", ())
    }
    assert named
    assert named <= RETRY_AFTER.keys()


@pytest.mark.parametrize("title", expressions())
def test_a_panel_asks_for_what_there_is(title: str, there) -> None:
    assert [fault for each in expressions()[title] for fault in faults(each, there)] == []
