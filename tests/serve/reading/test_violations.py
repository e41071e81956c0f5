"""Every violation of a message is named at once, by its path; what just fits has none."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from scheduler.sampling import OPTIONS, Option
from serve.reading.requests import ROLES, read_prompt
from taper_client import branch, generate_request, model_driven, parallel, sampling, serial
from taper_client.errors import InvalidRequestError
from taper_client.v1 import inference_service_pb2 as pb
from tests.serve.fakes import VOCAB, ByteTokenizer, served_model
from tests.serve.reading.messages import (
    of,
    of_driven,
    of_parallel,
    of_plan,
    of_race,
    of_sampling,
    of_serial,
    of_stopping,
    of_tags,
    read,
    violations,
)

PROTO = Path(__file__).parents[3] / "serve/client/protos/taper/v1/inference_service.proto"
NAN, INF = float("nan"), float("inf")

STOPPING = "plan.stages[0].serial.stopping"
BRANCHES = "plan.stages[0].parallel.branches"
WRONG = [
    (pb.GenerateRequest(), "prompt"),
    (generate_request(""), None),  # its special token is a token
    (of(prompt=pb.Prompt(token_ids=pb.TokenIds())), "prompt"),
    (generate_request([1, VOCAB]), "prompt.token_ids.ids[1]"),
    (generate_request([{"role": "robot", "content": "hi"}]), "prompt.chat.messages[0].role"),
    (generate_request([{"role": "assistant", "content": "hi"}]), "prompt.chat.messages"),
    (pb.GenerateRequest(prompt=pb.Prompt(chat=pb.Chat())), "prompt.chat.messages"),
    (generate_request("go", request_id="no spaces"), "request_id"),
    (generate_request("go", request_id="x" * 129), "request_id"),
    (pb.GenerateRequest(prompt=pb.Prompt(text="go"), model="other"), "model"),
    *((of_sampling(temperature=value), "sampling.temperature") for value in (-1, 0.001, 101, NAN, INF, -INF)),
    *((of_sampling(top_p=value), "sampling.top_p") for value in (0, -0.1, 1.1, NAN)),
    *((of_sampling(min_p=value), "sampling.min_p") for value in (-0.1, 1.1, NAN)),
    *((of_sampling(repetition_penalty=value), "sampling.repetition_penalty") for value in (0, -1, INF)),
    *((of_sampling(presence_penalty=value), "sampling.presence_penalty") for value in (-2.1, 2.1, NAN)),
    *((of_sampling(frequency_penalty=value), "sampling.frequency_penalty") for value in (-2.1, 2.1, NAN)),
    (of_sampling(logit_bias={VOCAB: 1.0}), f"sampling.logit_bias[{VOCAB}]"),
    *((of_sampling(logit_bias={5: value}), "sampling.logit_bias[5]") for value in (101, -101, NAN, INF)),
    (of_sampling(logit_bias=dict.fromkeys(range(65), 1.0)), "sampling.logit_bias"),
    (of_stopping(max_tokens=0), f"{STOPPING}.max_tokens"),
    (of_stopping(stop=["a", ""]), f"{STOPPING}.stop[1]"),
    (of_stopping(stop=["é" * 129]), f"{STOPPING}.stop[0]"),
    (of_stopping(stop=["a"] * 17), f"{STOPPING}.stop"),
    (of_stopping(stop=["a", "x<end>"]), f"{STOPPING}.stop[1]"),
    (of_stopping(stop_token_ids=[1, VOCAB]), f"{STOPPING}.stop_token_ids[1]"),
    *((of(slo=pb.Slo(tpot_ms=value)), "slo.tpot_ms") for value in (0, -1, NAN, INF)),
    *((of(slo=pb.Slo(ttft_ms=value)), "slo.ttft_ms") for value in (0, -1, NAN, INF)),
    (of(slo=pb.Slo(on_miss=7)), "slo.on_miss"),  # type: ignore[arg-type]
    (generate_request("go", logprobs=True, top_logprobs=9), "output.top_logprobs"),
    (generate_request("go", top_logprobs=1), "output.top_logprobs"),
    *(
        (of(output=pb.OutputOptions(interval_ms=value)), "output.interval_ms")
        for value in (-1, 60_001, NAN, INF, -INF)
    ),
    *((generate_request("go", interval_ms=value), None) for value in (0, 0.1, 60_000)),
    *((generate_request("go", priority=value), "priority") for value in (-101, 101, 2**31 - 1)),
    (of_plan(), "plan.stages"),
    (of_plan(pb.Stage()), "plan.stages[0]"),
    (generate_request("go", plan=[serial()] * 65), "plan.stages"),
    (of_parallel(), BRANCHES),
    (generate_request("go", plan=[parallel([""] * 65)]), BRANCHES),
    (generate_request("go", plan=[serial([VOCAB])]), "plan.stages[0].serial.prefix.token_ids.ids[0]"),
    (
        generate_request("go", plan=[parallel([branch(label="a"), branch(), branch(), branch(label="a")])]),
        f"{BRANCHES}[3].label",
    ),
    (
        of_parallel(branch("a"), pb.BranchSpec(stopping=pb.StoppingCriteria(max_tokens=0))),
        f"{BRANCHES}[1].stopping.max_tokens",
    ),
    (
        generate_request("go", plan=[parallel([branch(sampling=sampling(top_p=0))])]),
        f"{BRANCHES}[0].sampling.top_p",
    ),
    (
        of_parallel(branch(then=[of_serial(max_tokens=0)])),
        f"{BRANCHES}[0].stages[0].serial.stopping.max_tokens",
    ),
    (generate_request("go", plan=[parallel(["a"], join="kv"), serial()]), "plan.stages[1]"),
    (generate_request("go", plan=[parallel(["a"], join="none"), serial()]), "plan.stages[1]"),
    (
        generate_request("go", plan=[pb.Stage(parallel=pb.ParallelStage(branches=[branch()], join=9))]),
        "plan.stages[0].parallel.join",
    ),
    (of_plan(of_race(3, branch("a"), branch("b"))), "plan.stages[0].parallel.first_k"),
    (of_plan(of_race(2**32 - 1, branch("a"))), "plan.stages[0].parallel.first_k"),
    *((generate_request("go", plan=[parallel(["a", "b"], first_k=k)]), None) for k in (0, 1, 2)),
    (
        of_parallel(branch(then=[of_race(2, branch("a"))])),
        f"{BRANCHES}[0].stages[0].parallel.first_k",
    ),
    (generate_request("go", plan=model_driven("unheard-of")), "model_driven.tag_set"),
    (generate_request("go", plan=model_driven()), "model_driven.tag_set"),
    (of_driven(max_branches=0), "model_driven.max_branches"),
    (generate_request("go", plan=model_driven("multiverse", max_branches=65)), "model_driven.max_branches"),
    (generate_request("go", plan=model_driven("multiverse", max_depth=5)), "model_driven.max_depth"),
    (
        of_driven(stopping=pb.StoppingCriteria(max_tokens=0)),
        "model_driven.stopping.max_tokens",
    ),
    (
        of_driven(branch_max_tokens=0),
        "model_driven.branch_max_tokens",
    ),
    (of_tags(plan_open=""), "model_driven.fork_tags.plan_open"),
    (of_tags(join_open=""), "model_driven.fork_tags.join_open"),
    (of_tags(join=pb.JOIN_NONE), "model_driven.fork_tags.join"),
    (of_tags(branch_close="x" * 257), "model_driven.fork_tags.branch_close"),
    (of_tags(branch_open="{label}" * 5), "model_driven.fork_tags.branch_open"),
    (of_tags(branch_close="é" * 129), "model_driven.fork_tags.branch_close"),
    *((of_tags(**{name: ""}), f"model_driven.fork_tags.{name}") for name in ("label_open", "label_close")),
    *((of_tags(**{name: ""}), f"model_driven.fork_tags.{name}") for name in ("plan_close", "branch_open")),
    (of_tags(branch_close=""), "model_driven.fork_tags.branch_close"),
    (of_stopping(stop_token_ids=[1] * 17), f"{STOPPING}.stop_token_ids"),
    (of_driven(max_depth=0), "model_driven.max_depth"),
    (generate_request("go", plan=[parallel([""] * 40, join="none"), serial()]), "plan.stages[1]"),
    (
        generate_request("go", plan=[parallel(["a"], join="kv"), parallel(["a", ""])]),
        "plan.stages[1].parallel",
    ),
]
JUST_RIGHT = [
    generate_request("go", request_id="x" * 128),
    generate_request("go", request_id="A-z_0.9"),
    generate_request([VOCAB - 1]),
    generate_request("go", tpot_slo_ms=0.001, ttft_slo_ms=1e9),
    generate_request("go", logprobs=True, top_logprobs=8),
    of_sampling(temperature=0.01),
    of_sampling(top_p=0.001),
    of_sampling(logit_bias={0: -100.0, VOCAB - 1: 100.0}),
    of_sampling(logit_bias=dict.fromkeys(range(64), 1.0)),
    *(of_sampling(**{option.name: option.low}) for option in OPTIONS if option.name != "top_p"),
    *(of_sampling(**{option.name: option.high}) for option in OPTIONS if option.name != "top_k"),
    of_stopping(max_tokens=1),
    of_stopping(stop=["é" * 128, "x" * 256, "y"]),
    of_stopping(stop=["a"] * 16, stop_token_ids=[VOCAB - 1] * 16),
    of_tags(branch_close="x" * 256),
    of_tags(join=pb.JOIN_REPREFILL, join_open=""),
    generate_request("go", plan=[serial()] * 64),
    generate_request("go", plan=[parallel([""] * 40), parallel([""] * 24)]),
    generate_request("go", plan=[parallel([branch(label="a"), branch(label="b")])] * 2),
    generate_request("go", plan=[parallel([branch(label="a", then=[parallel([branch(label="a")])])])]),
    *(generate_request("go", plan=model_driven("multiverse", max_branches=count)) for count in (1, 64)),
    *(generate_request("go", plan=model_driven("multiverse", max_depth=depth)) for depth in (1, 4)),
    *(
        generate_request([{"role": role, "content": "hi"}, {"role": "user", "content": "hi"}])
        for role in ROLES
    ),
]


@pytest.mark.parametrize("message", JUST_RIGHT, ids=range(len(JUST_RIGHT)))
def test_what_just_fits_passes(message):
    read(message)


@pytest.mark.parametrize(("message", "path"), WRONG, ids=[f"{i}-{path}" for i, (_, path) in enumerate(WRONG)])
def test_what_is_wrong_is_named_by_its_path(message, path):
    if path is None:
        read(message)
    else:
        assert list(violations(message)) == [path]


def test_the_wire_has_every_sampling_option_and_its_range_is_checked():
    numbers = {option.name for option in OPTIONS}
    wire = {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}
    assert wire == numbers | {"seed", "logit_bias"}
    for option in OPTIONS:
        if math.isfinite(option.high):
            assert list(violations(of_sampling(**{option.name: option.high + 1}))) == [
                f"sampling.{option.name}"
            ]
            request = read(of_sampling(**{option.name: option.high}))
            assert getattr(request.sampling, option.name) == option.high


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_the_proto_says_what_range_an_option_has(option: Option):
    proto = PROTO.read_text()
    [comment] = re.findall(rf"// (.*)\n  optional \w+ {option.name} =", proto)
    said = {float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", comment)}
    assert {option.off, option.low} <= said
    assert option.high in said or option.high == INF


def test_everything_wrong_is_named_at_once():
    none = pb.StoppingCriteria(max_tokens=0)
    message = of(
        prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[VOCAB])),
        request_id="?",
        sampling=pb.SamplingParams(temperature=NAN, top_p=2),
        plan=pb.Plan(stages=[of_serial(max_tokens=0), of_race(2, pb.BranchSpec(stopping=none))]),
    )
    assert set(violations(message)) == {
        "prompt.token_ids.ids[0]",
        "request_id",
        "sampling.temperature",
        "sampling.top_p",
        "plan.stages[0].serial.stopping.max_tokens",
        "plan.stages[1].parallel.branches[0].stopping.max_tokens",
        "plan.stages[1].parallel.first_k",
    }


def test_fields_of_a_newer_schema_are_refused_by_number():
    newer = bytes([0x98, 0x06, 1])  # field 99, a varint
    message = generate_request("go", plan=[serial("a"), serial("b")])
    message.plan.stages[1].serial.MergeFromString(newer)
    message.MergeFromString(newer)
    assert list(violations(message)) == ["99", "plan.stages[1].serial.99"]


def test_forks_can_be_nested_only_so_deep():
    plan = [parallel(["a"])]
    for _ in range(3):
        plan = [parallel([branch(then=plan)])]
    read(generate_request("go", plan=plan))
    for _ in range(20):
        plan = [parallel([branch(then=plan)])]
    (path,) = violations(generate_request("go", plan=plan))
    assert path == "plan.stages[0]" + ".parallel.branches[0].stages[0]" * 4 + ".parallel"


def test_branches_are_counted_over_the_whole_request():
    plan = [parallel([""] * 40), parallel([""] * 25)]
    assert list(violations(generate_request("go", plan=plan))) == ["plan.stages[1].parallel.branches"]
    nested = [parallel([branch(then=[parallel([""] * 63)]), ""])]
    assert list(violations(generate_request("go", plan=nested))) == [
        "plan.stages[0].parallel.branches[0].stages[0].parallel.branches"
    ]


def test_a_prefix_that_is_there_says_what_it_is():
    nothing = {"prefix": pb.Prefix()}
    plan = of_plan(pb.Stage(serial=pb.SerialStage(**nothing)))
    assert violations(plan) == {"plan.stages[0].serial.prefix": "one of text and token_ids is needed"}
    plan = of_plan(pb.Stage(parallel=pb.ParallelStage(branches=[pb.BranchSpec(**nothing)])))
    assert list(violations(plan)) == ["plan.stages[0].parallel.branches[0].prefix"]
    read(of_plan(pb.Stage(serial=pb.SerialStage(prefix=pb.Prefix(text="")))))


def test_chat_is_refused_where_the_model_has_no_template():
    class Plain(ByteTokenizer):
        supports_chat = False

    message = generate_request([{"role": "user", "content": "hi"}])
    assert list(violations(message, tokenizer=Plain())) == ["prompt.chat"]


def test_texts_are_refused_where_the_model_has_no_tokenizer():
    """Each field that needs one is named; what needs none is served."""
    stop = {"stop": ["x"], "max_tokens": 3}
    plan = [serial("a", **stop), parallel([branch("b"), branch([1], **stop)])]
    assert list(violations(generate_request("go", plan=plan), supports_text=False)) == [
        "prompt.text",
        "plan.stages[0].serial.prefix.text",
        "plan.stages[0].serial.stopping.stop",
        "plan.stages[1].parallel.branches[0].prefix.text",
        "plan.stages[1].parallel.branches[1].stopping.stop",
    ]
    chat = generate_request([{"role": "user", "content": "hi"}], plan=model_driven())
    assert list(violations(chat, supports_text=False)) == ["prompt.chat", "model_driven"]
    with pytest.raises(InvalidRequestError, match=r"prompt\.text: this model has no tokenizer"):
        read_prompt(pb.Prompt(text="a"), served_model(supports_text=False))
    assert read(generate_request([1, 2], max_tokens=3), supports_text=False).prompt == (1, 2)


def test_texts_whose_tokens_the_model_does_not_have_are_refused():
    """A gather would silently read another row."""
    plan = [serial("\xff")]
    message = generate_request("\xff", plan=plan)
    assert violations(message, vocab_size=128) == {
        "prompt.text": "its token 257 is not less than 128, the vocabulary of the model",
        "plan.stages[0].serial.prefix.text": (
            "its token 195 is not less than 128, the vocabulary of the model"
        ),
    }
    chat = generate_request([{"role": "user", "content": "\xff"}])
    assert list(violations(chat, vocab_size=128)) == ["prompt.chat.messages"]
