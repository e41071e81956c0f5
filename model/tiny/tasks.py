"""What the default model was taught: questions with independent parts, and the exact right answers.

A question asks for the same thing of one to eight items, and for a conclusion from all of the results. The
answer works on each item in a branch of its own; a question about one item is answered in one piece. Every
question follows from (seed, index) alone, so that a model's accuracy on held-out questions can be measured
again anywhere.
"""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

_WORDS = """
ox go at us me we he it no up in on by
cat dog sun owl fox bee cow hen ant bat cup hat jar key log map net oak pea rug saw toy van web yak zoo
tree lake moon fish bird frog goat lamb lion wolf bear deer duck crab boat bell book bowl cake card coat
desk door drum fern fire flag fork gate gold hill iron kite lamp leaf milk nest palm pear pond rain ring
road rock roof rope rose salt sand seed ship shoe silk snow soap sock soup star swan tent vine wave wind
apple beach berry bread brick brush cabin camel candy cedar chair chalk cheek chess cloud clock coral
couch crane cream crown daisy dress eagle earth feast field flame flute frost fruit ghost glass globe
grape grass heart honey horse hotel house juice knife lemon light maple melon metal mouse music night
ocean olive onion paint paper peach pearl piano pilot plant plate queen radio river robin salad scarf
shark sheep shell shirt skirt snail snake spoon stone storm sugar table tiger toast torch tower train
truck tulip water whale wheat zebra
anchor banana barrel basket beaver bottle branch bridge bucket butter button candle canyon carpet carrot
castle cherry circle cotton desert dragon engine falcon feather fiddle flower forest garden ginger guitar
hammer harbor island jacket jungle kitten ladder lizard magnet marble market meadow mirror monkey needle
orange oyster parrot pebble pencil pepper pigeon pillow planet pocket potato puppet rabbit ribbon rocket
saddle salmon school shadow silver spider spring statue summer temple ticket timber tomato tunnel turtle
valley velvet violin walnut window winter wizard yogurt
balloon blanket cabbage captain cricket curtain diamond dolphin emerald evening gallery giraffe harvest
journey kitchen lantern library machine morning mustard octopus orchard panther peacock penguin popcorn
pumpkin raccoon rainbow sailor sparrow station sunrise teacher thunder tractor trumpet village volcano
walrus whistle
airplane backpack bathroom birthday broccoli calendar campfire computer cucumber daughter dinosaur
elephant envelope festival firewood flamingo goldfish hedgehog hospital keyboard kangaroo lavender
mountain mushroom necklace notebook painting porridge sandwich scorpion seashell squirrel starfish
sunlight treasure triangle umbrella vineyard
alligator asparagus blackbird blueberry breakfast butterfly chameleon chocolate crocodile dragonfly
fireplace jellyfish limestone marmalade newspaper nightfall orangutan parachute pineapple porcupine
raspberry riverbank snowflake spaghetti sunflower telescope waterfall whirlpool
basketball blackberry earthquake everything chimpanzee lighthouse microscope strawberry televisions
thermometer grasshopper helicopters marshmallow hummingbird caterpillar cauliflower rhinoceros
"""
WORDS = tuple(_WORDS.split())


def reserved(word: str) -> bool:
    """Whether training never shows the word: every fifth one, by its checksum."""
    return zlib.crc32(word.encode()) % 5 == 0


@dataclass(frozen=True, slots=True)
class Fork:
    """Branches by label; what follows in the answer sees all of them."""

    branches: Mapping[str, Answer]


Answer = tuple[str | Fork, ...]
"""What the model says: text of its own, interrupted by forks. The server's own text is not part of it."""


@dataclass(frozen=True, slots=True)
class Task:
    """A question, its kind (for reports), and the right answer."""

    kind: str
    question: str
    answer: Answer


