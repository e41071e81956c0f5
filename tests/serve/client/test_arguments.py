"""What is wrong with an argument is said before anything is sent: which one, what it is, what is needed."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from taper_client import (
    arguments,
    branch,
    generate_request,
    model_driven,
    parallel,
    sampling,
    serial,
    stopping,
)
from taper_client.arguments import seconds, target, token_ids
from taper_client.options import StageOptions
from taper_client.v1 import inference_service_pb2 as pb

NAN, INF = float("nan"), float("inf")


def asked(**options: Any) -> pb.GenerateRequest:
    return generate_request("go", **options)


class Index:
    """An integer of somebody else's type, like numpy's."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


class Real:
    """A number of somebody else's type, like numpy's."""

    def __float__(self) -> float:
        return 0.5


def test_numbers_of_every_type_are_taken():
    message = asked(
        max_tokens=Index(3), temperature=Real(), top_p=Decimal("0.5"), min_p=0, seed=Index(2**64 - 1)
    )
    assert (message.stopping.max_tokens, message.sampling.seed) == (3, 2**64 - 1)
    drawn = message.sampling
    assert (drawn.temperature, drawn.top_p, drawn.min_p, drawn.HasField("min_p")) == (0.5, 0.5, 0, True)
    biased = asked(logit_bias={Index(7): Index(-2)}, stop_token_ids=(Index(4), 5))
    assert dict(biased.sampling.logit_bias) == {7: -2}
    assert [*biased.stopping.stop_token_ids] == [4, 5]
    assert [*generate_request([Index(1), 2]).prompt.token_ids.ids] == [1, 2]


def test_numbers_of_numpy_are_taken():
    message = generate_request(
        np.arange(3),
        max_tokens=np.int64(5),
        temperature=np.float32(0.5),
        logit_bias={np.int32(7): np.int8(-2)},
    )
    assert [*message.prompt.token_ids.ids] == [0, 1, 2]
    assert (message.stopping.max_tokens, message.sampling.temperature) == (5, 0.5)
    assert dict(message.sampling.logit_bias) == {7: -2}


def test_none_is_not_set():
    assert asked(max_tokens=None, stop=None, temperature=None, token_ids=None, plan=None, n=None) == asked()


