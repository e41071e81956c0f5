"""What docs/client.md says is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from taper_client import Client, Completion
from taper_client.options import Options
from tests.serve.authorities import Authority
from tests.serve.client.ends import FINISHED, STARTED
from tests.serve.fakes import FakeEngine, fork_and_join, listening

PAGE = (Path(__file__).parents[3] / "docs/client.md").read_text()


def rows(title: str) -> list[list[str]]:
    """The names in the first column of a section's tables, row by row."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    return [re.findall(r"`(\w+)`", line.split("|")[1]) for line in section.splitlines() if line[:3] == "| `"]


def test_every_option_is_in_the_table():
    named = [name for row in rows("Options") for name in row]
    assert sorted(named) == sorted(Options.__annotations__)


def test_every_field_of_the_json_is_in_the_table():
    completion = Completion()
    for event in (STARTED, FINISHED):
        completion.add(event)
    told = completion.as_dict()
    assert {name for row in rows("In a shell") for name in row} == told.keys()
    section = PAGE.split("\n## In a shell\n")[1]
    for part in ("trunk", "usage", "timing"):
        (line,) = (line for line in section.splitlines() if line.startswith(f"| `{part}` |"))
        assert told[part].keys() <= {*re.findall(r"`(\w+)`", line)}


def test_the_examples_run(capsys, tmp_path):
    (tmp_path / "token").write_text("a-secret-of-some-length")
    files = {"/run/secrets/taper": str(tmp_path / "token"), "ca.crt": Authority(tmp_path).path}
    with listening(FakeEngine(fork_and_join)) as address:
        names: dict[str, object] = {}
        for example in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
            for shown, real in {"127.0.0.1:50051": address, **files}.items():
                example = example.replace(shown, real)
            exec(example, names)
        client, remote, nearby = (names[name] for name in ("client", "remote", "nearby"))
        assert isinstance(client, Client)
        for other in (remote, nearby):
            assert isinstance(other, Client)
            other.close()
        printed = capsys.readouterr().out
        assert "Hi. Tea: good" in printed
        errors = re.findall(r">>> (.*)\n(\w+): (.*)\n", PAGE)
        assert len(errors) == 2
        for call, kind, said in errors:
            with pytest.raises({"TypeError": TypeError}[kind]) as caught:
                eval(call, names)
            assert str(caught.value) == said
        client.close()
