"""Events become messages: in order, whole text, one delta for each branch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from google.protobuf.json_format import MessageToDict

from scheduler.events import (
    BranchInfo,
    Finished,
    Joined,
    StageFinished,
    StageStarted,
    Started,
    Timing,
    TokenEmitted,
    Usage,
    WidthChanged,
)
from scheduler.program import BranchSpec, ParallelStage, Plan, SerialStage
from scheduler.request import Request
from scheduler.search import Match
from scheduler.step import Sample
from scheduler.stopping import FinishReason, Stopping
from serve.server.responses import ResponseWriter, stop_strings
from serve.text.reader import Speller
from taper_client.v1 import inference_service_pb2 as pb
from tests.families import family
from tests.serve.fakes import EOS, ByteTokenizer, finished

STOP = Stopping(max_tokens=9, stop_strings=("##",))


def writer(stopping: Stopping = STOP, **options) -> ResponseWriter:
    request = Request(id="r", prompt=(1, 2), program=Plan(stages=(SerialStage(stopping=stopping),)))
    return ResponseWriter(
        request, pb.OutputOptions(**options), Speller(ByteTokenizer.spelling, skip_special_tokens=True)
    )


def begins(*branches: int, stage: int = 0, prefix: bytes = b"") -> StageStarted:
    infos = tuple(BranchInfo(branch, 0, f"b{branch}" if branch else "", tuple(prefix)) for branch in branches)
    return StageStarted("r", stage, infos)


def tokens(branch: int, text: bytes, count: int) -> list[TokenEmitted]:
    return [
        TokenEmitted("r", branch, Sample(byte, -0.5, ((7, -1.0),)), count + i) for i, byte in enumerate(text)
    ]


def ends(branch: int, reason=FinishReason.MAX_TOKENS, *, stop=None, count=0, final=True) -> StageFinished:
    return StageFinished("r", 0, branch, reason, stop, count, final)


def told(message: pb.GenerateResponse) -> list[tuple[str, dict]]:
    events = [MessageToDict(event, preserving_proto_field_name=True) for event in message.events]
    return [(kind, fields) for event in events for kind, fields in event.items()]


def test_a_request_is_told_in_order():
    message = writer().write(
        [
            Started("r", 3, 2),
            begins(0, stage=0),
            *tokens(0, b"a", 1),
            ends(0, final=False),
            begins(1, 2, stage=1, prefix=b"- "),
            WidthChanged("r", 1, 2),
            *tokens(1, b"b", 1),
            ends(1, FinishReason.EOS, stop=EOS, count=1),
            ends(2, FinishReason.CONTEXT),
            Joined("r", 1, (1, 2)),
            begins(0, stage=2),
            ends(0, FinishReason.STOP, stop=Match("##", 0), count=1),
            finished("r", 2),
        ]
    )
    assert told(message) == [
        ("started", {"request_id": "r", "prompt_tokens": 3, "cached_tokens": 2}),
        ("stage_started", {"branches": [{}]}),
        ("delta", {"text": "a", "completion_tokens": 1}),
        (
            "stage_started",
            {
                "stage": 1,
                "branches": [
                    {"branch_id": 1, "label": "b1", "prefix": "- "},
                    {"branch_id": 2, "label": "b2", "prefix": "- "},
                ],
            },
        ),
        ("width_changed", {"width": 1, "wanted": 2}),
        ("delta", {"branch_id": 1, "text": "b", "completion_tokens": 1}),
        (
            "branch_finished",
            {
                "branch_id": 1,
                "finish_reason": "FINISH_REASON_EOS",
                "stop_token_id": EOS,
                "completion_tokens": 1,
            },
        ),
        ("branch_finished", {"branch_id": 2, "finish_reason": "FINISH_REASON_CONTEXT"}),
        ("joined", {"stage": 1, "branch_ids": [1, 2]}),
        ("stage_started", {"stage": 2, "branches": [{}]}),
        (
            "branch_finished",
            {"finish_reason": "FINISH_REASON_STOP", "stop_string": "##", "completion_tokens": 1},
        ),
        (
            "finished",
            {
                "usage": {
                    "prompt_tokens": 3,
                    "cached_tokens": 1,
                    "completion_tokens": 2,
                    "critical_path_tokens": 2,
                },
                "timing": {
                    "queue_time": "0.250s",
                    "time_to_first_token": "0.500s",
                    "time_per_output_token": "0.010s",
                    "total_time": "1.500s",
                    "tpot_slo_met": True,
                },
            },
        ),
    ]


def test_every_figure_of_the_end_has_a_field_of_its_own():
    usage = Usage(
        prompt_tokens=1, cached_tokens=2, completion_tokens=3, critical_path_tokens=4, preemptions=5
    )
    timing = Timing(queue=1.000000001, ttft=2.0, tpot=3.0, total=4.0, tpot_slo_met=False, ttft_slo_met=True)
    ((_, fields),) = told(writer().write([Finished("r", usage, timing)]))
    assert fields == {
        "usage": {
            "prompt_tokens": 1,
            "cached_tokens": 2,
            "completion_tokens": 3,
            "critical_path_tokens": 4,
            "preemptions": 5,
        },
        "timing": {
            "queue_time": "1.000000001s",
            "time_to_first_token": "2s",
            "time_per_output_token": "3s",
            "total_time": "4s",
            "ttft_slo_met": True,
        },
    }


def spoken(*events, prompt: str, name: str = "llama2") -> list[tuple[str, str]]:
    """What a model of a family says after a prompt, as (kind of event, its text)."""
    tokenizer = family(name)
    request = Request(
        id="r", prompt=(*tokenizer.encode(prompt),), program=Plan(stages=(SerialStage(stopping=STOP),))
    )
    stream = ResponseWriter(
        request, pb.OutputOptions(), Speller(tokenizer.spelling, skip_special_tokens=True)
    )
    texts = []
    for event in stream.write(events).events:
        if event.WhichOneof("kind") == "stage_started":
            texts += [("forced", branch.prefix) for branch in event.stage_started.branches]
        elif event.WhichOneof("kind") == "delta":
            texts.append(("said", event.delta.text))
    return texts


def stage(number: int, *infos: tuple[int, Sequence[int]]) -> StageStarted:
    return StageStarted("r", number, tuple(BranchInfo(branch, 0, "", (*ids,)) for branch, ids in infos))


def says(branch: int, ids: Sequence[int]) -> list[TokenEmitted]:
    return [TokenEmitted("r", branch, Sample(token), count) for count, token in enumerate(ids, 1)]


THE, CAT = (family("llama2").backend.token_to_id(word) for word in ("▁the", "▁cat"))


@pytest.mark.parametrize(
    ("prompt", "prefix", "texts"),
    [
        ("cat", [], [("forced", ""), ("said", " the cat")]),
        ("", [], [("forced", ""), ("said", "the cat")]),
        ("cat", [THE, CAT], [("forced", " the cat"), ("said", " the cat")]),
        ("", [THE], [("forced", "the"), ("said", " the cat")]),
    ],
)
def test_a_word_is_spelled_as_it_reads_after_what_stands_before_it(prompt, prefix, texts):
    assert spoken(stage(0, (0, prefix)), *says(0, [THE, CAT]), ends(0), prompt=prompt) == texts


CHARACTER = [3 + byte for byte in "🙂".encode()]  # ids of Llama 2's bytes


def test_a_character_that_a_stage_leaves_unfinished_is_completed_by_what_follows():
    """By the next stage, or by each branch."""
    begun = [stage(0, (0, [])), *says(0, CHARACTER[:2]), ends(0, final=False)]
    assert spoken(*begun, stage(1, (0, [])), *says(0, CHARACTER[2:]), ends(0), prompt="a")[2:] == [
        ("forced", ""),
        ("said", "🙂"),
    ]
    branches = [event for branch in (1, 2) for event in (*says(branch, CHARACTER[2:]), ends(branch))]
    after = (stage(2, (0, [])), *says(0, [CAT]))
    texts = spoken(*begun, stage(1, (1, []), (2, [])), *branches, *after, prompt="a")
    assert texts[2:4] == [("forced", ""), ("forced", "")]
    assert texts[4:] == [("said", "🙂"), ("said", "🙂"), ("forced", ""), ("said", " cat")]


def test_a_character_that_forced_text_interrupts_is_shown_as_unreadable_before_it():
    events = [stage(0, (0, [])), *says(0, [CAT, *CHARACTER[:2]]), ends(0, final=False)]
    said = spoken(*events, stage(1, (1, [THE]), (2, [])), *says(1, [CAT]), ends(1), ends(2), prompt="a")
    assert said == [
        ("forced", ""),
        ("said", " cat��"),
        ("forced", " the"),
        ("forced", ""),
        ("said", " cat"),
    ]


def test_an_unreadable_character_belongs_to_the_branch_and_the_count_of_its_stage():
    stream, half = writer(), "é".encode()[:1]
    stream.write([begins(0), *tokens(0, b"a", 1), ends(0, count=1, final=False), begins(1, 2, stage=1)])
    for stage, count in ((2, 1), (3, 2)):
        stream.write([*tokens(1, half, count), ends(1, count=count, final=False)])
        said, (_, begun) = told(stream.write([begins(1, stage=stage, prefix=b"x")]))
        assert said == ("delta", {"branch_id": 1, "text": "\ufffd", "completion_tokens": count})
        assert begun["branches"] == [{"branch_id": 1, "label": "b1", "prefix": "x"}]


def test_a_forced_character_that_the_prompt_began_is_completed():
    tokenizer = family("qwen")
    ids = tokenizer.encode("a🙂")
    request = Request(id="r", prompt=(*ids[:2],), program=Plan(stages=(SerialStage(stopping=STOP),)))
    stream = ResponseWriter(
        request, pb.OutputOptions(), Speller(tokenizer.spelling, skip_special_tokens=True)
    )
    assert stream.write([stage(0, (0, ids[2:]))]).events[0].stage_started.branches[0].prefix == "🙂"


def test_every_finish_reason_has_a_name_on_the_wire():
    for reason in FinishReason:
        (event,) = writer().write([begins(0), ends(0, reason)]).events[1:]
        name = pb.FinishReason.Name(event.branch_finished.finish_reason)
        assert name == f"FINISH_REASON_{reason.name}"


def test_a_branchs_tokens_are_one_delta_however_they_interleave():
    message = writer().write(
        [
            begins(1, 2),
            *(t for pair in zip(tokens(1, b"abc", 1), tokens(2, b"xyz", 1), strict=True) for t in pair),
        ]
    )
    assert told(message)[1:] == [
        ("delta", {"branch_id": 1, "text": "abc", "completion_tokens": 3}),
        ("delta", {"branch_id": 2, "text": "xyz", "completion_tokens": 3}),
    ]


def test_a_trunk_that_says_nothing_itself_ends_without_text():
    """The plan is one parallel stage, whose branches are not joined."""
    message = writer().write(
        [begins(1, 2), *tokens(1, b"a", 1), ends(1), ends(2), ends(0, FinishReason.FORKED)]
    )
    assert [kind for kind, _ in told(message)] == ["stage_started", "delta", *["branch_finished"] * 3]


def test_a_delta_never_crosses_from_one_stage_into_the_next():
    message = writer().write(
        [begins(0), *tokens(0, b"a", 1), ends(0, final=False), begins(0, stage=1), *tokens(0, b"b", 2)]
    )
    assert [kind for kind, _ in told(message)] == ["stage_started", "delta", "stage_started", "delta"]


def test_ids_and_logprobs_come_when_asked_for():
    message = writer(token_ids=True, logprobs=True).write([begins(0), *tokens(0, b"a", 1)])
    _, (_, delta) = told(message)
    assert delta == {
        "text": "a",
        "token_ids": [97],
        "logprobs": [{"token_id": 97, "logprob": -0.5, "top": [{"token_id": 7, "logprob": -1.0}]}],
        "completion_tokens": 1,
    }


def test_the_prompt_is_echoed_when_asked_for():
    (event,) = writer(prompt_token_ids=True).write([Started("r", 2, 0)]).events
    assert list(event.started.prompt_token_ids) == [1, 2]


def test_held_text_comes_before_the_branch_finishes():
    stream = writer()
    first = stream.write([begins(0), *tokens(0, b"a#", 1)])
    last = stream.write([ends(0, count=2)])
    assert told(first)[1] == ("delta", {"text": "a", "completion_tokens": 2})
    assert [kind for kind, _ in told(last)] == ["delta", "branch_finished"]
    assert last.events[0].delta.text == "#"


def test_a_stop_token_may_be_the_first_of_the_vocabulary():
    message = writer().write([begins(0), *tokens(0, b"a", 1), ends(0, FinishReason.STOP, stop=0, count=1)])
    finished = message.events[-1].branch_finished
    assert (finished.WhichOneof("matched_stop"), finished.stop_token_id) == ("stop_token_id", 0)


def test_a_stop_string_is_cut_or_kept():
    for include, expected in ((False, "a"), (True, "a##")):
        stream = writer(include_stop=include)
        events = [begins(0), *tokens(0, b"a##", 1), ends(0, FinishReason.STOP, stop=Match("##", 2), count=3)]
        assert "".join(event.delta.text for event in stream.write(events).events) == expected


def test_a_branch_of_a_race_finishes_when_it_is_decided_and_its_text_when_it_stops():
    match = Match("##", 2)
    stream = writer()
    stopped = stream.write(
        [
            begins(1, 2),
            *tokens(1, b"a##", 1),
            ends(1, FinishReason.STOP, stop=match, count=3, final=False),
            *tokens(2, "bé".encode()[:2], 1),
            ends(2, count=2, final=False),
        ]
    )
    assert [fields.get("text") for kind, fields in told(stopped) if kind == "delta"] == ["a", "b"]
    decided = stream.write(
        [ends(2, FinishReason.OUTRUN, count=2), ends(1, FinishReason.STOP, stop=match, count=3)]
    )
    assert told(decided) == [
        ("delta", {"branch_id": 2, "text": "\ufffd", "completion_tokens": 2}),
        (
            "branch_finished",
            {"branch_id": 2, "finish_reason": "FINISH_REASON_OUTRUN", "completion_tokens": 2},
        ),
        (
            "branch_finished",
            {
                "branch_id": 1,
                "finish_reason": "FINISH_REASON_STOP",
                "stop_string": "##",
                "completion_tokens": 3,
            },
        ),
    ]


@pytest.mark.parametrize(("include", "expected"), [(False, "na"), (True, "naï")])
def test_a_stop_string_inside_a_token_is_cut_by_characters(include, expected):
    """A token that ends the character also brings what follows it."""
    tokenizer, stop = family("qwen"), Stopping(max_tokens=9, stop_strings=("ï",))
    ids = [tokenizer.backend.token_to_id(piece) for piece in ("naÃ", "¯ve")]
    request = Request(id="r", prompt=(1,), program=Plan(stages=(SerialStage(stopping=stop),)))
    speller = Speller(tokenizer.spelling, skip_special_tokens=True)
    stream = ResponseWriter(request, pb.OutputOptions(include_stop=include), speller)
    message = stream.write([stage(0, (0, [])), *says(0, ids), ends(0, stop=Match("ï", 3), count=2)])
    assert "".join(event.delta.text for event in message.events) == expected


def test_a_certain_token_has_the_logarithm_of_one():
    message = writer(logprobs=True).write([begins(0), TokenEmitted("r", 0, Sample(97, 0.0), 1)])
    assert message.events[1].delta.logprobs[0].logprob == 0.0


def test_what_has_ended_is_forgotten():
    stream = writer()
    stream.write([begins(0), ends(0, final=False), begins(1, 2, stage=1), ends(1), ends(2), ends(0)])
    assert (stream._texts, stream._counts) == ({}, {})


def test_a_token_without_text_yet_is_counted():
    message = writer().write([begins(0), *tokens(0, "é".encode()[:1], 1)])
    assert told(message)[1] == ("delta", {"completion_tokens": 1})


def test_stop_strings_are_those_of_all_stages():
    def stop(text: str) -> Stopping:
        return Stopping(max_tokens=1, stop_strings=(text, "common"))

    nested = BranchSpec(stopping=stop("b"), stages=(SerialStage(stopping=stop("c")),))
    plan = Plan(stages=(SerialStage(stopping=stop("a")), ParallelStage(branches=(nested,))))
    request = Request(id="r", prompt=(1,), program=plan)
    assert stop_strings(request) == ("a", "common", "b", "c")