WHOLE = "a whole number is needed"
OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_tokens": "5"}, TypeError, f"max_tokens is '5' (str): {WHOLE}; write 5"),
    ({"max_tokens": "five"}, TypeError, f"max_tokens is 'five' (str): {WHOLE}"),
    ({"max_tokens": 5.0}, TypeError, f"max_tokens is 5.0 (float): {WHOLE}; write 5"),
    ({"max_tokens": 0}, ValueError, "max_tokens is 0: at least 1 is needed"),
    ({"max_tokens": -1}, ValueError, "max_tokens is -1: at least 1 is needed"),
    ({"max_tokens": 2**32}, ValueError, "max_tokens is 4294967296: 1 to 4294967295 are possible"),
    ({"max_tokens": True}, TypeError, f"max_tokens is True (bool): {WHOLE}"),
    ({"max_tokens": [5]}, TypeError, f"max_tokens is [5] (list): {WHOLE}"),
    ({"seed": 1.5}, TypeError, f"seed is 1.5 (float): {WHOLE}"),
    ({"seed": -1}, ValueError, "seed is -1: 0 to 18446744073709551615 are possible"),
    ({"seed": INF}, TypeError, f"seed is inf (float): {WHOLE}"),
    ({"top_k": -1}, ValueError, "top_k is -1: 0 to 4294967295 are possible"),
    ({"priority": 2**31}, ValueError, "priority is 2147483648: -2147483648 to 2147483647 are possible"),
    ({"temperature": "hot"}, TypeError, "temperature is 'hot' (str): a number is needed"),
    ({"temperature": "0.5"}, TypeError, "temperature is '0.5' (str): a number is needed; write 0.5"),
    ({"temperature": True}, TypeError, "temperature is True (bool): a number is needed"),
    ({"temperature": NAN}, ValueError, "temperature is nan: a finite number is needed"),
    ({"temperature": INF}, ValueError, "temperature is inf: a finite number is needed"),
    ({"temperature": 10**400}, ValueError, "a finite number is needed"),
    ({"temperature": 1e39}, ValueError, "temperature is 1e+39: a number of at most 3.4e38 is needed"),
    ({"temperature": 1e-50}, ValueError, "temperature is 1e-50: this is too small to be told from 0"),
    ({"temperature": 1j}, TypeError, "temperature is 1j (complex): a number is needed"),
    ({"logit_bias": {"a": 1}}, TypeError, f"a key of logit_bias is 'a' (str): {WHOLE}"),
    ({"logit_bias": {"50": 1}}, TypeError, f"a key of logit_bias is '50' (str): {WHOLE}; write 50"),
    ({"logit_bias": {50: "1"}}, TypeError, "logit_bias[50] is '1' (str): a number is needed; write 1.0"),
    ({"logit_bias": {50: -INF}}, ValueError, "logit_bias[50] is -inf: a finite number is needed"),
    ({"logit_bias": [(50, 1)]}, TypeError, "a dict from token ids to numbers is needed"),
    ({"stop": ""}, ValueError, "stop is '': at least one character is needed; leave it out"),
    ({"stop": ["a", ""]}, ValueError, "stop[1] is '': at least one character is needed; leave it out"),
    ({"stop": ["a", 5]}, TypeError, "stop[1] is 5 (int): a str is needed"),
    ({"stop": b"a"}, TypeError, "stop is b'a' (bytes): a str or a list of them is needed"),
    ({"stop": {"a"}}, TypeError, "stop is {'a'} (set): a str or a list of them is needed"),
    ({"stop": iter("ab")}, TypeError, "a str or a list of them is needed; wrap it in list(...)"),
    ({"stop": "\ud800"}, ValueError, "is half of a surrogate pair, which UTF-8 cannot hold"),
    ({"stop_token_ids": 5}, TypeError, "stop_token_ids is 5 (int): a list of token ids is needed"),
    ({"stop_token_ids": [5, -1]}, ValueError, "stop_token_ids[1] is -1: 0 to 4294967295 are possible"),
    ({"ignore_eos": "no"}, TypeError, "ignore_eos is 'no' (str): True or False is needed"),
    ({"logprobs": 5}, TypeError, "logprobs is 5 (int): True or False is needed"),
    ({"top_logprobs": True}, TypeError, f"top_logprobs is True (bool): {WHOLE}"),
    ({"interval_ms": NAN}, ValueError, "interval_ms is nan: a finite number is needed"),
    ({"tpot_slo_ms": "20"}, TypeError, "tpot_slo_ms is '20' (str): a number is needed; write 20.0"),
    ({"ttft_slo_ms": INF}, ValueError, "ttft_slo_ms is inf: a finite number is needed"),
    ({"request_id": 7}, TypeError, "request_id is 7 (int): a str is needed"),
    ({"cache_salt": b"x"}, TypeError, "cache_salt is b'x' (bytes): a str is needed; decode it first"),
    ({"sampling": {"seed": 1}}, TypeError, "sampling is {'seed': 1} (dict): what sampling(...) returns is"),
    ({"stopping": 5}, TypeError, "stopping is 5 (int): what stopping(...) returns is needed"),
    ({"plan": []}, ValueError, "plan is []: at least one stage is needed; leave it out for one sequence"),
    ({"plan": serial()}, TypeError, "a list of stages, as in [serial(...), parallel([...])], is needed"),
    ({"plan": "abc"}, TypeError, "plan is 'abc' (str): a list of stages"),
    ({"plan": ["Tea:"]}, TypeError, "plan[0] is 'Tea:' (str): a stage is needed, which serial(...) and"),
    ({"plan": [serial(), branch()]}, TypeError, "plan[1] is"),
    ({"n": 0}, ValueError, "n is 0: at least 1 is needed"),
    ({"n": "2"}, TypeError, f"n is '2' (str): {WHOLE}; write 2"),
    ({"n": 4}, ValueError, "n is 4: greedy answers are all the same; give a temperature, such as 1.0"),
    ({"n": 4, "temperature": 0}, ValueError, "n is 4: greedy answers are all the same"),
    ({"n": 4, "temperature": 1, "plan": [serial()]}, ValueError, "n is 4: a plan lays out one answer"),
    ({"n": 4, "temperature": 1, "plan": model_driven()}, ValueError, "n is 4: a plan lays out one answer"),
    ({"temprature": 1}, TypeError, "no such option: temprature; did you mean temperature?"),
    ({"max_new_tokens": 1}, TypeError, "no such option: max_new_tokens; did you mean max_tokens?"),
    ({"messages": []}, TypeError, "no such option: messages; give the turns as the prompt"),
    ({"parallel": ["a"]}, TypeError, "no such option: parallel; plan=[parallel([...])] asks for branches"),
    ({"stream": True}, TypeError, "no such option: stream; generate(...) streams"),
    ({"zzz": 1}, TypeError, "no such option: zzz"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "kind", "said"), OPTIONS, ids=[f"{i}-{','.join(each[0])}" for i, each in enumerate(OPTIONS)]
)
def test_a_wrong_option_is_named_with_what_would_do(options, kind, said):
    with pytest.raises(kind, match=re.escape(said)):
        asked(**options)


