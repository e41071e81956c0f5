"""The request that docs/life-of-a-request.md follows: what is printed of it there comes from here.

All of it is the real thing, but for the device: a step takes the time that its bucket has in a table, and
says what a script says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from google.protobuf import text_format

from model.find import model_config, model_tokenizer
from scheduler.config import SchedulerConfig
from scheduler.controller import Controller
from scheduler.predictor import StepLatencyModel
from scheduler.scheduler import Scheduler
from scheduler.step import Entry, Sample, ScheduledStep, SegmentRead, StepResult
from serve.config import ServerConfig
from serve.reading.requests import read_request
from serve.served import ServedModel
from serve.server.responses import ResponseWriter
from serve.text.codec import TextCodec
from serve.text.reader import Speller
from taper_client import Completion, generate_request, parallel, serial
from taper_client.events import BranchFinished, Delta, Event, WidthChanged, events_of
from taper_client.v1 import inference_service_pb2 as pb

SERVER = "127.0.0.1:50051"
PAGE_SIZE = 4
SECONDS = {2: 0.006, 4: 0.011, 32: 0.014}  # of a step, by its bucket
SAID = {((0, 0),): " hot", ((0, 1),): " no", ((0, 2),): " ice", (): " tea"}  # by path; then it ends


def message() -> pb.GenerateRequest:
    """What the client sends."""
    return generate_request(
        "Which drink?",
        plan=[parallel(["\nTea:", "\nCola:", "\nWater:"]), serial("\nSo:")],
        tpot_slo_ms=10,
        seed=7,
        request_id="drinks",
    )


@dataclass(frozen=True)
class Ran:
    """A step that has run, and what the client was told then."""

    scheduled: ScheduledStep
    events: tuple[Event, ...]


class Life:
    """The request from its message to its end. As in the engine, a step is planned while another one runs."""

    def __init__(self) -> None:
        self.tokenizer, _ = model_tokenizer("default")
        config = model_config("default")
        self.model = ServedModel.of(ServerConfig(), config, self.tokenizer)
        self.message = message()
        self.request = read_request(self.message, self.model)
        self.answer = Completion()
        self._writer = ResponseWriter(
            self.request,
            self.message.output,
            Speller(self.tokenizer.spelling, skip_special_tokens=True),
            server=SERVER,
        )
        self._says = {path: iter(self._ids(text)) for path, text in SAID.items()}
        self.steps = [*self._run()]

    def _ids(self, text: str) -> list[int]:
        return [*self.tokenizer.encode_continuation(text), self.model.eos_ids[0]]

    def _run(self) -> Iterator[Ran]:
        sizes = SchedulerConfig(num_pages=1024, page_size=PAGE_SIZE, num_slots=64, max_context=1024)
        scheduler = Scheduler(sizes, Controller(StepLatencyModel(SECONDS)), TextCodec(self.tokenizer))
        scheduler.add(self.request, now := 0.0)
        running = scheduler.schedule(now)
        while running is not None:
            following = scheduler.schedule(now)
            step, seconds = running.step, SECONDS[running.step.bucket]
            samples = tuple(Sample(next(self._says[e.path], 0)) for e in step.entries if e.samples)
            now += seconds
            events = scheduler.update(StepResult(step, samples, seconds), now)
            told = tuple(events_of(self._writer.write(events))) if events else ()
            for event in told:
                self.answer.add(event)
            yield Ran(running, told)
            running = following or scheduler.schedule(now)


# --- how it is printed -------------------------------------------------------------------------------------

_WIDTH = 100
_SHOWN_STEP = 2  # the first one that leaves a branch out, and feeds tokens that are not known yet


def printed() -> dict[str, str]:
    """What the page has of it, by the names that stand there."""
    life = Life()
    return {
        "message": _code(_folded(text_format.MessageToString(life.message))),
        "request": _code(_brief(life.request)),
        "steps": "\n".join(
            [
                "| step | computes, by branch | waits | ms: predicted, allowed | the client is told |",
                "|---|---|---|---|---|",
                *(_row(life, ran) for ran in life.steps),
            ]
        ),
        "step": _entries(life.steps[_SHOWN_STEP].scheduled),
        "answer": _code(f"{life.answer}\n{_brief(life.answer.usage)}\n{_brief(life.answer.timing)}"),
    }


def _code(text: str) -> str:
    return f"```\n{text.rstrip()}\n```"


def _folded(text: str) -> str:
    """A message as text, without what is empty in it; what has room in one line stands in one."""
    text = re.sub(r"\n *\w+ \{\s*\}(?=\n)", "", text)
    return re.sub(r"\{\n\s+([^{}\n]*)\n\s*\}", r"{ \1 }", text)


def _brief(value: Any, indent: int = 0) -> str:
    """As `repr`, without what is as it is by default; in several lines if one is too long."""
    if isinstance(value, frozenset):
        return f"{{{', '.join(map(repr, sorted(value)))}}}"
    if is_dataclass(value):
        name = type(value).__name__
        told = [field for field in fields(value) if getattr(value, field.name) != _default(field)]
        parts = [f"{field.name}={_brief(getattr(value, field.name), indent + 2)}" for field in told]
    elif isinstance(value, tuple) and value and is_dataclass(value[0]):
        name, parts = "", [_brief(each, indent + 2) for each in value]
    else:
        return repr(value)
    line = f"{name}({', '.join(parts)})"
    if indent + len(line) <= _WIDTH and "\n" not in line:
        return line
    space = " " * indent
    return f"{name}(\n" + "".join(f"{space}  {part},\n" for part in parts) + f"{space})"


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _row(life: Life, ran: Ran) -> str:
    step, forecast = ran.scheduled.step, ran.scheduled.forecast
    computes = "; ".join(_computed(life, entry) for entry in step.entries)
    waits = ", ".join(str(branch) for _, branch in forecast.deferred)
    allowed = f"{forecast.budget_seconds * 1e3:.1f}".replace("inf", "any")
    told = "; ".join(map(_told, ran.events))
    return f"| {step.step_id} | {computes} | {waits} | {forecast.seconds * 1e3:.1f}, {allowed} | {told} |"


def _computed(life: Life, entry: Entry) -> str:
    if entry.tokens is None:
        return f"{entry.branch}: its last token"
    text = _visible(life.tokenizer.decode([*entry.tokens]))
    return f"{entry.branch}: `{text}`" if entry.samples else f"the prompt, `{text}`"


def _visible(text: str) -> str:
    """A space alone would not be seen in a table, and a line break would end its row."""
    return "␣" if text == " " else text.replace("\n", "\\n")


def _told(event: Event) -> str:
    match event:
        case Delta():
            return f"{event.branch}: `{_visible(event.text)}`"
        case BranchFinished():
            return f"*BranchFinished* {event.branch}"
        case WidthChanged():
            return f"*WidthChanged* {event.width} of {event.wanted}"
        case _:
            return f"*{type(event).__name__}*"


def _entries(scheduled: ScheduledStep) -> str:
    entries = scheduled.step.entries
    columns = " | ".join(f"branch {entry.branch}" for entry in entries)
    rows = [
        f"| `{name}` | {' | '.join(_field(getattr(entry, name)) for entry in entries)} |"
        for name in Entry._fields
        if name not in ("request_id", "branch")
    ]
    return "\n".join([f"| field | {columns} |", "|---" * (len(entries) + 1) + "|", *rows])


def _field(value: object) -> str:
    if isinstance(value, SegmentRead):
        return f"pages {[*value.pages]}, filled to {value.length}"
    if isinstance(value, tuple) and value and isinstance(value[0], SegmentRead):
        return "; ".join(map(_field, value))
    return f"`{value}`"
