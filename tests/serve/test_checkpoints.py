"""docs/checkpoints.md, row by row: what is read from which file, what wins, and what is refused in a line."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from model import decode_command
from model.checkpoint import OWN_HEAD, ModelSource, convert_hf
from model.rotary import LinearScaling
from model.tensor_files import INDEX, WHOLE
from model.tokenizer import Tokenizer
from model.weights import hf_tensors
from serve import commands
from serve.config import ServerConfig
from serve.engine import startup
from taper_client.client import Client
from taper_client.errors import ServiceError
from tests.model.dense import dense_greedy
from tests.model.faults import FAULTS
from tests.model.folders import EMBEDDING, NORM, RECIPE, Folder
from tests.serve.fakes import listening

PAGE = Path(__file__).parents[2] / "docs/checkpoints.md"
pytestmark = pytest.mark.usefixtures("quick_compiler")

ROWS: dict[str, Callable[[Folder], None]] = {}
"""What holds of a sound folder, by the row that says so."""


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Folder.make(tmp_path_factory.mktemp("sound") / "model").path


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Folder:
    return Folder(shutil.copytree(sound, tmp_path / "model"))


def row(test: Callable[[Folder], None]) -> Callable[[Folder], None]:
    ROWS[test.__name__.replace("_", "-")] = test
    return test


def loaded(folder: Folder) -> dict[str, np.ndarray]:
    return hf_tensors(ModelSource.find(str(folder.path)).load(jnp.float32))


def render(folder: Folder) -> str:
    return Tokenizer.from_folder(folder.path).render_chat([{"role": "user", "content": "Why?"}])


# --- what is read, and what wins ---------------------------------------------------------------------------


@row
def config(folder: Folder) -> None:
    assert ModelSource.find(str(folder.path)).config.hidden_size == 16


@row
def config_keys(folder: Folder) -> None:
    folder.edit("config.json", "rms_norm_eps", tie_word_embeddings=None)
    folder.store(folder.tensors() | {"lm_head.weight": folder.tensors()[EMBEDDING]})
    config = ModelSource.find(str(folder.path)).config
    assert (config.rms_norm_eps, config.tie_embeddings) == (1e-6, False)


@row
def ends(folder: Folder) -> None:
    folder.edit("config.json", eos_token_id=7)
    folder.write("generation_config.json", {"eos_token_id": [9, 7]})
    folder.edit("tokenizer_config.json", eos_token="<|endoftext|>")
    assert ModelSource.find(str(folder.path)).config.eos_ids == (7, 9)
    assert Tokenizer.from_folder(folder.path).eos_ids == (9, 7, 0)


@row
def rotary_base(folder: Folder) -> None:
    folder.edit("config.json", rope_theta=3e4, rope_parameters={"rope_theta": 2e4})
    assert ModelSource.find(str(folder.path)).config.rope_theta == 2e4


@row
def rotary_both(folder: Folder) -> None:
    folder.edit(
        "config.json",
        rope_theta=3e4,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 2e4},
        rope_scaling={"type": "linear", "factor": 4.0},
    )
    config = ModelSource.find(str(folder.path)).config
    assert (config.rope_theta, config.rope_scaling) == (3e4, LinearScaling(factor=4.0))


@row
def context(folder: Folder) -> None:
    folder.edit(
        "config.json", rope_scaling={"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}
    )
    assert ModelSource.find(str(folder.path)).config.max_context == 256


@row
def weights(folder: Folder) -> None:
    before = loaded(folder)
    folder.store({name: tensor + 7 for name, tensor in folder.tensors().items()}, "model_ema.safetensors")
    folder.write("consolidated.safetensors", "not even weights")
    for name, tensor in loaded(folder).items():
        np.testing.assert_array_equal(tensor, before[name])


@row
def index(folder: Folder) -> None:
    """Both files hold the norm, and one that no index names holds everything."""
    before = loaded(folder)
    folder.store({name: tensor + 7 for name, tensor in folder.tensors().items()}, "model_ema.safetensors")
    stored = folder.tensors()
    files = folder.shard()
    others = {name: tensor for name, tensor in stored.items() if files[name] == "b.safetensors"}
    folder.store(others | {NORM: stored[NORM] + 7}, "b.safetensors")
    np.testing.assert_array_equal(loaded(folder)[NORM], before[NORM])
    folder.write(INDEX, {"weight_map": files | {NORM: "b.safetensors"}})
    np.testing.assert_array_equal(loaded(folder)[NORM], before[NORM] + 7)


@row
def links(folder: Folder) -> None:
    """The cache of the hub keeps files elsewhere, under other names."""
    before, blobs = loaded(folder), folder.path.parent / "blobs"
    folder.shard()
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.path.iterdir())):
        target = file.rename(blobs / str(number))
        file.symlink_to(Path("..") / "blobs" / target.name)
    for name, tensor in loaded(folder).items():
        np.testing.assert_array_equal(tensor, before[name])
    assert render(folder).endswith("assistant\n")


@row
def head(folder: Folder) -> None:
    tied = folder.tensors()
    folder.store(tied | {"lm_head.weight": tied[EMBEDDING]})
    assert ModelSource.find(str(folder.path)).notes == ()
    folder.store(tied | {"lm_head.weight": tied[EMBEDDING] + 1})
    assert ModelSource.find(str(folder.path)).notes == (OWN_HEAD,)
    np.testing.assert_array_equal(loaded(folder)["lm_head.weight"], tied[EMBEDDING] + 1)
    folder.store({"lm_head.weight" if name == EMBEDDING else name: t for name, t in tied.items()})
    np.testing.assert_array_equal(loaded(folder)[EMBEDDING], tied[EMBEDDING])


@row
def types(folder: Folder) -> None:
    stored = folder.tensors()
    folder.store(stored | {NORM: stored[NORM].astype(np.float16), EMBEDDING: stored[EMBEDDING].astype(float)})
    assert {weight.dtype for weight in loaded(folder).values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(loaded(folder)[NORM], stored[NORM].astype(np.float16).astype(np.float32))


@row
def orbax(folder: Folder) -> None:
    convert_hf(folder.path, folder.path)
    folder.write(WHOLE, "nobody reads this")
    assert ModelSource.find(str(folder.path)).load_format == "orbax"
    loaded(folder)


@row
def tokenizer(folder: Folder) -> None:
    assert Tokenizer.from_folder(folder.path).encode("<|im_end|>") == [2]


@row
def no_tokenizer(folder: Folder) -> None:
    folder.remove("tokenizer.json")
    folder.write("tokenizer.model", b"")
    folder.edit("config.json", eos_token_id=5)
    tokenizer = Tokenizer.from_folder(folder.path)
    assert not tokenizer.supports_text
    assert not tokenizer.supports_chat
    assert tokenizer.eos_ids == (5,)
    assert tokenizer.decode([1, 2, 3]) == ""
    (note,) = tokenizer.notes
    assert "no tokenizer.json" in note
    assert "tokenizer.model is not read" in note


@row
def special_tokens(folder: Folder) -> None:
    """The older file wins, unless tokenizer_config.json lists the added tokens itself."""
    older = {"bos_token": {"content": "<|endoftext|>"}, "pad_token": "<Path>"}
    folder.write("special_tokens_map.json", older)
    folder.edit("tokenizer_config.json", bos_token="<|im_start|>", a_token="b", add_bos_token=True)
    tokenizer = Tokenizer.from_folder(folder.path)
    assert tokenizer.special_tokens is not None
    assert tokenizer.special_tokens["bos_token"] == "<|endoftext|>"
    assert tokenizer.special_tokens["a_token"] == "b"
    ids = tokenizer.encode("a<Path>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a"
    folder.edit("tokenizer_config.json", added_tokens_decoder={})
    tokenizer = Tokenizer.from_folder(folder.path)
    assert tokenizer.special_tokens is not None
    assert tokenizer.special_tokens["bos_token"] == "<|im_start|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<Path>"


@row
def added_tokens(folder: Folder) -> None:
    tokens = {"270": {"content": "<b>", "special": False}, "269": {"content": "<a>", "special": True}}
    folder.edit("tokenizer_config.json", added_tokens_decoder=tokens)
    tokenizer = Tokenizer.from_folder(folder.path)
    assert tokenizer.encode("<a><b>") == [269, 270]
    assert tokenizer.decode([269, 270], skip_special_tokens=True) == "<b>"
    folder.edit("tokenizer_config.json", "added_tokens_decoder")
    folder.write("added_tokens.json", {"<c>": 269})
    assert Tokenizer.from_folder(folder.path).encode("<c>") == [269]


@row
def unknown_tokens(folder: Folder) -> None:
    folder.edit("tokenizer_config.json", pad_token="[PAD]", additional_special_tokens=["<new>"])
    tokenizer = Tokenizer.from_folder(folder.path)
    assert tokenizer.vocab_size == 269
    assert max(tokenizer.encode("[PAD]<new>")) < 269


@row
def chat_template(folder: Folder) -> None:
    """Each of these is read only without those before it."""
    folder.write("chat_template.jinja", "file")
    folder.write("additional_chat_templates/default.jinja", "named file")
    folder.write("additional_chat_templates/tool_use.jinja", "tools")
    folder.edit("tokenizer_config.json", chat_template="config")
    folder.write("chat_template.json", {"chat_template": "processor"})
    assert render(folder) == "file"
    folder.remove("chat_template.jinja")
    assert render(folder) == "named file"
    folder.remove("additional_chat_templates/default.jinja")
    assert not Tokenizer.from_folder(folder.path).supports_chat
    folder.remove("additional_chat_templates/tool_use.jinja")
    assert render(folder) == "config"
    for named in ([{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}], {"default": "d"}):
        folder.edit("tokenizer_config.json", chat_template=named)
        assert render(folder) == "d"
    folder.edit("tokenizer_config.json", "chat_template")
    assert render(folder) == "processor"
    folder.remove("chat_template.json")
    assert not Tokenizer.from_folder(folder.path).supports_chat


@row
def templates_read_no_files(folder: Folder) -> None:
    folder.write("secret", "secret")
    for template in ("{% include 'secret' %}", "{% import 'secret' as s %}", "{% extends 'secret' %}"):
        folder.write("chat_template.jinja", template)
        with pytest.raises(ValueError, match="refuses these messages"):
            render(folder)


@row
def own_code(folder: Folder) -> None:
    folder.write("modeling_mine.py", "raise SystemExit('ran')")
    folder.edit("config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    folder.edit("tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_mine.Mine", None]})
    loaded(folder)
    render(folder)


@pytest.mark.parametrize("name", ROWS)
def test_a_folder_is_read_as_the_table_says(name: str, folder: Folder) -> None:
    ROWS[name](folder)


def test_a_folder_without_a_tokenizer_is_served_by_token_ids(folder: Folder, compiled: str) -> None:
    """Ids that no tokenizer knows are sampled, too; whatever needs text is refused."""
    folder.remove("tokenizer.json")
    config = ServerConfig(
        model=str(folder.path), buckets=(4,), num_pages=32, profile="measure", compilation_cache=compiled
    )
    started = startup.start(config)
    try:
        with listening(started.engine, started.model) as address, Client(address) as client:
            answer = client.complete([1, 2, 3], max_tokens=6, token_ids=True)
            with pytest.raises(ServiceError, match="no tokenizer"):
                client.complete("text", max_tokens=6)
            with pytest.raises(ServiceError, match="no tokenizer"):
                client.detokenize([1, 2])
    finally:
        started.engine.stop(drain=False, timeout=10.0)
    assert answer.trunk.token_ids == dense_greedy(folder.tensors(), RECIPE.config, [1, 2, 3], 6)
    assert answer.text == ""


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.fixture
def as_before(restored_log: None) -> Iterator[None]:
    """A server sets these for its process."""
    interval = sys.getswitchinterval()
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_with_a_folder_is_said_in_one_line(
    name: str, folder: Folder, compiled: str, as_before: None, capsys: pytest.CaptureFixture[str]
) -> None:
    fault = FAULTS[name]
    fault.break_(folder)
    path = str(folder.path)
    for command, arguments in (
        (
            commands.serve,
            ["--model", path, "--port", "0", "--compilation-cache", compiled, "--engine-in-process"],
        ),
        (decode_command.main, ["--model", path, "--prompt-ids", "1,2"]),
    ):
        with pytest.raises(SystemExit) as caught:
            command(arguments)
        told = capsys.readouterr().err.rstrip("\n")
        line = told if caught.value.code == 1 else str(caught.value)  # as it was printed, or will be
        assert re.match(r"taper-(serve|decode): ", line)
        assert "\n" not in line
        assert len(line) < 1500
        assert [text for text in fault.says if text not in line] == [], line


# --- the table ---------------------------------------------------------------------------------------------


def test_every_row_of_the_table_has_a_test_and_every_test_a_row() -> None:
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|", PAGE.read_text(), flags=re.MULTILINE)
    assert len(set(rows)) == len(rows)
    assert set(rows) == set(ROWS) | {fault.row for fault in FAULTS.values()}
