"""Messages become requests, or every violation at once, by path."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from scheduler.grammars import MULTIVERSE, TagGrammar
from scheduler.outline import Line
from scheduler.program import BranchSpec, ParallelStage, Plan, SerialStage, TagProgram, check_program
from scheduler.request import Slo
from scheduler.sampling import OPTIONS, Option
from scheduler.stopping import Stopping
from serve.reading.faults import MAX_VIOLATIONS, refuse_text
from serve.reading.programs import MAX_LABEL_BYTES, MAX_SEQUENCES
from serve.reading.requests import MAX_SALT_BYTES, MAX_TURNS, ROLES, read_prompt, read_request
from taper_client import branch, generate_request, model_driven, parallel, sampling, serial, stopping
from taper_client.errors import InvalidRequestError, Violation
from taper_client.v1 import inference_service_pb2 as pb
from taper_client.v1.control_service_pb2 import GetModelInfoResponse
from tests.serve.fakes import EOS, VOCAB, ByteTokenizer, served_model

PROTO = Path(__file__).parents[3] / "serve/client/protos/taper/v1/inference_service.proto"
NAN, INF = float("nan"), float("inf")


def read(message: pb.GenerateRequest, **model):
    request = read_request(message, served_model(**model))
    check_program(request.program)  # whatever passes here, the scheduler can run
    return request


def violations(message: pb.GenerateRequest, **model) -> dict[str, str]:
    with pytest.raises(InvalidRequestError) as caught:
        read_request(message, served_model(**model))
    return {violation.field: violation.description for violation in caught.value.violations}


# --- what passes -------------------------------------------------------------------------------------------


def test_a_plain_request_is_one_serial_stage():
    request = read(generate_request("ab", max_tokens=7, stop=["\n"]))
    assert request.prompt == (257, 97, 98)
    stop = Stopping(max_tokens=7, eos_ids=frozenset({EOS}), stop_strings=("\n",))
    assert request.program == Plan(stages=(SerialStage(stopping=stop),))


def test_nothing_but_a_prompt_is_needed():
    request = read(pb.GenerateRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[1, 2]))))
    assert re.fullmatch(r"[0-9a-f]{32}", request.id)
    assert request.prompt == (1, 2)
    assert request.slo == Slo()
    assert request.sampling.temperature == 0
    assert request.program == Plan(
        stages=(SerialStage(stopping=Stopping(max_tokens=256 - 56, eos_ids=frozenset({EOS}))),)
    ), "the default limit, as far as the context reaches"


def test_chats_go_through_the_models_template():
    request = read(generate_request([{"role": "user", "content": "hi"}]))
    assert bytes(request.prompt) == b"user: hi\n"


def test_plans_keep_their_shape():
    message = generate_request(
        "go",
        plan=[
            serial("intro:", max_tokens=5),
            parallel(
                [
                    "a",
                    branch("b", label="second", max_tokens=3, then=[parallel(["x", "y"], join="none")]),
                ],
                join="kv",
                first_k=1,
                max_tokens=4,
            ),
            serial([1, 2], stopping=stopping(6, stop_token_ids=[9], ignore_eos=True)),
        ],
    )

    def ends(tokens: int) -> Stopping:
        return Stopping(max_tokens=tokens, eos_ids=frozenset({EOS}))

    nested = ParallelStage(
        branches=(
            BranchSpec(prefix=(120,), stopping=ends(4)),
            BranchSpec(prefix=(121,), stopping=ends(4)),
        ),
        join="none",
    )
    assert read(message).program == Plan(
        stages=(
            SerialStage(prefix=tuple(b"intro:"), stopping=ends(5)),
            ParallelStage(
                branches=(
                    BranchSpec(prefix=(97,), stopping=ends(4)),
                    BranchSpec(prefix=(98,), label="second", stopping=ends(3), stages=(nested,)),
                ),
                join="kv",
                first_k=1,
            ),
            SerialStage(prefix=(1, 2), stopping=Stopping(max_tokens=6, stop_ids=frozenset({9}))),
        )
    )


@pytest.mark.parametrize("join", ["kv", "reprefill"])
def test_an_unspecified_join_is_the_models_own(join):
    stage = read(generate_request("go", plan=[parallel(["a"])]), join=join).program.stages[0]
    assert stage.join == join


def test_sampling_is_inherited_field_by_field():
    message = generate_request(
        "go",
        sampling=sampling(temperature=0.5, seed=2**64 - 1, top_k=5, logit_bias={3: -1.5}),
        plan=[
            serial(),
            parallel(
                [
                    branch(
                        sampling=sampling(temperature=1, top_p=0.5), then=[serial(sampling=sampling(top_k=0))]
                    )
                ]
            ),
        ],
    )
    request = read(message)
    plain, fork = request.program.stages
    assert plain.sampling is None
    assert (request.sampling.temperature, request.sampling.top_k) == (0.5, 5)
    assert request.sampling.seed == 2**64 - 1
    own, nested = fork.branches[0].sampling, fork.branches[0].stages[0].sampling
    assert (own.temperature, own.top_p, own.top_k) == (1, 0.5, 5)
    assert (nested.temperature, nested.top_p, nested.top_k) == (1, 0.5, 0)
    assert own.seed == nested.seed == request.sampling.seed
    assert own.logit_bias == ((3, -1.5),)


def test_without_a_seed_one_is_drawn_for_the_whole_request():
    message = generate_request("go", plan=[parallel([branch(sampling=sampling(temperature=1))])])
    first, second = read(message), read(message)
    assert first.sampling.seed != second.sampling.seed
    assert max(first.sampling.seed, second.sampling.seed) >= 2**32, "of 64 bits"
    assert first.program.stages[0].branches[0].sampling.seed == first.sampling.seed


def test_zero_is_not_unset():
    given = read(generate_request("go", sampling=sampling(temperature=0, seed=0, top_k=0))).sampling
    assert (given.temperature, given.seed, given.top_k) == (0, 0, 0)


def test_targets_are_milliseconds_outside_and_seconds_inside():
    request = read(generate_request("go", tpot_slo_ms=25), default_slo=Slo(tpot=1, ttft=2))
    assert request.slo == Slo(tpot=0.025, ttft=2)
    request = read(generate_request("go", ttft_slo_ms=25), default_slo=Slo(tpot=1, ttft=2))
    assert request.slo == Slo(tpot=1, ttft=0.025)


def test_a_target_under_the_floor_is_refused_with_the_number_that_would_do():
    with pytest.raises(InvalidRequestError) as caught:
        read(generate_request("go", tpot_slo_ms=12), min_tpot=0.0125)
    error = caught.value
    assert (error.reason, error.metadata) == ("SLO_BELOW_FLOOR", {"limit": "12.5", "got": "12"})
    assert [violation.field for violation in error.violations] == ["slo.tpot_ms"]
    with pytest.raises(InvalidRequestError, match=r"12\.5 ms"):
        read(generate_request("go", tpot_slo_ms=12, on_miss="reject"), min_tpot=0.0125)


@pytest.mark.parametrize("least", [12.3, 12.34, 12.37, 33.333333])
def test_the_floor_itself_is_no_fault_though_it_travels_as_a_float(least: float):
    published = GetModelInfoResponse(min_tpot_slo_ms=least).min_tpot_slo_ms
    request = read(generate_request("go", tpot_slo_ms=published), min_tpot=least / 1e3)
    assert request.slo.binding


def test_under_the_floor_best_effort_binds_nobody():
    request = read(generate_request("go", tpot_slo_ms=1, on_miss="best_effort"), min_tpot=0.0125)
    assert request.slo == Slo(tpot=0.001, ttft=5.0, binding=False)
    request = read(generate_request("go", tpot_slo_ms=20, on_miss="best_effort"), min_tpot=0.0125)
    assert request.slo.binding


def test_a_default_target_under_the_floor_is_the_servers_own_business():
    assert read(generate_request("go"), min_tpot=0.1, default_slo=Slo(tpot=0.05)).slo == Slo(tpot=0.05)


@pytest.mark.parametrize("late", [False, True])
def test_who_would_rather_be_refused_than_late_says_so_or_the_server_does(late: bool):
    default = Slo(reject=late)
    asked = {on_miss: generate_request("go", on_miss=on_miss) for on_miss in (None, "best_effort", "reject")}
    rejects = {on_miss: read(message, default_slo=default).slo.reject for on_miss, message in asked.items()}
    assert rejects == {None: late, "best_effort": False, "reject": True}


def test_logprobs_are_asked_of_every_stage():
    message = generate_request("go", logprobs=True, top_logprobs=2, plan=[serial(sampling=sampling(top_k=1))])
    request = read(message)
    for each in (request.sampling, request.program.stages[0].sampling):
        assert (each.logprobs, each.top_logprobs) == (True, 2)


def test_only_requests_of_one_salt_share_prompts():
    assert read(generate_request("go", cache_salt="mine")).cache_salt == "mine"
    assert read(generate_request("go")).cache_salt == ""


@pytest.mark.parametrize("kept", [False, True])
def test_stop_strings_are_looked_for_in_the_text_that_the_client_sees(kept):
    message = generate_request("go", keep_special_tokens=kept, plan=[parallel(["a"]), serial("b")])
    stages = read(message).program.stages
    assert [part.stopping.special_tokens for stage in stages for part in stage.parts] == [kept] * 2


def test_a_stop_string_that_is_a_special_token_ends_the_sequence_though_the_token_has_no_text():
    stopping = read(generate_request("go", stop=["<begin>", "."])).program.stages[0].stopping
    assert stopping.stop_ids == {257}
    assert stopping.stop_strings == ("<begin>", "."), "the model may write it letter by letter"
    message = generate_request("go", stop=["<begin>"], keep_special_tokens=True)
    assert read(message).program.stages[0].stopping.stop_ids == set(), "there it is text"


@pytest.mark.parametrize("priority", [-100, 0, 100])
def test_a_priority_is_kept(priority):
    assert read(generate_request("go", priority=priority)).priority == priority


class SilentTokenizer(ByteTokenizer):
    """Has no token for the characters of most texts."""

    def encode_continuation(self, text: str) -> list[int]:
        return [byte for byte in text.encode() if byte == ord("a")]


@pytest.mark.parametrize("join", ["kv", "reprefill"])
def test_only_a_kv_join_needs_a_join_tag_that_has_tokens(join: str):
    """Without a token there is nothing to go on from: the engine would have no row to sample from."""
    silent = {"tokenizer": SilentTokenizer()}
    tags = of_tags(join_open="zz", join=pb.Join.Value(f"JOIN_{join.upper()}"))
    if join == "reprefill":
        read(tags, **silent)
        return
    assert list(violations(tags, **silent)) == ["model_driven.fork_tags.join_open"]
    assert list(violations(of_driven(), **silent)) == ["model_driven.tag_set"], "named tags are no different"
    read(of_tags(join_open="a", join=pb.JOIN_KV), **silent)


@pytest.mark.parametrize("name", ["branch_open", "join_open"])
def test_forced_tags_have_tokens_of_the_models_vocabulary(name: str):
    assert f"model_driven.fork_tags.{name}" in violations(of_tags(**{name: "\u00ff"}), vocab_size=0xC0)


def test_a_model_driven_request_takes_the_models_own_tags():
    driven = model_driven(max_tokens=50, branch_max_tokens=20, max_branches=3, max_depth=2)
    message = generate_request("go", plan=driven)
    program = read(message, own_grammar="multiverse").program
    assert isinstance(program, TagProgram)
    assert program.grammar == MULTIVERSE
    assert (program.stopping.max_tokens, program.branch_max_tokens) == (50, 20)
    assert (program.max_branches, program.max_depth) == (3, 2)


TAGS = pb.ForkTags(
    plan_open="<plan>",
    label_open="* ",
    label_close=" *",
    plan_close="</plan>",
    branch_open="<b {label}>",
    branch_close="</b>",
    join_open="<all>",
    join=pb.JOIN_KV,
)


def test_a_client_can_bring_tags_of_its_own():
    grammar = read(generate_request("go", plan=model_driven(fork_tags=TAGS))).program.grammar
    assert grammar == TagGrammar(
        name="request",
        plan_open="<plan>",
        outline=Line(TAGS.label_open, TAGS.label_close),
        plan_close="</plan>",
        branch_open="<b {label}>",
        branch_close="</b>",
        join_open="<all>",
        join="kv",
    )


def test_what_opens_a_branch_can_name_its_label_a_few_times():
    assert read(of_tags(branch_open="{label}" * 4)).program.grammar.branch_open == "{label}" * 4


def test_top_k_of_the_whole_vocabulary_is_off():
    assert read(generate_request("go", sampling=sampling(top_k=VOCAB))).sampling.top_k == 0


def test_prompts_are_read_alone_for_tokenize():
    assert read_prompt(pb.Prompt(text="a"), served_model()) == [257, 97]
    with pytest.raises(InvalidRequestError, match="prompt: one of"):
        read_prompt(pb.Prompt(), served_model())


# --- what does not -----------------------------------------------------------------------------------------


def of(**fields) -> pb.GenerateRequest:
    """What a client that checks nothing might send."""
    return pb.GenerateRequest(**{"prompt": pb.Prompt(text="go"), **fields})


def of_sampling(**fields) -> pb.GenerateRequest:
    return of(sampling=pb.SamplingParams(**fields))


def of_plan(*stages: pb.Stage) -> pb.GenerateRequest:
    return of(plan=pb.Plan(stages=stages))


def of_race(first_k: int, *branches: pb.BranchSpec) -> pb.Stage:
    return pb.Stage(parallel=pb.ParallelStage(branches=branches, first_k=first_k))


def of_parallel(*branches: pb.BranchSpec) -> pb.GenerateRequest:
    return of_plan(pb.Stage(parallel=pb.ParallelStage(branches=branches)))


def of_serial(**fields) -> pb.Stage:
    return pb.Stage(serial=pb.SerialStage(stopping=pb.StoppingCriteria(**fields)))


def of_stopping(**fields) -> pb.GenerateRequest:
    return of_plan(of_serial(**fields))


def of_driven(**fields) -> pb.GenerateRequest:
    return of(model_driven=pb.ModelDriven(tag_set="multiverse", **fields))


def of_tags(**changes) -> pb.GenerateRequest:
    tags = pb.ForkTags()
    tags.CopyFrom(TAGS)
    for name, value in changes.items():
        setattr(tags, name, value)
    return generate_request("go", plan=model_driven(fork_tags=tags))


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


# --- the context -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "plan", "path"),
    [
        (200, None, "prompt"),
        (150, [serial([1] * 49), serial([1])], "plan.stages[1].serial.prefix"),
        (150, [parallel([branch([1] * 25), branch([1] * 25)], join="reprefill")], "plan.stages[0].parallel"),
        (
            150,
            [parallel([branch([1] * 25), branch([1] * 30), branch([1] * 25)], join="reprefill", first_k=2)],
            "plan.stages[0].parallel",
        ),
        (
            150,
            [parallel([branch([1] * 25), branch([1] * 50)], join="kv")],
            "plan.stages[0].parallel.branches[1].prefix",
        ),
    ],
)
def test_what_leaves_no_room_for_a_token_is_refused_with_limit_and_got(prompt, plan, path):
    message = generate_request([1] * prompt, plan=plan)
    with pytest.raises(InvalidRequestError) as caught:
        read_request(message, served_model())
    assert [violation.field for violation in caught.value.violations] == [path]
    assert caught.value.reason == "PROMPT_TOO_LONG"
    assert caught.value.metadata == {"limit": "199", "got": "200"}


@pytest.mark.parametrize(
    ("prompt", "plan"),
    [
        (199, None),
        (150, [serial([1] * 49)]),
        (150, [parallel([branch([1] * 24), branch([1] * 25)], join="reprefill")]),
        (149, [parallel([branch([1] * 49), branch([1] * 49)], join="kv"), serial([1])]),
        (
            150,
            [parallel([branch([1] * 25), branch([1] * 30), branch([1] * 24)], join="reprefill", first_k=2)],
        ),
        (149, [parallel([branch([1] * 49), branch([1] * 50)], join="kv", first_k=1), serial([1])]),
        (150, [parallel([branch([1] * 49), branch([1] * 49)], join="none")]),
    ],
)
def test_one_position_for_the_answer_is_room_enough(prompt, plan):
    read(generate_request([1] * prompt, plan=plan))


def test_a_large_limit_is_ended_by_the_context():
    request = read(generate_request("go", max_tokens=2**32 - 1))
    assert request.program.stages[0].stopping.max_tokens == 200


def test_ids_are_not_asked_of_whoever_has_sent_ids():
    with pytest.raises(InvalidRequestError, match="its ids have no text"):
        refuse_text(pb.DetokenizeRequest(token_ids=[1]), served_model(supports_text=False))


# --- bounds, at the limit and one over ---------------------------------------------------------------------


def turns(count: int) -> pb.GenerateRequest:
    return of(prompt=pb.Prompt(chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="a")] * count)))


def stages(count: int) -> pb.GenerateRequest:
    """So many serial stages and branches, none of whose lists is too long."""
    inner = [pb.Stage(serial=pb.SerialStage())] * 63
    whole, rest = divmod(count, 64)
    branches = [pb.BranchSpec(stages=inner)] * whole
    more = [pb.Stage(serial=pb.SerialStage())] * rest
    return of_plan(pb.Stage(parallel=pb.ParallelStage(branches=branches)), *more)


def prefixes(count: int) -> pb.GenerateRequest:
    """So many tokens in the prefixes of two branches."""
    half = pb.Prefix(token_ids=pb.TokenIds(ids=[1] * (count // 2)))
    other = pb.Prefix(token_ids=pb.TokenIds(ids=[1] * (count - count // 2)))
    fork = pb.ParallelStage(
        branches=[pb.BranchSpec(prefix=half), pb.BranchSpec(prefix=other)], join=pb.JOIN_NONE
    )
    return of_plan(pb.Stage(parallel=fork))


BOUNDS = {
    "turns": (turns, MAX_TURNS, "prompt.chat.messages", {"max_context": 10**6}),
    "label": (
        lambda size: of_plan(pb.Stage(parallel=pb.ParallelStage(branches=[pb.BranchSpec(label="x" * size)]))),
        MAX_LABEL_BYTES,
        "plan.stages[0].parallel.branches[0].label",
        {},
    ),
    "salt": (lambda size: of(cache_salt="x" * size), MAX_SALT_BYTES, "cache_salt", {}),
    "sequences": (stages, MAX_SEQUENCES, "plan.stages[0].parallel.branches[7].stages", {}),
    "prefixes": (prefixes, 200, "plan.stages[0].parallel.branches[1].prefix", {}),
    "prompt": (
        lambda count: of(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[1] * count))),
        199,
        "prompt",
        {},
    ),
}


@pytest.mark.parametrize("bound", BOUNDS)
def test_what_is_as_large_as_its_bound_is_taken_and_one_more_is_not(bound: str):
    make, most, field, model = BOUNDS[bound]
    read_request(make(most), served_model(**model))
    if bound == "sequences":
        most += 63  # the last list begins inside of the bound
    assert field in violations(make(most + 1), **model)


def test_of_many_violations_some_are_told_and_all_are_counted():
    message = of(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[999] * 150)))
    with pytest.raises(InvalidRequestError) as caught:
        read_request(message, served_model())
    assert len(caught.value.violations) == MAX_VIOLATIONS + 1
    assert caught.value.violations[-1] == Violation("", "and 130 more")
    message = of(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[999] * MAX_VIOLATIONS)))
    assert len(violations(message)) == MAX_VIOLATIONS


def test_unknown_fields_are_told_apart_as_long_as_they_are_few():
    few = pb.GenerateRequest.FromString(b"\xf8\x01\x01" * 1000 + of().SerializeToString())
    assert violations(few)["31"] == "this server does not know the field with this number"
    many = pb.GenerateRequest.FromString(b"\xf8\x01\x01" * 2000 + of().SerializeToString())
    assert violations(many) == {"": "this server does not know fields that make up 6000 bytes of the message"}


class Counting(ByteTokenizer):
    """Notes how much it was given."""

    def __init__(self) -> None:
        self.characters = 0

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        self.characters += len(text)
        return super().encode(text, add_special_tokens)


def test_no_long_text_is_tokenized_where_something_else_is_wrong():
    tokenizer = Counting()
    model = {"tokenizer": tokenizer, "max_context": 10**6}
    for length, read in ((20_000, 0), (100, 100)):
        tokenizer.characters = 0
        message = of(prompt=pb.Prompt(text="a" * length), priority=101)
        assert list(violations(message, **model)) == ["priority"]
        assert tokenizer.characters == read


def test_of_a_text_that_is_far_too_long_the_beginning_alone_is_tokenized():
    tokenizer = Counting()
    found = violations(of(prompt=pb.Prompt(text="a" * 100_000)), tokenizer=tokenizer)
    assert list(found) == ["prompt"]
    assert tokenizer.characters == 16 * 200
    tokenizer.characters = 0
    read_request(of(prompt=pb.Prompt(text="a" * 5000)), served_model(tokenizer=tokenizer, max_context=5002))
    assert tokenizer.characters == 5000


class OneToken(ByteTokenizer):
    """Texts are short, however long they are."""

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [1]


def test_a_long_text_of_few_tokens_is_taken():
    assert read(of(prompt=pb.Prompt(text="a" * 100_000)), tokenizer=OneToken()).prompt == (1,)
