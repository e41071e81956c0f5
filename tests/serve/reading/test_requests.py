"""Messages become requests: what is given as it is meant, and what is not as the model has it."""

from __future__ import annotations

import re

import pytest

from scheduler.grammars import MULTIVERSE, TagGrammar
from scheduler.outline import Line
from scheduler.program import BranchSpec, ParallelStage, Plan, SerialStage, TagProgram
from scheduler.request import Slo
from scheduler.stopping import Stopping
from serve.reading.requests import read_prompt
from taper_client import branch, generate_request, model_driven, parallel, sampling, serial, stopping
from taper_client.errors import InvalidRequestError
from taper_client.v1 import inference_service_pb2 as pb
from taper_client.v1.control_service_pb2 import GetModelInfoResponse
from tests.serve.fakes import EOS, VOCAB, ByteTokenizer, served_model
from tests.serve.reading.messages import TAGS, of_driven, of_tags, read, violations


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