@pytest.mark.parametrize("make", [serial, branch, lambda **options: parallel(["a"], **options)])
def test_stages_look_at_their_options_in_the_same_way(make):
    own = [each for each in OPTIONS if {*each[0]} <= {*StageOptions.__annotations__, "temprature", "zzz"}]
    assert len(own) > 30
    for options, kind, said in own:
        with pytest.raises(kind, match=re.escape(said)):
            make(**options)


PROMPTS: list[tuple[Any, type[Exception], str]] = [
    (b"hi", TypeError, "prompt is b'hi' (bytes): a str is needed; decode it first"),
    (5, TypeError, "prompt is 5 (int): text, a list of token ids or a list of chat turns is needed"),
    (
        None,
        TypeError,
        "prompt is None (NoneType): text, a list of token ids or a list of chat turns is needed",
    ),
    ((i for i in (1, 2)), TypeError, "a list of chat turns is needed; wrap it in list(...)"),
    ({1, 2}, TypeError, "prompt is {1, 2} (set): "),
    (
        memoryview(b"hi"),
        TypeError,
        "(memoryview): text, a list of token ids or a list of chat turns is needed",
    ),
    ([], ValueError, "prompt is []: at least one token id or chat turn is needed"),
    (["a", "b"], TypeError, "prompt[0] is 'a' (str): a token id or a chat turn is needed; a call has one"),
    ([1, "b"], TypeError, f"prompt[1] is 'b' (str): {WHOLE}"),
    ([1, 2.0], TypeError, f"prompt[1] is 2.0 (float): {WHOLE}; write 2"),
    ([[1, 2]], TypeError, f"prompt[0] is [1, 2] (list): {WHOLE}"),
    ([True], TypeError, f"prompt[0] is True (bool): {WHOLE}"),
    ([1, -1], ValueError, "prompt[1] is -1: 0 to 4294967295 are possible"),
    ({"role": "user", "content": "hi"}, TypeError, "a list of turns is needed; write [...] around it"),
    ([{"role": "user"}], ValueError, "exactly 'role' and 'content' are needed"),
    (
        [{"role": "user", "content": "hi", "name": "me"}],
        ValueError,
        "exactly 'role' and 'content' are needed",
    ),
    (
        [{"role": "user", "content": None}],
        TypeError,
        "prompt[0]['content'] is None (NoneType): a str is needed",
    ),
    ([{"role": "user", "content": "hi"}, "hi"], TypeError, "prompt[1] is 'hi' (str): a turn like {'role': "),
    ("a\udc80", ValueError, "(the byte 0x80, if this was read from bytes)"),
]


@pytest.mark.parametrize(("prompt", "kind", "said"), PROMPTS, ids=[str(i) for i in range(len(PROMPTS))])
def test_a_wrong_prompt_is_named_with_what_would_do(prompt, kind, said):
    with pytest.raises(kind, match=re.escape(said)):
        generate_request(prompt)


