"""What a request, and each of its stages, can ask for: every option once, under its name in the protos.

The clients, the builders of plans and the flags of `taper-client` all read these tables; a test holds that
they have every field that the wire has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack

from .arguments import MessageT, instance, known, merged, message
from .v1 import inference_service_pb2 as pb

OnMiss = Literal["best_effort", "reject"]
"""What becomes of a request whose targets cannot be met: `best_effort`, it is served as well as possible;
`reject`, it is refused in time to go elsewhere."""


class SamplingOptions(TypedDict, total=False):
    """How tokens are drawn. What a stage does not set, it has from its request; greedy if neither does."""

    temperature: float | None
    """0 is greedy, the default; higher is more varied."""
    top_p: float | None
    """Draw from the likeliest tokens that have this much probability together."""
    top_k: int | None
    """Draw from so many of the likeliest tokens; 0 is off."""
    min_p: float | None
    """Draw from the tokens that are at least this likely, relative to the likeliest."""
    repetition_penalty: float | None
    """More than 1 makes the tokens of the prompt and of the answer less likely; 1 is off."""
    presence_penalty: float | None
    """Taken from the logits of tokens that the answer has; 0 is off."""
    frequency_penalty: float | None
    """Taken from a token's logit for each time that the answer has it; 0 is off."""
    seed: int | None
    """Same seed, same answer; random unless set."""
    logit_bias: Mapping[int, float] | None
    """Token ids, each with what is added to its logit."""


class StoppingOptions(TypedDict, total=False):
    """When a sequence ends, beside where the model ends it."""

    max_tokens: int | None
    """Most new tokens of the sequence; the server's own limit unless set."""
    stop: str | Sequence[str] | None
    """Strings that end it."""
    stop_token_ids: Sequence[int] | None
    """Token ids that end it."""
    ignore_eos: bool | None
    """Go on where the model would end."""


class StageOptions(SamplingOptions, StoppingOptions, total=False):
    """What a stage or a branch can say for itself."""

    sampling: pb.SamplingParams | None
    """What `sampling(...)` returned, to be used many times; an option beside it replaces its field."""
    stopping: pb.StoppingCriteria | None
    """What `stopping(...)` returned, in the same way."""


class OutputOptions(TypedDict, total=False):
    """What comes back beside the text."""

    token_ids: bool | None
    """The ids of the answer's tokens."""
    logprobs: bool | None
    """The log-probability of each token."""
    top_logprobs: int | None
    """For each token, so many alternatives with their log-probabilities, too; needs `logprobs`."""
    prompt_token_ids: bool | None
    """The ids of the prompt's tokens."""
    keep_special_tokens: bool | None
    """Keep the model's own tokens, such as its tags, in the text."""
    include_stop: bool | None
    """Keep the stop string that ended a sequence in the text."""
    interval_ms: float | None
    """The least time between two messages of the stream, in milliseconds; one message a step unless given."""


class Options(StageOptions, OutputOptions, total=False):
    """What `generate` and `complete` take beside the prompt. `None` is the same as leaving an option out."""

    plan: Sequence[pb.Stage] | pb.ModelDriven | None
    """Stages, or `model_driven(...)`; without, one sequence. The options of a stage that are given beside a
    plan are for those of its stages that do not say otherwise."""
    n: int | None
    """So many answers to the prompt, each drawn for itself."""
    tpot_slo_ms: float | None
    """Target of the time between two tokens, in milliseconds; the server's own unless given."""
    ttft_slo_ms: float | None
    """Target of the time to the first token, in milliseconds; the server's own unless given."""
    on_miss: OnMiss | None
    """What becomes of the request when its targets cannot be met; the server's rule unless given."""
    request_id: str | None
    """Its id, up to 128 letters, digits, dots, dashes and underscores; the server makes one unless given."""
    model: str | None
    """Name of the model that the server must be serving."""
    cache_salt: str | None
    """Requests share cached prompts only with requests of the same salt."""
    priority: int | None
    """Under the policy taper:priority, the branches of a higher one join a step first; 0 unless given."""


ELSEWHERE = {
    "messages": "give the turns as the prompt, as in complete([{'role': 'user', 'content': 'Hello'}])",
    "max_completion_tokens": "did you mean max_tokens?",
    "max_new_tokens": "did you mean max_tokens?",
    "num_return_sequences": "did you mean n?",
    "stream": "generate(...) streams, complete(...) does not",
    "branches": "plan=[parallel([...])] asks for branches",
    "parallel": "plan=[parallel([...])] asks for branches",
    "serial": "plan=[serial(...)] asks for a stage",
    "stages": "did you mean plan?",
}


def sampling(**options: Unpack[SamplingOptions]) -> pb.SamplingParams:
    """How tokens are drawn, as a value that many requests and stages can have."""
    known(options, SamplingOptions.__annotations__, ELSEWHERE)
    return message(pb.SamplingParams, options)


def stopping(
    max_tokens: int | None = None,
    *,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    ignore_eos: bool | None = None,
) -> pb.StoppingCriteria:
    """When a sequence ends, as a value that many requests and stages can have."""
    options = StoppingOptions(
        max_tokens=max_tokens, stop=stop, stop_token_ids=stop_token_ids, ignore_eos=ignore_eos
    )
    return message(pb.StoppingCriteria, options)


def sampling_of(options: StageOptions) -> pb.SamplingParams | None:
    """What the options say of sampling, if anything."""
    said = _said(pb.SamplingParams, "sampling", {**options})
    return said if said.ListFields() else None


def stopping_of(options: StageOptions) -> pb.StoppingCriteria:
    """What the options say of where a sequence ends."""
    return _said(pb.StoppingCriteria, "stopping", {**options})


def _said(kind: type[MessageT], whole: str, options: Mapping[str, Any]) -> MessageT:
    """The options that are fields of `kind`, on top of those that came as one value."""
    own = message(kind, {field.name: options.get(field.name) for field in kind.DESCRIPTOR.fields})
    if options.get(whole) is None:
        return own
    return merged(instance(whole, options[whole], kind, f"{whole}(...)"), own)
