"""How busy the engine is, read when it is scraped: under the server's own names, and under vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from serve.door import Load, Programs

_KV_USED = "Share of the KV pages that running requests hold: 0 to 1"


class LoadCollector:
    """Of a model's engine. What is about one model has its name as a label, as autoscalers ask by it."""

    def __init__(self, load: Callable[[], Load], model_name: str) -> None:
        self._load, self._model_name = load, model_name

    def describe(self) -> list[Metric]:
        return []  # or registering would ask for the load of an engine that may not run yet

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        for name, (text, value) in _gauges(load).items():
            yield _gauge(f"taper_{name}", text, value, model_name=self._model_name)
        yield _programs(load.programs)


class VllmCollector:
    """The same load, by the names and with the labels that vLLM gives it: what autoscalers and routers of
    Kubernetes read."""

    def __init__(self, load: Callable[[], Load], model_name: str, page_size: int) -> None:
        self._load, self._model_name, self._page_size = load, model_name, page_size

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        now = load.scheduler
        gauges = {
            "num_requests_running": ("Requests that run", now.running_requests),
            "num_requests_waiting": ("Requests that wait to start", now.queued_requests),
            "kv_cache_usage_perc": (_KV_USED, load.kv_used_ratio),
        }
        labels = {"model_name": self._model_name, "engine": "0"}
        for name, (text, value) in gauges.items():
            yield _gauge(f"vllm:{name}", text, value, **labels)
        pages = {"block_size": self._page_size, "num_gpu_blocks": now.kv_capacity_tokens // self._page_size}
        sizes = {name: str(size) for name, size in pages.items()}
        yield _gauge("vllm:cache_config_info", "How the KV cache is divided", 1, **labels, **sizes)


def _gauges(load: Load) -> dict[str, tuple[str, float]]:
    """Each one's text and value, by name."""
    now, accuracy = load.scheduler, load.accuracy
    return {
        "running_requests": ("Requests that run", now.running_requests),
        "running_branches": ("Branches of the requests that run", now.running_branches),
        "queued_requests": ("Requests that wait to start", now.queued_requests),
        "kv_used_tokens": ("KV positions of the pages that running requests hold", now.kv_used_tokens),
        "kv_capacity_tokens": ("KV positions of all pages", now.kv_capacity_tokens),
        "kv_used_ratio": (_KV_USED, load.kv_used_ratio),
        "unloaded_step_seconds": ("Predicted time of a step of one row", load.unloaded_step),
        "start_gap_seconds": ("Time between two starts while requests wait", load.start_gap),
        "prediction_bias": ("Measured over predicted time of recent steps, less 1: mean", accuracy.bias),
        "prediction_mape": ("The same without its sign: mean", accuracy.mape),
        "prediction_coverage": ("Share of recent steps within their margin", accuracy.coverage),
    }


def _programs(programs: Programs) -> Metric:
    text = "Programs that were compiled, or cached: found compiled; at the start, and while it serves"
    family = CounterMetricFamily("taper_programs", text, labels=["when", "how"])
    family.add_metric(["start", "compiled"], programs.compiled)
    family.add_metric(["start", "cached"], programs.cached)
    family.add_metric(["serving", "compiled"], programs.late_compiled)
    family.add_metric(["serving", "cached"], programs.late_cached)
    return family


def _gauge(name: str, text: str, value: float, **labels: str) -> Metric:
    family = GaugeMetricFamily(name, text, labels=[*labels])
    family.add_metric([*labels.values()], value)
    return family
