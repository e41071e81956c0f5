"""What the server counts, for Prometheus. A registry of its own: two servers in a process do not mix.

Steps are observed from the engine's thread, requests from the event loop's; load is read when scraped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge, disable_created_metrics
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from scheduler.events import Finished
from serve.door import Load, StepRecord
from serve.lateness import CAUSES, LATE, cause_of_lateness
from serve.server.load_metrics import LoadCollector, VllmCollector
from taper_client.errors import RETRY_AFTER

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_RATIOS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.4, 2, 4)
_WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)

disable_created_metrics()  # or each counter would be two series to Prometheus

_NO_REFUSAL = "ABORTED"  # of all reasons for which a request ends: it was its caller's wish


class Histogram:
    """Counts of what was observed up to each bound. It has one writer and no lock: dozens of observations are
    made in a step, and a scrape may miss the latest one."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name, self._text = name, text
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def describe(self) -> list[Metric]:
        return [HistogramMetricFamily(self._name, self._text)]

    def collect(self) -> list[Metric]:
        names = [*map(floatToGoString, self._bounds), "+Inf"]
        buckets = [*zip(names, accumulate(self._counts), strict=True)]
        return [HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)]


class Metrics:
    """Counters and histograms of one server; times in seconds."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"taper_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, bounds: Sequence[float]) -> Histogram:
            made = Histogram(f"taper_{name}", text, bounds)
            registry.register(made)
            return made

        self._requests = counter("requests", "Requests that ended, by gRPC status code", "code", "tenant")
        self._refusals = counter("refusals", "Requests that were refused, or given up, by reason", "reason")
        for reason in RETRY_AFTER:
            if reason != _NO_REFUSAL:
                self._refusals.labels(reason)  # from the start: what appears with a 1 is no increase
        self._tokens = counter(
            "tokens", "Tokens: prompt (read), cached (reused), completion (sampled)", "kind", "tenant"
        )
        self._preemptions = counter(
            "preemptions", "How often finished requests had lost their KV pages to older ones"
        )
        self._slo = counter("slo", "Finished requests by target and whether they met it", "target", "met")
        for target in ("ttft", "tpot"):
            for met in ("true", "false"):
                self._slo.labels(target, met)
        self._ttft = histogram("ttft_seconds", "Arrival to first token", _SECONDS)
        self._tpot = histogram("tpot_seconds", "Mean time between tokens of a request", _SECONDS)
        self._step = histogram("step_seconds", "Measured time of a step", _SECONDS)
        self._ratio = histogram("step_prediction_ratio", "Measured over predicted time of a step", _RATIOS)
        self._launch = histogram("step_launch_seconds", "Host time of launching a step", _SECONDS)
        self._idle = histogram(
            "step_idle_seconds", "Time that the device waited for a step's launch", (0.0, *_SECONDS)
        )
        self._late = counter("late_steps", f"Steps over {LATE} times their predicted time", "cause")
        for cause in CAUSES:
            self._late.labels(cause)  # from the start
        self._previous: StepRecord | None = None
        self._externality = histogram(
            "step_externality_seconds", "Predicted time that extra work adds to a step's baseline", _SECONDS
        )
        self._devices = Gauge(
            "taper_devices", "Devices that share the model, by their kind", ["kind"], registry=registry
        )
        self._model = Gauge("taper_model_info", "The model that is served", ["model_name"], registry=registry)
        self._targets = Gauge(
            "taper_tpot_slo_seconds", "TPOT target: the default, and the least", ["target"], registry=registry
        )
        self._width = histogram("width_branches", "Branches of a request that advance in a step", _WIDTHS)

    def observe_step(self, step: StepRecord) -> None:
        self._observe_lateness(step)
        self._step.observe(step.seconds)
        self._launch.observe(step.launched - step.launching)
        self._idle.observe(step.idle)
        if step.predicted > 0:
            self._ratio.observe(step.seconds / step.predicted)
        self._externality.observe(max(0.0, step.predicted - step.baseline))
        for width in step.widths:
            self._width.observe(width)

    def _observe_lateness(self, step: StepRecord) -> None:
        """Judge the step before it: only now all is known of that one."""
        before, self._previous = self._previous, step
        cause = before and cause_of_lateness(before, step)
        if cause:
            self._late.labels(cause).inc()

    def observe_finished(self, event: Finished, tenant: str = "") -> None:
        usage, timing = event.usage, event.timing
        read = usage.prompt_tokens - usage.cached_tokens
        for kind, count in (
            ("prompt", read),
            ("cached", usage.cached_tokens),
            ("completion", usage.completion_tokens),
        ):
            self._tokens.labels(kind, tenant).inc(count)
        self._preemptions.inc(usage.preemptions)
        self._ttft.observe(timing.ttft)
        self._tpot.observe(timing.tpot)
        self._slo.labels("tpot", str(timing.tpot_slo_met).lower()).inc()
        self._slo.labels("ttft", str(timing.ttft_slo_met).lower()).inc()

    def count_request(self, code: str, tenant: str = "", reason: str = "") -> None:
        """A request has ended, for one of the reasons of `taper_client.errors` if there was one."""
        self._requests.labels("INTERNAL", tenant)  # is there before there is a bug
        self._requests.labels(code, tenant).inc()
        if reason and reason != _NO_REFUSAL:
            self._refusals.labels(reason).inc()

    def describe_model(self, name: str) -> None:
        """Report which model is served."""
        self._model.labels(name).set(1)

    def describe_devices(self, kind: str, count: int) -> None:
        """Report that the model is divided over `count` devices of this kind."""
        self._devices.labels(kind).set(count)

    def describe_targets(self, default_tpot: float, min_tpot: float) -> None:
        """Report the TPOT target of a request that names none, and the least that one may name: seconds."""
        self._targets.labels("default").set(default_tpot)
        self._targets.labels("least").set(min_tpot)

    def watch_load(self, load: Callable[[], Load], model_name: str) -> None:
        """Report `load()` whenever the metrics are scraped."""
        self.registry.register(LoadCollector(load, model_name))

    def watch_load_as_vllm(self, load: Callable[[], Load], model_name: str, page_size: int) -> None:
        """Report it under vLLM's names; a page has `page_size` KV positions."""
        self.registry.register(VllmCollector(load, model_name, page_size))
