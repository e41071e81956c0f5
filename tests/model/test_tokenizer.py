"""Text to ids and back, chat templates, and what a model folder must contain."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.hf_config import read_folder
from model.settings import CheckpointError
from model.tiny import build_tokenizer
from model.tokenizer import ChatError, Tokenizer, TokenizerError
from tests.model.default_tokenizer import TINY, tiny

QUESTION = [{"role": "user", "content": "Why?"}]

# The relevant lines of Qwen3's template, as its authors write them.
QWEN3_STYLE = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


def folder_with(path: Path, *, template: object = None, **files: object) -> Path:
    """The tiny model's tokenizer with another chat template and other JSON files."""
    path.mkdir(exist_ok=True)
    shutil.copy(TINY / "tokenizer.json", path)
    if isinstance(template, str):
        (path / "chat_template.jinja").write_text(template)
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def render(path: Path, template: str, **options) -> str:
    return Tokenizer.from_folder(folder_with(path, template=template)).render_chat(QUESTION, **options)


@given(st.text())
def test_any_text_survives_a_round_trip(text):
    assert tiny.decode(tiny.encode(text)) == text


def test_nothing_is_added_to_a_text_and_nothing_is_taken_from_one():
    text = "<|im_start|>user\nHello  <Path>1:</Path>\n<|im_end|>"
    ids = tiny.encode(text)
    assert (ids[0], ids[-1]) == (1, 2)
    assert tiny.decode(ids) == text
    assert tiny.decode(ids, skip_special_tokens=True) == "user\nHello  <Path>1:</Path>\n"


@given(st.lists(st.integers(0, 268)))
def test_any_ids_decode_to_whole_unicode(ids):
    tiny.decode(ids).encode("utf-8")


def test_a_cut_code_point_becomes_a_replacement_character():
    ids = tiny.encode("\N{SNOWMAN}")
    assert len(ids) == 3
    assert tiny.decode(ids[:2]).endswith("\ufffd")
    assert tiny.decode(ids) == "\N{SNOWMAN}"


def test_ids_beyond_the_vocabulary_decode_to_nothing():
    assert tiny.decode([5000, *tiny.encode("a"), 70000]) == "a"


def test_special_tokens_of_the_post_processor_are_added_on_request(tmp_path):
    folder = folder_with(tmp_path)
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    stored["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    tokenizer = Tokenizer.from_folder(folder)
    plain = tokenizer.encode("a b c d")
    assert plain == tiny.encode("a b c d")
    assert tokenizer.encode("a b c d", add_special_tokens=True) == [0, *plain]


def test_eos_ids_come_from_every_file_that_names_them(tmp_path):
    folder = folder_with(
        tmp_path,
        generation_config={"eos_token_id": [9, 2]},
        config={"eos_token_id": 7},
        tokenizer_config={"eos_token": {"content": "<|endoftext|>"}},
    )
    assert Tokenizer.from_folder(folder).eos_ids == (9, 2, 7, 0)
    assert Tokenizer.from_folder(folder_with(tmp_path / "bare")).eos_ids == ()


def test_the_default_model_speaks_chatml():
    messages = [{"role": "system", "content": "Be brief."}, *QUESTION]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
    assert tiny.render_chat(messages) == text + "<|im_start|>assistant\n"
    assert tiny.render_chat(messages, add_generation_prompt=False) == text


def test_the_default_models_files_agree_with_each_other():
    config = read_folder(TINY)
    assert config.vocab_size == tiny.vocab_size == 269
    assert set(config.eos_ids) == set(tiny.eos_ids) == {0, 2}
    for tag in build_tokenizer.TAGS:
        assert len(tiny.encode(tag)) == 1


def test_the_default_tokenizer_can_be_made_again():
    assert build_tokenizer.build().get_vocab() == tiny.backend.get_vocab()


def test_options_reach_the_template(tmp_path):
    asked = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert render(tmp_path, QWEN3_STYLE) == asked
    assert render(tmp_path, QWEN3_STYLE, enable_thinking=True) == asked
    assert render(tmp_path, QWEN3_STYLE, enable_thinking=False) == asked + "<think>\n\n</think>\n\n"


def test_templates_find_the_names_that_transformers_gives_them(tmp_path):
    template = """
    {% for message in messages %}
        {% if loop.index > 1 %}{% break %}{% endif %}
        {% generation %}
{{ bos_token }}{{ message | tojson }}{{ strftime_now('%%') }}{{ tools is none }}
        {% endgeneration %}
    {% endfor %}"""
    folder = folder_with(tmp_path, template=template, tokenizer_config={"bos_token": {"content": "<s>"}})
    rendered = Tokenizer.from_folder(folder).render_chat([{"role": "user", "content": "<é>"}] * 2)
    assert rendered.strip() == '<s>{"role": "user", "content": "<é>"}%True'


def test_a_template_may_stand_in_the_tokenizer_config(tmp_path):
    one = folder_with(
        tmp_path / "one", tokenizer_config={"chat_template": "{{ eos_token }}", "eos_token": "!"}
    )
    assert Tokenizer.from_folder(one).render_chat(QUESTION) == "!"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    many = folder_with(tmp_path / "many", tokenizer_config={"chat_template": named})
    assert Tokenizer.from_folder(many).render_chat(QUESTION) == "plain"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only one system message') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].content + 1 }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
    ids=["raises", "changes its input", "leaves the sandbox", "wrong type", "runs too long"],
)
def test_a_template_that_fails_is_a_chat_error(template, tmp_path):
    with pytest.raises(ChatError, match="the model's chat template refuses these messages: "):
        render(tmp_path, template)


def test_the_templates_own_complaint_is_passed_on(tmp_path):
    with pytest.raises(ChatError, match="only one system message"):
        render(tmp_path, "{{ raise_exception('only one system message') }}")


def test_a_model_without_a_template_says_so(tmp_path):
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path))
    assert not tokenizer.supports_chat
    with pytest.raises(ChatError, match="no chat template"):
        tokenizer.render_chat(QUESTION)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"cannot read .*tokenizer\.json: "):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(TokenizerError, match=r"chat template in .*chat_template\.jinja is not valid"):
        Tokenizer.from_folder(folder_with(tmp_path, template="{% if %}"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*tokenizer_config\.json: "):
        Tokenizer.from_folder(tmp_path)
