"""What the status page shows, and who may see it."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scheduler.events import BranchInfo, StageStarted, Started, WidthChanged
from serve.config import ServerConfig
from serve.served import Served
from serve.server import scraping, status
from serve.server.scraping import Asked
from serve.server.server import pages
from serve.server.service import Service
from serve.server.status import STEPS, Progress, Status
from tests.serve.fakes import STEP, FakeEngine, say, served_model
from tests.serve.server.token_files import entry

NOTHING = Asked("", {})


def get(url: str, path: str, token: str | None = None) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
    connection.request("GET", path, headers={} if token is None else {"Authorization": f"Bearer {token}"})
    answer = connection.getresponse()
    found = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return found


def test_a_request_waits_starts_forks_and_tapers() -> None:
    progress = Progress("r", "search")
    assert (progress.width, progress.wanted) == (0, 0)
    progress.see([Started("r", 3, 0), *say("r", 0, "ab")])
    assert (progress.width, progress.wanted, progress.tokens, progress.branches) == (1, 1, 2, 0)
    both = StageStarted("r", 1, (BranchInfo(1, 0, "tea"), BranchInfo(2, 0, "coffee")))
    progress.see([both, WidthChanged("r", 1, 2), *say("r", 1, "x")])
    told = progress.told(progress.began + 2.0)
    assert told == {
        "id": "r", "tenant": "search", "seconds": 2.0, "tokens": 3, "branches": 2, "width": 1, "wanted": 2,
    }  # fmt: skip


def test_a_request_is_shown_while_it_is_answered_whatever_ends_it() -> None:
    shown = Status()
    with contextlib.suppress(ConnectionError), shown.following("r", None):
        assert [each["id"] for each in shown.told("SERVING", None)["requests"]] == ["r"]
        raise ConnectionError
    assert shown.told("SERVING", None)["requests"] == []


def test_the_last_steps_are_shown_and_how_many_there_were() -> None:
    shown = Status()
    for at in range(STEPS + 5):
        shown.observe_step(STEP._replace(branches=at, budget=None if at % 2 else 0.02))
    steps = shown.told("SERVING", None)["steps"]
    assert (steps["last"], len(steps["branches"]), steps["branches"][-1]) == (STEPS + 5, STEPS, STEPS + 4)
    assert (steps["measured"][0], steps["predicted"][0], steps["baseline"][0]) == (30.0, 20.0, 15.0)
    assert set(steps["budget"]) == {None, 20.0}
    assert {len(column) for name, column in steps.items() if name != "last"} == {STEPS}


def service(**options: Any) -> Service:
    return Service(ServerConfig(port=0, metrics_port=0, **options))


def test_a_server_that_starts_has_a_page_and_one_that_serves_shows_its_load() -> None:
    shared = service()
    assert json.loads(pages(shared)["/status.json"](NOTHING).body)["state"] == "STARTING"
    shared.serve(Served(engine=FakeEngine(), model=served_model()))
    shared.observe_step(STEP)
    told = json.loads(pages(shared)["/status.json"](NOTHING).body)
    assert (told["state"], told["model"], told["policy"]) == ("SERVING", "tiny", "taper")
    assert (told["kv_used"], told["kv_capacity"], told["target"]) == (10, 1000, 50.0)
    assert told["steps"]["last"] == 1


def test_the_page_asks_for_nothing_that_is_not_told() -> None:
    shared = service()
    shared.serve(Served(engine=FakeEngine(), model=served_model()))
    told, script = shared.told(), Path(status.__file__).with_name("status.html").read_text()
    assert set(re.findall(r"\btold\.(\w+)", script)) <= set(told)
    assert set(re.findall(r"\bsteps\.(\w+)", script)) <= set(told["steps"])
    fields = Progress("r", None).told(0.0)
    assert set(re.findall(r"\brequest\.(\w+)", script)) <= set(fields)
    assert "innerHTML" not in script, "an id and a tenant are text"
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org/2000/svg)", script), "it has no assets"


def test_the_page_is_for_everybody_and_what_it_shows_for_who_may_see_metrics(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(
        entry(tenant="ops", roles='["metrics"]', token="a-token-for-metrics")
        + entry(tenant="search", roles='["generate"]', token="a-token-to-generate")
    )
    shared = service(tokens=str(tokens))
    authorize = lambda header: shared.callers.check(header, {"metrics"})  # noqa: E731
    url, stop = scraping.listen("127.0.0.1", 0, pages(shared), authorize)
    try:
        code, body, headers = get(url, "/")
        assert (code, b"<title>TAPER</title>" in body) == (200, True)
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert get(url, "/status.json")[0] == 401
        assert get(url, "/status.json", "a-token-to-generate")[0] == 403
        code, body, headers = get(url, "/status.json", "a-token-for-metrics")
        assert (code, headers["Cache-Control"], json.loads(body)["state"]) == (200, "no-store", "STARTING")
        assert get(url, "/elsewhere")[0] == 401
        assert get(url, "/elsewhere", "a-token-for-metrics")[0] == 404
    finally:
        stop()