BUILDERS = [
    (
        lambda: parallel("abc"),
        TypeError,
        "branches is 'abc' (str): a list of branches, as in parallel(['Tea:'",
    ),
    (lambda: parallel(branch("a")), TypeError, "a list of branches, as in parallel(['Tea:', 'Coffee:']), is"),
    (lambda: parallel([]), ValueError, "branches is []: at least one branch is needed"),
    (lambda: parallel(["a", 5]), TypeError, "branches[1] is 5 (int): text, or what branch(...) returns, is"),
    (lambda: parallel(["a", serial()]), TypeError, "branch(then=[...]) holds stages"),
    (lambda: parallel(["\ud800"]), ValueError, "branches[0] is"),
    (lambda: parallel(iter("ab")), TypeError, "is needed; wrap it in list(...)"),
    (
        lambda: parallel(["a"], join="kV"),
        ValueError,
        "join is 'kV': one of 'kv', 'reprefill', 'none' is needed",
    ),
    (lambda: parallel(["a"], join=1), TypeError, "join is 1 (int): a str is needed"),
    (
        lambda: serial(b"a"),
        TypeError,
        "prefix is b'a' (bytes): a str or token ids are needed; decode it first",
    ),
    (lambda: serial(5), TypeError, "prefix is 5 (int): a list of token ids is needed"),
    (lambda: branch([5, "a"]), TypeError, f"prefix[1] is 'a' (str): {WHOLE}"),
    (lambda: branch(label=5), TypeError, "label is 5 (int): a str is needed"),
    (lambda: branch(then=serial()), TypeError, "a list of stages"),
    (lambda: branch(then=["a"]), TypeError, "then[0] is 'a' (str): a stage is needed"),
    (lambda: model_driven(5), TypeError, "tag_set is 5 (int): a str is needed"),
    (lambda: model_driven("t", fork_tags=pb.ForkTags()), ValueError, "tag_set and fork_tags are both given"),
    (lambda: model_driven(fork_tags={}), TypeError, "what ForkTags(...) returns is needed"),
    (lambda: model_driven(max_branches=0), ValueError, "max_branches is 0: at least 1 is needed"),
    (lambda: model_driven(branch_max_tokens=0), ValueError, "branch_max_tokens is 0: at least 1 is needed"),
    (lambda: model_driven(max_depth=0), ValueError, "max_depth is 0: at least 1 is needed"),
    (lambda: model_driven(seed=1), TypeError, "no such option: seed"),
    (lambda: sampling(max_tokens=1), TypeError, "no such option: max_tokens"),
    (lambda: sampling(top_p="1"), TypeError, "top_p is '1' (str): a number is needed; write 1.0"),
    (lambda: stopping("5"), TypeError, f"max_tokens is '5' (str): {WHOLE}; write 5"),
    (lambda: stopping(stop=[""]), ValueError, "stop[0] is ''"),
]


@pytest.mark.parametrize(("make", "kind", "said"), BUILDERS, ids=[str(i) for i in range(len(BUILDERS))])
def test_builders_of_plans_say_what_is_wrong(make, kind, said):
    with pytest.raises(kind, match=re.escape(said)):
        make()


def test_a_long_value_is_shortened():
    with pytest.raises(TypeError) as caught:
        asked(max_tokens="5" * 10_000)
    assert len(str(caught.value)) < 300


def test_the_bounds_of_ports_and_timeouts() -> None:
    for port in (1, 65535):
        assert target("address", f"host:{port}") == f"host:{port}"
    for port in (0, 65536):
        with pytest.raises(ValueError, match="a port is 1 to 65535"):
            target("address", f"host:{port}")
    assert seconds("timeout", 1e-9) == 1e-9
    with pytest.raises(ValueError, match="more than 0 seconds"):
        seconds("timeout", 0)


def test_ids_that_are_plain_integers_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt has many."""
    monkeypatch.setattr(arguments, "whole", lambda *_: pytest.fail("one by one"))
    assert token_ids("prompt", (0, 5, 2**32 - 1)) == [0, 5, 2**32 - 1]
