"""The client: requests as their users write them, answers as they read them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest

from scheduler.request import Request
from serve.api.errors import (
    CancelledError,
    DeadlineExceededError,
    InvalidRequestError,
    UnavailableError,
)
from serve.api.protos.taper.v1 import inference_service_pb2 as pb
from serve.client import client as client_module
from serve.client.answer import (
    BranchFinished,
    Completion,
    Delta,
    Finished,
    Joined,
    Logprob,
    Started,
    WidthChanged,
)
from serve.client.client import (
    AsyncClient,
    Client,
    Options,
    branch,
    generate_request,
    model_driven,
    parallel,
    sampling,
    serial,
    stopping,
)
from tests.serve.fakes import FakeEngine, finished, fork_and_join, listening

PLAN = [
    serial(max_tokens=4),
    parallel([branch("Tea: ", label="tea"), branch("Coffee: ", then=[parallel([", or ", ", and "])])]),
    serial(" So: "),
]


@pytest.fixture(scope="module")
def engine() -> FakeEngine:
    return FakeEngine(fork_and_join)


@pytest.fixture(scope="module")
def address(engine: FakeEngine) -> Iterator[str]:
    with listening(engine) as address:
        yield address


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


# --- answers -----------------------------------------------------------------------------------------------


def check_answer(answer: Completion) -> None:
    assert answer.text == "Hi. Tea: goodCoffee: bad, or x, and y So: tea."
    assert answer.trunk.text == "Hi. tea."
    assert [(b.id, b.parent, b.label, b.prefix, b.text) for b in answer.branches] == [
        (1, 0, "tea", "Tea: ", "good"),
        (2, 0, "", "Coffee: ", "bad"),
        (3, 2, "", ", or ", "x"),
        (4, 2, "", ", and ", "y"),
    ]
    assert [b.finish_reason for b in answer.branches] == ["stop", "forked", "max_tokens", "eos"]
    assert [b.stop for b in answer.branches] == ["\n", None, None, 256]
    assert (answer.usage.completion_tokens, answer.usage.cached_tokens) == (17, 1)
    assert (answer.timing.ttft, answer.timing.tpot_slo_met, answer.timing.ttft_slo_met) == (0.5, True, False)
    assert answer.widths == [(2, 2)]


def test_an_answer_is_collected_with_its_branches(client):
    check_answer(client.complete("go", plan=PLAN))


def test_the_same_without_blocking(address):
    async def use() -> Completion:
        async with AsyncClient(address) as client:
            return await client.complete("go", plan=PLAN)

    check_answer(asyncio.run(use()))


def test_a_stream_tells_its_events_by_type(client):
    got = list(client.generate("go", plan=PLAN, request_id="mine"))
    assert got[0] == Started(request_id="mine", prompt_tokens=3, cached_tokens=2)
    assert isinstance(got[-1], Finished)
    assert WidthChanged(width=2, wanted=2) in got
    assert Joined(stage=1, branches=(1, 2)) in got
    assert BranchFinished(branch=1, reason="stop", stop="\n", completion_tokens=4) in got
    text = "".join(event.text for event in got if isinstance(event, Delta) and event.branch == 2)
    assert text == "bad"


def test_ids_and_logprobs_are_collected_when_asked_for(client):
    answer = client.complete("go", plan=PLAN, token_ids=True, logprobs=True, top_logprobs=1)
    assert bytes(answer.trunk.token_ids) == b"Hi. tea."
    assert answer.branches[0].logprobs[0] == Logprob(token=ord("g"), logprob=-0.5, top=((7, -1.0),))


def test_an_answer_that_is_not_whole_has_no_usage():
    with pytest.raises(ValueError, match="not complete"):
        Completion().usage  # noqa: B018


def test_leaving_a_stream_ends_its_request(client, engine):
    with client.generate("go", request_id="held-1") as stream:
        assert isinstance(next(iter(stream)), Started)
    engine.wait_for(lambda e: "held-1" in e.cancelled)


def test_breaking_out_of_a_stream_ends_its_request(client, engine):
    for _ in client.generate("go", request_id="held-2"):
        break
    engine.wait_for(lambda e: "held-2" in e.cancelled)


def test_breaking_out_without_blocking_ends_the_request_too(address, engine):
    async def use() -> None:
        async with AsyncClient(address) as client:
            async with client.generate("go", request_id="held-3") as stream:
                async for _ in stream:
                    break
            await asyncio.to_thread(engine.wait_for, lambda e: "held-3" in e.cancelled)

    asyncio.run(use())


def test_a_stream_can_be_cancelled(client):
    stream = client.generate("go", request_id="held-4")
    events = iter(stream)
    next(events)
    stream.cancel()
    with pytest.raises(CancelledError):
        list(events)


def test_who_only_waits_for_the_end_asks_for_few_messages(client, address, monkeypatch):
    intervals = []

    def recorded(prompt, **options):
        message = generate_request(prompt, **options)
        intervals.append(message.output.interval_ms)
        return message

    async def use() -> None:
        async with AsyncClient(address) as client:
            await client.complete("go")

    monkeypatch.setattr(client_module, "generate_request", recorded)
    client.complete("go")
    asyncio.run(use())
    client.complete("go", interval_ms=0.0)
    list(client.generate("go"))
    assert intervals == [200, 200, 0, 0]


# --- errors ------------------------------------------------------------------------------------------------


def test_what_is_wrong_comes_back_by_field(client):
    with pytest.raises(InvalidRequestError) as caught:
        client.complete("go", plan=[serial(max_tokens=0), parallel([])])
    assert [violation.field for violation in caught.value.violations] == [
        "plan.stages[0].serial.stopping.max_tokens",
        "plan.stages[1].parallel.branches",
    ]


def test_methods_that_answer_once_raise_the_same_errors(client):
    with pytest.raises(InvalidRequestError, match="policy"):
        client.set_policy("fast")


def test_a_server_that_is_not_there_is_unavailable():
    with Client("127.0.0.1:1") as client, pytest.raises(UnavailableError):
        client.complete("go")


def test_an_option_that_does_not_exist_is_refused():
    with pytest.raises(TypeError, match="no such option: temprature"):
        generate_request("go", temprature=1)  # pyright: ignore[reportCallIssue]


def test_the_other_methods_answer(client):
    assert client.tokenize("a") == [257, 97]
    assert client.detokenize([97]) == "a"
    assert client.abort("unknown") == ()
    assert client.model_info().model == "tiny"
    assert client.server_info().api_versions == ["taper.v1"]
    assert client.load().kv_capacity_tokens == 1000
    assert client.set_policy("taper") == "taper"


# --- requests ----------------------------------------------------------------------------------------------


def test_what_is_not_set_is_not_sent():
    message = generate_request("go")
    assert message == pb.GenerateRequest(
        prompt=pb.Prompt(text="go"), slo=pb.Slo(), output=pb.OutputOptions(), stopping=pb.StoppingCriteria()
    )
    assert not message.slo.HasField("tpot_ms")
    assert not sampling().HasField("temperature")
    assert sampling(temperature=0).HasField("temperature")


SAMPLING = {
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": 3,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.75,
    "frequency_penalty": -0.5,
    "seed": 9,
    "logit_bias": {5: 2.0},
}


def test_every_sampling_option_is_sent_under_its_own_name():
    assert sampling(**SAMPLING) == pb.SamplingParams(**SAMPLING)
    assert SAMPLING.keys() == {field.name for field in pb.SamplingParams.DESCRIPTOR.fields}


def test_every_option_of_a_request_is_sent_under_its_own_name():
    output = {
        "token_ids": True,
        "logprobs": True,
        "top_logprobs": 2,
        "include_stop": True,
        "keep_special_tokens": True,
        "interval_ms": 7.0,
    }
    message = generate_request(
        "go",
        max_tokens=3,
        stop=["."],
        sampling=sampling(**SAMPLING),
        tpot_slo_ms=20.0,
        ttft_slo_ms=300.0,
        request_id="mine",
        cache_salt="salt",
        priority=-4,
        **output,
    )
    assert message == pb.GenerateRequest(
        prompt=pb.Prompt(text="go"),
        stopping=pb.StoppingCriteria(max_tokens=3, stop=["."]),
        sampling=pb.SamplingParams(**SAMPLING),
        slo=pb.Slo(tpot_ms=20.0, ttft_ms=300.0),
        output=pb.OutputOptions(**output),
        request_id="mine",
        cache_salt="salt",
        priority=-4,
    )
    assert Options.__annotations__.keys() >= output.keys()


def test_a_stage_keeps_its_sampling_and_where_it_ends():
    drawn = sampling(**SAMPLING)
    ends = stopping(4, stop=["."], stop_token_ids=[6], ignore_eos=True)
    wanted = pb.StoppingCriteria(max_tokens=4, stop=["."], stop_token_ids=[6], ignore_eos=True)
    assert serial(stopping=ends, sampling=drawn).serial == pb.SerialStage(stopping=wanted, sampling=drawn)
    short = pb.StoppingCriteria(max_tokens=4, stop=["."])
    assert serial(max_tokens=4, stop=["."]).serial.stopping == short
    assert branch([5], stopping=ends, sampling=drawn, label="b", then=[serial("x")]) == pb.BranchSpec(
        label="b",
        prefix=pb.Prefix(token_ids=pb.TokenIds(ids=[5])),
        stopping=wanted,
        sampling=drawn,
        stages=[serial("x")],
    )
    assert branch("b", max_tokens=4, stop=["."]).stopping == short


def test_the_limits_of_a_model_driven_request_are_sent_under_their_own_names():
    driven = model_driven("t", max_tokens=1, branch_max_tokens=2, max_branches=3, max_depth=4)
    assert driven == pb.ModelDriven(
        tag_set="t",
        stopping=pb.StoppingCriteria(max_tokens=1),
        branch_max_tokens=2,
        max_branches=3,
        max_depth=4,
    )


def test_a_deadline_ends_a_call_that_has_no_answer():
    def answer_if_nobody_leaves(engine: FakeEngine, request: Request) -> None:
        with contextlib.suppress(AssertionError):
            engine.wait_for(lambda e: request.id in e.cancelled, timeout=5.0)
        engine.tell(request.id, finished(request.id))

    async def use() -> None:
        async with AsyncClient(address) as client:
            with pytest.raises(DeadlineExceededError):
                await client.complete("go", timeout=0.2)
            with pytest.raises(DeadlineExceededError):
                async for _ in client.generate("go", timeout=0.2):
                    pass

    with listening(FakeEngine(answer_if_nobody_leaves)) as address:
        with Client(address) as client:
            for call in (client.generate, client.complete):
                with pytest.raises(DeadlineExceededError):
                    list(call("go", timeout=0.2))
        asyncio.run(use())


def test_prompts_are_text_ids_or_chats():
    assert generate_request("go").prompt.text == "go"
    assert list(generate_request((1, 2)).prompt.token_ids.ids) == [1, 2]
    (turn,) = generate_request([{"role": "user", "content": "hi"}]).prompt.chat.messages
    assert (turn.role, turn.content) == ("user", "hi")


def test_a_parallel_stage_gives_its_limit_to_branches_without_one():
    given = branch("b", max_tokens=3)
    stage = parallel(["a", given], max_tokens=9, join="none").parallel
    assert [each.stopping.max_tokens for each in stage.branches] == [9, 3]
    assert stage.join == pb.JOIN_NONE
    assert [each.prefix.text for each in stage.branches] == ["a", "b"]


def test_a_parallel_stage_joins_all_of_its_branches_unless_it_is_told_how_many():
    assert parallel(["a", "b"]).parallel.first_k == 0
    assert parallel(["a", "b"], first_k=1).parallel.first_k == 1


def test_model_driven_programs_take_a_name_or_tags():
    assert generate_request("go", plan=model_driven("multiverse")).model_driven.tag_set == "multiverse"
    tags = pb.ForkTags(plan_open="<p>")
    assert generate_request("go", plan=model_driven(fork_tags=tags)).model_driven.fork_tags == tags
    assert generate_request("go", plan=model_driven()).model_driven.WhichOneof("tags") is None
