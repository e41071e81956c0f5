"""docs/branching-models.md with folders in the shape of the published ones, and random weights.

A random model writes no tags, so each request makes it: every token of a script has a bias, the first one the
largest, and what was written once loses more than that by its penalties. What the model thinks of the tokens
that it is made to write are still its own log-probabilities: they are compared with the dense oracle, which
lays a whole answer out as the papers do.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from model.checkpoint import ModelSource
from model.hf_config import read_folder
from model.tokenizer import Tokenizer
from scheduler.grammars import GRAMMARS, TagGrammar
from serve.config.command_line import configured
from serve.engine import startup
from taper_client import Client, Completion, model_driven
from taper_client.v1 import inference_service_pb2 as pb
from tests.compiling import compiled_quickly
from tests.model.dense import dense_logits
from tests.model.published import PUBLISHED, Published
from tests.serve.fakes import listening
from tests.serve.one_sequence import Dense
from tests.sizes import sampled

PAGE = (Path(__file__).parents[2] / "docs/branching-models.md").read_text()
OPTIONS = "--buckets 4 --num-pages 96 --page-size 8 --max-context 512 --profile measure"
QUESTION = "Which of them?"
FEW = 400  # ordinary tokens
NARROW = {"num_hidden_layers": 2, "hidden_size": 80, "intermediate_size": 96}
WIDE = {"num_hidden_layers": 1}


def test_every_tag_set_has_a_model_and_a_command() -> None:
    assert sorted(published.tag_set for published in PUBLISHED.values()) == sorted(GRAMMARS)
    for name, published in PUBLISHED.items():
        assert configured(command_of(name)).tag_set == published.tag_set


def command_of(name: str) -> list[str]:
    """What the page types after `taper-serve` to serve a model."""
    (command,) = re.findall(rf"^\.venv/bin/taper-serve (--model \S*{name} .*)$", PAGE, re.MULTILINE)
    return shlex.split(command, comments=True)


# --- the folder ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sampled(PUBLISHED, ["Multiverse-32B"]))
def test_a_folder_with_the_published_vocabulary_is_read(name: str, tmp_path: Path) -> None:
    published = PUBLISHED[name]
    folder = published.write(tmp_path / name, **NARROW)
    found, tokenizer = ModelSource.find(str(folder)), Tokenizer.from_folder(folder)
    assert found.notes == ()
    assert (found.config.vocab_size, tokenizer.vocab_size) == {
        "NPR-4B": (151680, 151677),
        "Multiverse-32B": (151680, 151677),
        "ThreadWeaver-8B": (151744, 151681),
    }[name]
    assert set(tokenizer.eos_ids) == {151645, 151643}
    assert [tokenizer.encode(tag) for tag in published.tags] == [
        [published.id_of(tag)] for tag in published.tags
    ]
    if name == "Multiverse-32B":  # the ids that its own engine stops at
        assert tokenizer.encode("</Goal></Path>") == [151670, 151674]


# --- a server ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Serving:
    """A folder that is being served, and where."""

    published: Published
    folder: Path
    address: str

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_folder(self.folder)

    @property
    def grammar(self) -> TagGrammar:
        return GRAMMARS[self.published.tag_set]

    def id_of(self, token: str) -> int:
        (id,) = self.tokenizer.encode_continuation(token)
        return id

    @cached_property
    def script(self) -> list[int]:
        """What the trunk writes. A branch, and the trunk after the join, go on with what is left of it.

        No token comes twice, so the second outline is begun by a tag that is spelled out.
        """
        grammar, tag = self.grammar, self.grammar.outline.opens
        plan = [grammar.plan_open, tag, "1", ":", "<", tag.strip("<>"), ">", "2", " :", grammar.plan_close]
        return [
            self.id_of(text)
            for text in (*plan, " red", " green", grammar.branch_close, " blue", "<|im_end|>")
        ]

    def ask(self, *, keep_special_tokens: bool) -> Completion:
        with Client(self.address) as client:
            return client.complete(
                [{"role": "user", "content": QUESTION}],
                plan=model_driven(max_tokens=60),
                logit_bias={token: 50 - 0.2 * place for place, token in enumerate(self.script)},
                presence_penalty=2,
                frequency_penalty=2,
                logprobs=True,
                token_ids=True,
                prompt_token_ids=True,
                keep_special_tokens=keep_special_tokens,
            )

    @cached_property
    def answer(self) -> Completion:
        return self.ask(keep_special_tokens=True)

    def tensors(self) -> dict[str, np.ndarray]:
        files = sorted(self.folder.glob("*.safetensors"))
        assert len(files) == self.published.shards
        return {name: tensor for file in files for name, tensor in load_file(file).items()}


SIZES = [f"{name} {size}" for name in PUBLISHED for size in ("small", "whole-vocabulary")]
SIZES += ["NPR-4B wide"]  # the others would take too much memory


@pytest.fixture(scope="module", params=sampled(SIZES, ["NPR-4B small", "Multiverse-32B small"]))
def serving(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, compiled: str
) -> Iterator[Serving]:
    name, size = request.param.split()
    published = replace(PUBLISHED[name], ordinary=FEW) if size == "small" else PUBLISHED[name]
    folder = tmp_path_factory.mktemp("published") / name
    published.write(folder, **(WIDE if size == "wide" else NARROW))
    typed = [*command_of(name), *OPTIONS.split(), "--compilation-cache", compiled, "--tpot-slo-ms", "60000"]
    typed[1] = str(folder)
    with compiled_quickly() if size == "small" else nullcontext():  # a sampler for all tokens would crawl
        started = startup.start(configured(typed))
    try:
        with listening(started.engine, started.model) as address:
            yield Serving(published, folder, address)
    finally:
        started.engine.stop(drain=False, timeout=10.0)


def test_a_client_learns_what_is_served(serving: Serving) -> None:
    with Client(serving.address) as client:
        info = client.model_info()
    assert info.default_tag_set == serving.published.tag_set
    assert info.default_join == {"kv": pb.JOIN_KV, "reprefill": pb.JOIN_REPREFILL}[serving.published.join]
    assert info.vocab_size == serving.published.vocab_size
    assert info.supports_chat
    ends = {serving.published.id_of(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert {*info.eos_token_ids} == ends


def test_a_chat_is_written_as_the_template_says(serving: Serving) -> None:
    system = serving.published.system
    begins = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    read = serving.tokenizer.decode(serving.answer.prompt_token_ids)
    assert read == f"{begins}<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


def test_branches_fork_at_the_tags_and_join_and_the_turn_ends(serving: Serving) -> None:
    grammar, answer = serving.grammar, serving.answer
    tag = grammar.outline.opens
    assert answer.trunk.text == f"{grammar.plan_open}{tag}1:{tag}2 :{grammar.plan_close} blue"
    assert answer.finish_reason == "eos"
    for branch, label in zip(answer.branches, "12", strict=True):
        assert (branch.label, branch.prefix) == (label, grammar.branch_open.replace("{label}", label))
        assert (branch.text, branch.finish_reason) == (f" red green{grammar.branch_close}", "branch_closed")
    branches = "".join(branch.prefix + branch.text for branch in answer.branches)
    assert answer.text == answer.trunk.text.replace(" blue", f"{branches}{grammar.join_open} blue")
    assert answer.usage.critical_path_tokens == len(serving.script) - 1, "the end of the turn is no token"


def test_tags_are_no_part_of_the_text_unless_they_are_asked_for(serving: Serving) -> None:
    plain = serving.ask(keep_special_tokens=False)
    assert plain.trunk.token_ids == serving.answer.trunk.token_ids
    for tag in serving.published.tags:
        spelled = tag == serving.grammar.outline.opens  # the second time, and so it is ordinary text
        assert plain.text.count(tag) == spelled
    assert [branch.text for branch in plain.branches] == [" red green"] * 2


def test_each_token_sees_what_the_model_was_trained_to_see(serving: Serving) -> None:
    """Branches begin at one position and see nothing of each other. After a `kv` join the trunk goes on where
    the longest ended; after the other one, it reads all of it again as ordinary text."""
    answer, encode = serving.answer, serving.tokenizer.encode_continuation
    plan, after = answer.trunk.token_ids[:10], answer.trunk.token_ids[10:]
    dense = Dense()
    before = dense.append(answer.prompt_token_ids, tuple(plan), [], 0)
    start, joined, texts = len(before), list(before), list[int]()
    for branch in answer.branches:
        seed = tuple(encode(branch.prefix))
        joined += dense.append(seed, tuple(branch.token_ids), before, start)[start:]
        texts += [*seed, *branch.token_ids]
    again = serving.published.join == "reprefill"
    given = (*(texts if again else ()), *encode(serving.grammar.join_open))
    longest = max(len(encode(branch.prefix)) + len(branch.token_ids) for branch in answer.branches)
    dense.append(given, tuple(after), before if again else joined, start + (0 if again else longest))

    logits = dense_logits(
        serving.tensors(),
        read_folder(serving.folder),
        dense.tokens,
        dense.positions,
        dense.mask(),
        np.float32,
    )[:, : serving.tokenizer.vocab_size].astype(float)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [logprobs[fed, token] for fed, token in dense.sampled]
    said = [*answer.trunk.logprobs[:10], *(each for branch in answer.branches for each in branch.logprobs)]
    said += answer.trunk.logprobs[10:]
    assert [each.token for each in said] == [token for _, token in dense.sampled]
    np.testing.assert_allclose([each.logprob for each in said], expected, rtol=0, atol=5e-6)
    assert np.std(expected) > 0.01, "they are told apart"
