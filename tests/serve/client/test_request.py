"""Requests as their users write them."""

from __future__ import annotations

from taper_client import branch, generate_request, model_driven, parallel, sampling, serial, stopping
from taper_client.v1 import inference_service_pb2 as pb
from tests.serve.client.options import SAMPLING, STOPPING


def test_what_is_not_set_is_not_sent():
    message = generate_request("go")
    assert message == pb.GenerateRequest(
        prompt=pb.Prompt(text="go"), slo=pb.Slo(), output=pb.OutputOptions(), stopping=pb.StoppingCriteria()
    )
    assert not message.slo.HasField("tpot_ms")


def test_every_option_of_a_request_is_sent_under_its_own_name():
    output = {
        "token_ids": True,
        "logprobs": True,
        "top_logprobs": 2,
        "prompt_token_ids": True,
        "keep_special_tokens": True,
        "include_stop": True,
        "interval_ms": 7.0,
    }
    own = {"request_id": "mine", "model": "tiny", "cache_salt": "salt", "priority": -4}
    wanted = pb.GenerateRequest(
        prompt=pb.Prompt(text="go"),
        stopping=pb.StoppingCriteria(**STOPPING),
        sampling=pb.SamplingParams(**SAMPLING),
        slo=pb.Slo(tpot_ms=20.0, ttft_ms=300.0),
        output=pb.OutputOptions(**output),
        **own,
    )
    common = {"tpot_slo_ms": 20.0, "ttft_slo_ms": 300.0, **output, **own}
    assert generate_request("go", **SAMPLING, **STOPPING, **common) == wanted
    values = {"sampling": sampling(**SAMPLING), "stopping": stopping(**STOPPING)}
    assert generate_request("go", **values, **common) == wanted


def test_prompts_are_text_ids_or_chats():
    assert generate_request("go").prompt.text == "go"
    assert generate_request("").prompt.WhichOneof("kind") == "text"
    assert list(generate_request((1, 2)).prompt.token_ids.ids) == [1, 2]
    assert list(generate_request(range(3)).prompt.token_ids.ids) == [0, 1, 2]
    (turn,) = generate_request([{"role": "user", "content": "hi"}]).prompt.chat.messages
    assert (turn.role, turn.content) == ("user", "hi")


PLAN = [
    serial("a", max_tokens=3),
    parallel([branch("b", stop=["!"], then=[serial("c")]), "d"]),
]


def test_options_beside_a_plan_are_for_stages_that_do_not_say_otherwise():
    message = generate_request("go", plan=PLAN, max_tokens=9, stop="\n", temperature=0.5)
    first, fork = message.plan.stages
    one, two = fork.parallel.branches
    base = pb.StoppingCriteria(max_tokens=9, stop=["\n"])
    assert first.serial.stopping == pb.StoppingCriteria(max_tokens=3, stop=["\n"])
    assert one.stopping == pb.StoppingCriteria(max_tokens=9, stop=["!"])
    assert one.stages[0].serial.stopping == two.stopping == base
    assert message.sampling == pb.SamplingParams(temperature=0.5), "which the server passes on to all stages"
    assert not first.serial.HasField("sampling")
    assert not PLAN[1].parallel.branches[1].stopping.HasField("max_tokens"), "the plan can be used again"


def test_options_beside_a_parallel_stage_come_before_those_of_the_request():
    message = generate_request("go", plan=[parallel(["a"], max_tokens=5), serial()], max_tokens=9)
    fork, last = message.plan.stages
    assert fork.parallel.branches[0].stopping.max_tokens == 5
    assert last.serial.stopping.max_tokens == 9


def test_options_beside_a_model_driven_plan_are_its_own_unless_it_says_otherwise():
    driven = model_driven("t", max_tokens=3)
    message = generate_request("go", plan=driven, max_tokens=9, stop="\n", seed=1)
    assert message.model_driven == pb.ModelDriven(
        tag_set="t", stopping=pb.StoppingCriteria(max_tokens=3, stop=["\n"])
    )
    assert message.sampling.seed == 1
    assert generate_request("go", plan=model_driven(), max_tokens=9).model_driven.stopping.max_tokens == 9
    assert driven == model_driven("t", max_tokens=3)


def test_several_answers_are_branches_that_nothing_joins():
    message = generate_request("go", n=3, temperature=1, max_tokens=5)
    assert message.plan.stages == [parallel([""] * 3, join="none", max_tokens=5)]
    assert message.sampling == pb.SamplingParams(temperature=1)
    assert generate_request("go", n=2, sampling=sampling(temperature=1)).plan.stages != []


def test_one_answer_is_one_sequence_or_the_plan():
    assert generate_request("go", n=1) == generate_request("go")
    assert generate_request("go", n=1, plan=PLAN) == generate_request("go", plan=PLAN)