def transcript(answer: Answer, name: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """Everything that each branch says, by its labels from the trunk, (): what a served answer must equal."""
    said = {name: "".join(part for part in answer if isinstance(part, str))}
    for part in answer:
        if isinstance(part, Fork):
            for label, branch in part.branches.items():
                said |= transcript(branch, (*name, label))
    return said


# --- what is asked of one item -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One item's work: the text that shows it, and its result."""

    work: str
    result: str


def _spell(letters: Iterable[tuple[int, str]]) -> str:
    return " ".join(f"{letter}{number}" for number, letter in letters)


def _reverse(word: str) -> Step:
    letters = list(enumerate(word, 1))
    return Step(f"{word}: {_spell(letters)} -> {_spell(letters[::-1])}", word[::-1])


def _sort(word: str) -> Step:
    letters = list(enumerate(word, 1))
    ordered = sorted(letters, key=lambda letter: letter[1])
    return Step(f"{word}: {_spell(letters)} -> {_spell(ordered)}", "".join(sorted(word)))


def _count(word: str) -> Step:
    return Step(f"{word}: {_spell(enumerate(word, 1))}", str(len(word)))


def _vowels(word: str) -> Step:
    seen = [sum(letter in "aeiou" for letter in word[: end + 1]) for end in range(len(word))]
    return Step(f"{word}: {_spell(zip(seen, word, strict=True))}", str(seen[-1]))


def _uppercase(word: str) -> Step:
    return Step(word, word.upper())


def _add(sum_: str) -> Step:
    first, second = sum_.split("+")
    return Step(sum_, str(int(first) + int(second)))


@dataclass(frozen=True, slots=True)
class Operation:
    """How it is asked of several items, of one, and as one of several orders; and how it is done."""

    do: Callable[[str], Step]
    many: tuple[str, ...]
    one: tuple[str, ...]
    order: str


OPERATIONS = {
    "reverse": Operation(
        _reverse,
        ("Reverse each word: {}.", "Reverse these words: {}.", "Write each word backwards: {}."),
        ("Reverse the word {}.", "Write {} backwards."),
        "reverse {}",
    ),
    "sort": Operation(
        _sort,
        ("Sort the letters of each word: {}.", "Put the letters of each word in order: {}."),
        ("Sort the letters of {}.",),
        "sort {}",
    ),
    "count": Operation(
        _count,
        ("Count the letters of each word: {}.", "How many letters are in each word: {}?"),
        ("Count the letters of {}.", "How many letters are in {}?"),
        "count {}",
    ),
    "vowels": Operation(
        _vowels,
        ("Count the vowels of each word: {}.", "How many vowels are in each word: {}?"),
        ("Count the vowels of {}.", "How many vowels are in {}?"),
        "count vowels of {}",
    ),
    "uppercase": Operation(
        _uppercase,
        ("Uppercase each word: {}.", "Write each word in capitals: {}."),
        ("Uppercase the word {}.", "Write {} in capitals."),
        "uppercase {}",
    ),
    "add": Operation(_add, ("Add: {}.", "Work out each sum: {}."), ("What is {}?",), "add {}"),
}
LOOK_UP = ("Look up: {}.", "Look up each of these: {}.")
MOST_LISTED = 12
TABLES = ("Prices", "Ages", "Scores", "Table")


# --- what is asked of all results --------------------------------------------------------------------------

CONCLUSIONS = {
    "list": ("", " Then list the results."),
    "longest": (" Then say which result is longest.", " Which result is longest?"),
    "total": (" Then give the total.", " What is the total?"),
    "largest": (" Then say which is largest.", " Which is largest?"),
    "odd": (" Then say which is the odd one out.", " Which is the odd one out?"),
}

CHOICES = {
    **dict.fromkeys(("reverse", "sort"), ("list", "longest")),
    **dict.fromkeys(("vowels", "add"), ("list", "total", "largest")),
    **dict.fromkeys(("count", "look up"), ("list", "total", "largest", "odd")),
    "uppercase": ("list",),
}


def _conclude(conclusion: str, items: Sequence[str], results: Sequence[str]) -> Step:
    """The conclusion's text: the results, numbers by their items, then what follows from them.

    Where results are compared or summed, the figure so far stands in brackets.
    """
    numeric = all(result.isdigit() for result in results)
    shown = [f"{item} = {result}" if numeric else result for item, result in zip(items, results, strict=True)]
    if conclusion == "list":
        return Step("", ", ".join(shown))
    if conclusion == "odd":
        odd = next(i for i, result in enumerate(results) if results.count(result) == 1)
        shown[odd] += " (odd)"
        return Step(f"mostly {results[odd - 1]}; {', '.join(shown)}; odd one out ", items[odd])
    running, best = 0, 0
    for index, result in enumerate(results):
        figure = len(result) if conclusion == "longest" else int(result)
        if conclusion == "total":
            running += figure
        elif figure > running:
            running, best = figure, index
        shown[index] += f" {figure} ({running})" if conclusion == "longest" else f" ({running})"
    answer = {"longest": results[best], "total": str(running), "largest": items[best]}[conclusion]
    return Step(", ".join(shown) + f"; {conclusion} ", answer)


def _clear(conclusion: str, results: Sequence[str]) -> bool:
    """Whether exactly one answer is right."""
    if conclusion in ("longest", "largest"):
        figures = [len(result) if conclusion == "longest" else int(result) for result in results]
        return figures.count(max(figures)) == 1
    if conclusion == "odd":
        return len(results) > 2 and sorted(results.count(r) for r in set(results)) == [1, len(results) - 1]
    return True


# --- answers -----------------------------------------------------------------------------------------------


def _said(step: Step) -> str:
    return f"{step.work} = {step.result}"


def _fork(outlines: Sequence[str], branches: Sequence[Answer], conclusion: str, group: str = "") -> Answer:
    labels = [f"{group}{number}" for number in range(1, len(outlines) + 1)]
    plan = "".join(
        f"<Outline>{label}: {outline}</Outline>" for label, outline in zip(labels, outlines, strict=True)
    )
    return (
        f"<Parallel><Goal>{plan}</Goal>",
        Fork(dict(zip(labels, branches, strict=True))),
        f"{conclusion}</Conclusion></Parallel>",
    )


def _each(items: Sequence[str], steps: Sequence[Step], conclusion: Step, group: str = "") -> Answer:
    branches = [(f" {_said(step)}</Path>",) for step in steps]
    return _fork(items, branches, conclusion.work + conclusion.result, group)


# --- questions ---------------------------------------------------------------------------------------------


class _Author:
    """Writes one question, drawing everything from one generator."""

    def __init__(self, seed: int, index: int, held_out: bool) -> None:
        self._random = random.Random(f"{seed}:{index}")
        self._held_out = held_out

    def write(self) -> Task:
        kinds = {"reverse": 14, "sort": 15, "count": 11, "vowels": 11, "uppercase": 6, "add": 9}
        kinds |= {"look up": 14, "mixed": 8, "nested": 12, "serial": 8}
        kind = self._random.choices(list(kinds), list(kinds.values()))[0]
        match kind:
            case "look up":
                return self._look_up()
            case "mixed":
                return self._mixed()
            case "nested":
                return self._nested()
            case "serial":
                return self._serial()
        return self._plain(kind)

    def _plain(self, kind: str) -> Task:
        operation = OPERATIONS[kind]
        conclusion = self._conclusion(kind)
        count = self._random.randint(3 if conclusion == "odd" else 2, 8)
        items, steps = self._items(kind, count, conclusion)
        question = self._random.choice(operation.many).format(self._listed(items))
        question += self._random.choice(CONCLUSIONS[conclusion])
        end = _conclude(conclusion, items, [step.result for step in steps])
        return Task(kind, question, _each(items, steps, end))

    def _look_up(self) -> Task:
        conclusion = self._conclusion("look up")
        count = self._random.randint(3 if conclusion == "odd" else 2, 8)
        items = self._words(count)
        while True:
            results = [str(self._random.randint(1, MOST_LISTED)) for _ in items]
            if conclusion == "odd":
                results = [results[0]] * count
                results[self._random.randrange(count)] = str(self._random.randint(1, MOST_LISTED))
            if _clear(conclusion, results):
                break
        table = list(zip(items, results, strict=True))
        others = [word for word in self._words(self._random.randint(1, 3)) if word not in items]
        table += [(word, str(self._random.randint(1, MOST_LISTED))) for word in others]
        self._random.shuffle(table)
        question = f"{self._random.choice(TABLES)}: {', '.join(f'{word} {value}' for word, value in table)}. "
        question += self._random.choice(LOOK_UP).format(self._listed(items))
        question += self._random.choice(CONCLUSIONS[conclusion])
        steps = [Step(item, result) for item, result in zip(items, results, strict=True)]
        return Task("look up", question, _each(items, steps, _conclude(conclusion, items, results)))

    def _mixed(self) -> Task:
        kinds = [self._random.choice(list(OPERATIONS)) for _ in range(self._random.randint(2, 8))]
        drawn = [self._items(kind, 1, "list") for kind in kinds]
        orders = [
            OPERATIONS[kind].order.format(items[0]) for kind, (items, _) in zip(kinds, drawn, strict=True)
        ]
        steps = [step for _, (step,) in drawn]
        end = Step("", ", ".join(f"{number}: {step.result}" for number, step in enumerate(steps, 1)))
        return Task("mixed", f"Do each of these: {self._listed(orders)}.", _each(orders, steps, end))

    def _nested(self) -> Task:
        kind = self._random.choice(list(OPERATIONS))
        conclusion = self._random.choice([c for c in CHOICES[kind] if c in ("list", "longest", "total")])
        groups = string.ascii_uppercase[: self._random.randint(2, 3)]
        while True:
            drawn = [
                self._items(kind, self._random.randint(2, 5 - len(groups)), conclusion, 7) for _ in groups
            ]
            inner = [_conclude(conclusion, items, [s.result for s in steps]) for items, steps in drawn]
            if _clear(conclusion, [end.result for end in inner]):
                break
        outlines = [f"group {group}" for group in groups]
        branches: list[Answer] = []
        for number, (outline, (items, steps), end) in enumerate(zip(outlines, drawn, inner, strict=True), 1):
            branches.append(
                (f" {outline}: ", *_each(items, steps, end, f"{number}."), f" = {end.result}</Path>")
            )
        end = _conclude(conclusion, outlines, [end.result for end in inner])
        if conclusion == "list":
            end = Step("", "; ".join(step.result for step in inner))
        lists = [f"Group {g}: {', '.join(items)}." for g, (items, _) in zip(groups, drawn, strict=True)]
        order = self._random.choice(OPERATIONS[kind].many).replace(": {}", "")
        question = " ".join((*lists, order)) + self._random.choice(CONCLUSIONS[conclusion])
        return Task("nested", question, _fork(outlines, branches, end.work + end.result))

    def _serial(self) -> Task:
        if self._random.random() < 0.15:
            question, answer = self._random.choice(SMALL_TALK)
            return Task("serial", question, (answer,))
        kind = self._random.choice(list(OPERATIONS))
        (item,), (step,) = self._items(kind, 1, "list")
        operation = OPERATIONS[kind]
        question = self._random.choice((*operation.one, *operation.many)).format(item)
        return Task("serial", question, (_said(step),))

    # --- parts of a question

    def _listed(self, items: Sequence[str]) -> str:
        last = self._random.choice((", ", ", ", " and "))
        return ", ".join(items[:-1]) + last + items[-1]

    def _conclusion(self, kind: str) -> str:
        return self._random.choice(CHOICES[kind])

    def _items(self, kind: str, count: int, conclusion: str, most: int = 12) -> tuple[list[str], list[Step]]:
        """Items whose results have a clear conclusion."""
        while True:
            if kind == "add":
                items = self._sums(count, 6 if conclusion == "total" else 49)
            elif conclusion == "odd":
                items = self._words_but_one_of_a_length(count)
            else:
                items = self._words(count, most)
            steps = [OPERATIONS[kind].do(item) for item in items]
            if _clear(conclusion, [step.result for step in steps]):
                return items, steps

    def _sums(self, count: int, most: int) -> list[str]:
        """Different sums of two numbers up to `most`."""
        pairs = self._random.sample(range(most * most), count)
        return [f"{pair // most + 1}+{pair % most + 1}" for pair in pairs]

    def _words(self, count: int, most: int = 12) -> list[str]:
        """Different words of up to `most` letters; now and then one that is much longer than the rest."""
        most = most if count < 5 else 7
        if self._random.random() < 0.2:
            lengths = [self._random.randint(2, 3) for _ in range(count)]
            lengths[self._random.randrange(count)] = self._random.randint(7, 12)
        else:
            lengths = [self._random.randint(2, most) for _ in range(count)]
        return self._different(lengths)

    def _words_but_one_of_a_length(self, count: int) -> list[str]:
        lengths = [self._random.randint(3, 7)] * count
        lengths[self._random.randrange(count)] = self._random.randint(2, 8)
        return self._different(lengths)

    def _different(self, lengths: Sequence[int]) -> list[str]:
        words: list[str] = []
        for length in lengths:
            word = self._word(length)
            while word in words:
                word = self._word(length)
            words.append(word)
        return words

    def _word(self, length: int) -> str:
        """Half real words, half letters at random; reserved ones only in held-out questions."""
        real = [word for word in _BY_LENGTH.get(length, ()) if self._held_out or not reserved(word)]
        if self._held_out and self._random.random() < 0.5:
            real = [word for word in real if reserved(word)] or real
        if real and self._random.random() < 0.5:
            return self._random.choice(real)
        while True:
            word = "".join(self._random.choices(string.ascii_lowercase, k=length))
            if self._held_out or not reserved(word):
                return word


_BY_LENGTH = {length: [word for word in WORDS if len(word) == length] for length in range(1, 13)}

SMALL_TALK = (
    ("Hello!", "Hello! Ask me to reverse, sort, count, add or look up some things."),
    ("Who are you?", "I am a tiny model that works on the parts of a question at once."),
    ("What can you do?", "I reverse, sort, count, uppercase, add and look up, several items at once."),
)


def write_task(seed: int, index: int, *, held_out: bool = False) -> Task:
    """Question number `index` of a seed. Training uses `held_out=False` only, and other seeds."""
    return _Author(seed, index, held_out).write()
