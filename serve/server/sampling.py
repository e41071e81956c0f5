"""Sampling options as they come over the wire: those that were set replace the ones they are based on."""

from __future__ import annotations

from dataclasses import replace

from scheduler.sampling import OPTIONS, Option, SamplingParams
from serve.api.protos.taper.v1 import inference_service_pb2 as pb
from serve.server.faults import SLACK, Faults


def read_sampling(
    faults: Faults, given: pb.SamplingParams, base: SamplingParams, path: str
) -> SamplingParams:
    """`base` with the fields that were set."""
    model = faults.model
    numbers = {option.name: _number(faults, option, given, base, path) for option in OPTIONS}
    if len(given.logit_bias) > model.max_logit_bias:
        most, count = model.max_logit_bias, len(given.logit_bias)
        faults.add(f"{path}.logit_bias", f"at most {most} are possible, got {count}")
    for token, bias in given.logit_bias.items():
        name = f"{path}.logit_bias[{token}]"
        if token >= model.vocab_size:
            faults.add(name, f"the id is not less than {model.vocab_size}, the vocabulary")
        if not -100 <= bias <= 100:
            faults.add(name, f"-100 to 100 are possible, got {bias:g}")
    return replace(
        base,
        **numbers,
        seed=given.seed if given.HasField("seed") else base.seed,
        logit_bias=tuple(sorted(given.logit_bias.items())) or base.logit_bias,
    )


def _number(
    faults: Faults, option: Option, given: pb.SamplingParams, base: SamplingParams, path: str
) -> int | float:
    """A number among the options, in its range and outside of the gap that it may have there."""
    name = option.name
    value = faults.number(given, name, path, getattr(base, name), option.low, option.high)
    if name == "temperature" and 0 < value < 0.01 - SLACK:
        faults.add(f"{path}.{name}", f"0 (greedy) or 0.01 to 100 are possible, got {value:g}")
    if name == "top_p" and value == 0:
        faults.add(f"{path}.{name}", "must be more than 0")
    if name == "top_k" and value >= faults.model.vocab_size:
        return 0  # all of it: off
    return value
