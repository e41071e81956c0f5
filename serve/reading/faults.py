"""What is wrong with a message: every fault by its field's path, found before anything is done.

Nothing is silently clamped or dropped: a field that this server does not know is refused by its number, an id
outside of the vocabulary by its place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from scheduler.sampling import fault_of_number
from serve.served import ServedModel
from taper_client.errors import InvalidRequestError, Violation

MAX_VIOLATIONS = 20  # of one message that are told apart; further ones are counted
_LONG = 16  # characters of a token, of which hardly any has as many
MAX_UNKNOWN_BYTES = 4096  # of unknown fields of one message that are told apart

_NEED_TEXT = {
    ("Prompt", "text"),
    ("Prompt", "chat"),
    ("Prefix", "text"),
    ("StoppingCriteria", "stop"),
    ("GenerateRequest", "model_driven"),
    ("DetokenizeRequest", "token_ids"),
}


class Faults:
    """The faults of one message so far. Whoever finds one goes on with something usable."""

    def __init__(self, message: Message, model: ServedModel) -> None:
        self.model = model
        self._violations: list[Violation] = []  # the first of them
        self._count = 0
        self._exceeded: dict[str, dict[str, str]] = {}  # limit and got, by the reason that names the limit
        self.extend(unknown_fields(message))

    def __len__(self) -> int:
        return self._count

    def add(self, path: str, description: str) -> None:
        self.extend([Violation(path, description)])

    def extend(self, violations: Iterable[Violation]) -> None:
        for violation in violations:
            self._count += 1
            if len(self._violations) < MAX_VIOLATIONS:
                self._violations.append(violation)

    def raise_any(self) -> None:
        """Raises InvalidRequestError with all of them, if there are any."""
        if self._violations:
            reason, numbers = next(iter(self._exceeded.items()), ("", {}))
            raise InvalidRequestError.of(self._violations, reason=reason, metadata=numbers, count=self._count)

    # --- checks that several parts of a message share --------------------------------------------------

    def ids(self, ids: Collection[int], path: str) -> list[int]:
        """Token ids, each of which must be in the vocabulary. More than a context holds are not looked at."""
        if len(ids) > self.model.max_context:
            self.check_room(len(ids), path)
            return []
        shown = [*islice(check_ids(ids, self.model, path), MAX_VIOLATIONS)]
        self.extend(shown)
        if len(shown) == MAX_VIOLATIONS:
            self._count += sum(token >= self.model.vocab_size for token in ids) - len(shown)
        return list(ids)

    def size(self, text: str, path: str, most: int) -> str:
        """A text of at most `most` bytes, or nothing."""
        if len(text) > most or len(text.encode()) > most:
            self.add(path, f"at most {most} bytes are possible")
            return ""
        return text

    def encoded(self, encode: Callable[[str], list[int]], text: str, path: str) -> list[int]:
        """The ids of a text: a tokenizer can have tokens that the model has no row for.

        Of a text that is longer than any other, the beginning is looked at first: it may be too long already.
        """
        most = self.model.max_context
        begun = text[: _LONG * most]
        if len(text) > 2 * len(begun) and (tokens := len(encode(begun))) > 2 * most:
            self.check_room(tokens, path.rpartition(".")[0])
            return []
        ids = encode(text)
        beyond = max(ids, default=0)
        if beyond >= self.model.vocab_size:
            size = self.model.vocab_size
            self.add(path, f"its token {beyond} is not less than {size}, the vocabulary of the model")
        return ids

    def number(
        self, message: Message, name: str, path: str, default: float, low: float, high: float
    ) -> float:
        """A field that may be left out, and must be in [low, high]."""
        if not message.HasField(name):
            return default
        value = getattr(message, name)
        if fault := fault_of_number(value, low, high):
            self.add(f"{path}.{name}", fault)
            return default
        return value

    def check_room(self, tokens: int, path: str) -> None:
        """One position has to be left for the answer."""
        limit = self.model.max_context - 1
        if tokens > limit and "PROMPT_TOO_LONG" not in self._exceeded:
            self._exceeded["PROMPT_TOO_LONG"] = {"limit": str(limit), "got": str(tokens)}
            self.add(path, f"the context would hold {tokens} given tokens, and at most {limit} are possible")

    def below_floor(self, path: str, least: float, got: float) -> None:
        """A TPOT target, in milliseconds, that nobody could be promised."""
        self._exceeded["SLO_BELOW_FLOOR"] = {"limit": f"{least:.6g}", "got": f"{got:.6g}"}
        self.add(
            path, f"this server can keep {least:.6g} ms at the least; or ask for best effort with slo.on_miss"
        )


def check_model(name: str, model: ServedModel) -> Iterator[Violation]:
    """A violation unless `name` is the served model's, or empty."""
    if name not in ("", model.name):
        yield Violation("model", f"this server serves {model.name!r}, not {name!r}")


def check_ids(ids: Iterable[int], model: ServedModel, path: str) -> Iterator[Violation]:
    """A violation for each id outside of the vocabulary: a gather would silently read another row."""
    for index, token in enumerate(ids):
        if token >= model.vocab_size:
            yield Violation(
                f"{path}[{index}]", f"{token} is not less than {model.vocab_size}, the vocabulary"
            )


def refuse_text(message: Message, model: ServedModel, path: str = "") -> None:
    """Raises InvalidRequestError naming all fields that need a tokenizer, where the model has none."""
    if not model.supports_text and (found := [*islice(_text_fields(message, path), MAX_VIOLATIONS)]):
        raise InvalidRequestError.of(found)


def _text_fields(message: Message, path: str) -> Iterator[Violation]:
    reasons = {"DetokenizeRequest": "this model has no tokenizer: its ids have no text"}
    reason = reasons.get(message.DESCRIPTOR.name, "this model has no tokenizer: only token ids can be sent")
    for descriptor, value in message.ListFields():
        name = f"{path}.{descriptor.name}" if path else descriptor.name
        if (message.DESCRIPTOR.name, descriptor.name) in _NEED_TEXT:
            yield Violation(name, reason)
        elif isinstance(value, Message):
            yield from _text_fields(value, name)
        elif descriptor.message_type and not descriptor.message_type.GetOptions().map_entry:
            for index, item in enumerate(value):
                yield from _text_fields(item, f"{name}[{index}]")


def unknown_fields(message: Message) -> Iterator[Violation]:
    """A violation for each field that this server's schema does not have; one for all if they are many."""
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    unknown = message.ByteSize() - known.ByteSize()
    if unknown > MAX_UNKNOWN_BYTES:
        yield Violation("", f"this server does not know fields that make up {unknown} bytes of the message")
    elif unknown:
        yield from _unknown_fields(message, "")


def _unknown_fields(message: Message, path: str) -> Iterator[Violation]:
    for unknown in UnknownFieldSet(message):
        name = f"{path}.{unknown.field_number}" if path else str(unknown.field_number)
        yield Violation(name, "this server does not know the field with this number")
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None or descriptor.message_type.GetOptions().map_entry:
            continue
        name = f"{path}.{descriptor.name}" if path else descriptor.name
        if isinstance(value, Message):
            yield from _unknown_fields(value, name)
        else:
            for index, item in enumerate(value):
                yield from _unknown_fields(item, f"{name}[{index}]")
