"""The whole system as a user has it: taper-serve as a process, spoken to over gRPC."""

from __future__ import annotations

import io
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import pytest
from rich.console import Console

from bench.demo import POLICIES, Demo, compare
from model import decode
from model.checkpoint import load_model
from scheduler.sampling import SamplingParams
from taper_client import Client, branch, parallel, sampling, serial, stopping
from taper_client.events import BranchFinished, Delta, Finished, Joined, StageStarted, Started
from tests.sizes import sampled

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def command(compiled: str) -> list[str]:
    program = str(Path(sys.executable).with_name("taper-serve"))
    return [program, "--port", "0", "--compilation-cache", compiled, "--buckets", "32"]


def test_explain_says_what_serving_takes_and_leaves(command: list[str]) -> None:
    """First in this file: it compiles the program that the server below finds."""
    told = subprocess.run([*command, "--explain"], stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    assert "2048 pages of 16 tokens: 32768 tokens" in told.stdout
    rows = [line.split()[0] for line in told.stdout.splitlines()]
    assert rows[-2:] == ["32", "ready"]


@pytest.fixture(scope="module")
def server(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process
        if process.poll() is None:
            process.kill()


@pytest.fixture(scope="module")
def address(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    ready = server.stdout.readline()
    assert ready.startswith("taper-serve ready on 127.0.0.1:"), "it listens on loopback unless told otherwise"
    return ready.split()[-1]


def test_a_request_forks_tapers_and_joins(address: str) -> None:
    plan = [
        serial(stopping=stopping(4, ignore_eos=True)),
        parallel(
            [branch(f"\n{i}:", label=str(i), stopping=stopping(3 + i, ignore_eos=True)) for i in range(3)]
        ),
        serial("\nSo:", stopping=stopping(5, ignore_eos=True)),
    ]
    with Client(address) as client:
        events = list(client.generate("The sea is", plan=plan, token_ids=True))
    kinds = [type(event) for event in events]
    assert kinds[0] is Started
    assert kinds[-1] is Finished
    assert kinds.count(StageStarted) == 3
    assert kinds.count(Joined) == 1
    assert kinds.count(BranchFinished) == 4
    lengths = {
        number: sum(len(e.token_ids) for e in events if isinstance(e, Delta) and e.branch == number)
        for number in range(4)
    }
    assert lengths == {0: 9, 1: 3, 2: 4, 3: 5}
    assert events[-1].usage.critical_path_tokens == 4 + 5 + 5


def test_a_race_is_decided_and_its_loser_is_not_in_the_answer(address: str) -> None:
    racers = [
        branch(f" {i}:", stopping=stopping(tokens, ignore_eos=True)) for i, tokens in ((1, 200), (2, 3))
    ]
    with Client(address) as client:
        answer = client.complete("The sea is", plan=[parallel(racers, join="none", first_k=1)])
    lost, won = answer.branches
    assert (lost.finish_reason, won.finish_reason) == ("outrun", "max_tokens")
    assert answer.text == won.prefix + won.text
    assert answer.usage.critical_path_tokens == 3
    assert lost.completion_tokens < 20


SHORT = 3_000_315  # a seed of the demo with short answers, of which the second branches


def test_every_policy_gives_every_request_the_same_tokens(address: str) -> None:
    screen = io.StringIO()
    answers = compare(address, Demo(requests=2, seed=SHORT), 0.01, Console(file=screen, width=200))
    assert set(answers) == set(POLICIES)
    assert "the same tokens under each" in screen.getvalue()
    assert [each.right for each in answers["off"]] == [True, True]
    tokens = [each.tokens_by_label() for each in answers["off"]]
    assert tokens == [each.tokens_by_label() for each in answers["eager"]]
    assert len({str(each) for each in tokens}) == 2, "different prompts, different answers"
    most = {policy: max(width for width, _ in answers[policy][1].completion.widths) for policy in POLICIES}
    assert most["off"] == 1 < most["eager"], "and not in the same way"


WAYS = [(0.0, 1), (0.9, 1), (0.9, 3)]  # (temperature, branches)


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize(("temperature", "width"), sampled(WAYS, [(0.9, 3)]))
def test_the_server_and_the_offline_decode_loop_agree(address: str, temperature: float, width: int) -> None:
    """Two programs that share the model alone: one schedules, one is a single loop on the device."""
    prompt, tokens, seed = [40, 101, 77, 212, 9], 12, 5
    model = load_model("default", jnp.float32)
    options = SamplingParams(temperature=temperature, seed=seed)
    generated = decode.generate(model, [prompt], max_tokens=tokens, branches=width, sampling=options)
    ends = stopping(tokens, ignore_eos=True)
    plan = [parallel([branch(stopping=ends) for _ in range(width)], join="none")]
    if width == 1:
        plan = [serial(stopping=ends)]
    with Client(address) as client:
        answer = client.complete(
            prompt, plan=plan, sampling=sampling(temperature=temperature, seed=seed), token_ids=True
        )
    got = [answer.trunk.token_ids] if width == 1 else [each.token_ids for each in answer.branches]
    assert got == generated.ids[0]


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ("plan.py", "Saturday: 16 tokens, ended by max_tokens"),
        ("model_driven.py", "begin: 1, 2, 3"),
        pytest.param("many_at_once.py", "river, tree, stone: 3 branches", marks=pytest.mark.full),
        pytest.param("best_of_n.py", "best: ", marks=pytest.mark.full),
    ],
)
def test_an_example_runs(example: str, said: str, address: str) -> None:
    ran = subprocess.run(
        [sys.executable, EXAMPLES / example, address], capture_output=True, text=True, timeout=120
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert said in ran.stdout


def test_the_example_in_a_shell_runs(address: str) -> None:
    buf = Path(sys.executable).with_name("buf")
    ran = subprocess.run(
        ["sh", EXAMPLES / "curl.sh", address],
        capture_output=True,
        text=True,
        timeout=120,
        env={"BUF": str(buf), "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"},
    )
    assert ran.returncode == 0, ran.stderr
    assert '"label": "coffee"' in ran.stdout
    assert '"completionTokens": 12' in ran.stdout


@pytest.mark.outside
def test_the_example_in_node_runs(address: str, tmp_path: Path) -> None:
    """Beside the protos that it reads, as in a checkout."""
    shutil.copytree(EXAMPLES / "node", tmp_path / "examples" / "node")
    shutil.copytree(EXAMPLES.parent / "serve/client/protos", tmp_path / "serve/client/protos")
    folder = tmp_path / "examples" / "node"
    install = ["npm", "install", "--no-audit", "--no-fund", "--silent"]
    subprocess.run(install, cwd=folder, check=True, timeout=300)
    command = ["node", "ask.mjs", address]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "begin: [ ' Tea:', ' Coffee:' ]" in ran.stdout
    assert "24 tokens" in ran.stdout


def test_every_example_is_named_on_their_page_and_run_by_a_test() -> None:
    page, tests = (EXAMPLES / "README.md").read_text(), Path(__file__).read_text()
    for file in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.sh"), *EXAMPLES.glob("node/*.mjs")):
        assert f"examples/{file.relative_to(EXAMPLES)}" in page
        assert file.name in tests or file.name == "ray_serve.py", "Ray has a test of its own"


def test_sigterm_drains_and_exits_cleanly(server: subprocess.Popen[str], address: str) -> None:
    """Last in this file: the request that runs is finished, then the process ends with 0."""
    with Client(address) as client:
        stream = client.generate(
            "Rivers", plan=[serial(stopping=stopping(200, ignore_eos=True))], token_ids=True
        )
        events = iter(stream)
        assert isinstance(next(events), Started)
        server.send_signal(signal.SIGTERM)
        rest = list(events)
    assert isinstance(rest[-1], Finished)
    assert rest[-1].usage.completion_tokens == 200
    assert server.wait(60) == 0
