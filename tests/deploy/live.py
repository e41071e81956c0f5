"""The metrics of a server that has answered, refused and failed requests, as a scraper gets them."""

from __future__ import annotations

import contextlib
import re
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from serve.config import ServerConfig
from serve.served import Served
from serve.server import scraping
from serve.server.scraping import metrics_page
from serve.server.service import Service
from tests.serve.fakes import STEP, FakeEngine, finished, served_model

ROOT = Path(__file__).parents[2]
JOB = {"job", "instance"}  # that Prometheus adds to all

Labels = Mapping[str, set[str]]
"""Of each label, its values."""


def service(vllm: bool = False) -> Service:
    served = Service(ServerConfig(port=0, vllm_metric_names=vllm))
    served.serve(Served(engine=FakeEngine(), model=served_model()))
    return served


def use(served: Service) -> None:
    """A few requests and steps."""
    metrics = served.metrics
    for code, reason in (("OK", ""), ("RESOURCE_EXHAUSTED", "QUEUE_FULL"), ("INTERNAL", "ENGINE_FAILED")):
        metrics.count_request(code, "search", reason)
    metrics.observe_finished(finished("r", 5), "search")
    for _ in range(3):
        metrics.observe_step(STEP)


@contextlib.contextmanager
def scraped(vllm: bool = False) -> Iterator[tuple[str, Service]]:
    """The address of a used server's metrics, without a path."""
    served = service(vllm)
    use(served)
    url, stop = scraping.listen("127.0.0.1", 0, {"/metrics": metrics_page(served.metrics.registry)})
    try:
        yield url, served
    finally:
        stop()


def page(vllm: bool = False) -> str:
    with scraped(vllm) as (url, _), urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        return answer.read().decode()


def series(text: str) -> dict[str, Labels]:
    """Each sample's name on a page, with its labels and their values; and Prometheus' own `up`."""
    found: dict[str, dict[str, set[str]]] = {"up": {}}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


class Selector(NamedTuple):
    """What an expression asks for: a metric's name, and the values of its labels that it names."""

    name: str
    labels: Labels


_WORDS = re.compile(r"[a-zA-Z_:][\w:]*")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_GROUPING = re.compile(r"\b(?:by|on|without|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_NO_METRICS = {"and", "or", "unless", "bool", "offset"}


def selectors(expression: str) -> list[Selector]:
    """Those of a PromQL expression in the simple form that the alerts and panels have."""
    bare = _GROUPING.sub("", expression)
    found = []
    for match in re.finditer(r"([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?(\s*\()?", re.sub(r"\[[^]]*\]", "", bare)):
        name, matchers, call = match.groups()
        if call or name in _NO_METRICS:
            continue
        labels = {label: set(value.split("|")) for label, _, value in _MATCHER.findall(matchers or "")}
        found.append(Selector(name, labels))
    return found


def groupings(expression: str) -> set[str]:
    """The labels that it groups by."""
    return {label for labels in _GROUPING.findall(expression) for label in _WORDS.findall(labels)}


def faults(expression: str, there: Mapping[str, Labels]) -> list[str]:
    """What it asks for that no server has."""
    asked = selectors(expression)
    found = [f"there is no {each.name}" for each in asked if each.name not in there]
    known = set(JOB)
    for name, wanted in (each for each in asked if each.name in there):
        known |= there[name].keys()
        for label, values in wanted.items():
            if label not in there[name] and label not in JOB:
                found.append(f"{name} has no label {label}")
            elif label in there[name] and (missing := values - there[name][label]) and "$" not in str(values):
                found.append(f"{name} has no {label} {missing}")
    return found + [f"nothing has a label {label}" for label in groupings(expression) - known]
