"""Sampling options as they come over the wire: those that were set replace the ones they are based on."""

from __future__ import annotations

from dataclasses import replace

from scheduler.sampling import OPTIONS, Option, SamplingParams, fault_of_bias, fault_of_option
from serve.reading.faults import Faults
from taper_client.v1 import inference_service_pb2 as pb


def read_sampling(
    faults: Faults, given: pb.SamplingParams, base: SamplingParams, path: str
) -> SamplingParams:
    """`base` with the fields that were set."""
    model = faults.model
    numbers = {option.name: _number(faults, option, given, base, path) for option in OPTIONS}
    if len(given.logit_bias) > model.max_logit_bias:
        most, count = model.max_logit_bias, len(given.logit_bias)
        faults.add(f"{path}.logit_bias", f"at most {most} are possible, got {count}")
        biases = {}
    else:
        biases = dict(given.logit_bias)
    for token, bias in biases.items():
        if fault := fault_of_bias(token, bias, model.vocab_size):
            faults.add(f"{path}.logit_bias[{token}]", fault)
    return replace(
        base,
        **numbers,
        seed=given.seed if given.HasField("seed") else base.seed,
        logit_bias=tuple(sorted(biases.items())) or base.logit_bias,
    )


def _number(
    faults: Faults, option: Option, given: pb.SamplingParams, base: SamplingParams, path: str
) -> int | float:
    """A number among the options, or that of `base` where it is not set or cannot be taken."""
    name = option.name
    if not given.HasField(name):
        return getattr(base, name)
    value = getattr(given, name)
    if fault := fault_of_option(option, value):
        faults.add(f"{path}.{name}", fault)
        return getattr(base, name)
    if name == "top_k" and value >= faults.model.vocab_size:
        return 0  # all of it: off
    return value
