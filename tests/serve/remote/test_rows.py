"""News cross between processes as they are, plain tokens and all others, in their order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scheduler.events import TokenEmitted, WidthChanged
from scheduler.step import Sample
from serve.door import Failed, News, Refused
from serve.remote.rows import pack, unpack

NAMES = {0: "r", 1: "s", 2**40: "t"}

counts = st.integers(0, 2**31)
samples = st.builds(
    Sample,
    counts,
    logprob=st.none() | st.floats(max_value=0.0, allow_nan=False),
    top=st.just(()) | st.tuples(st.tuples(counts, st.just(-1.0))),
)


def news_of(name: str) -> st.SearchStrategy[News]:
    return st.one_of(
        st.builds(TokenEmitted, st.just(name), counts, samples, counts),
        st.builds(WidthChanged, st.just(name), counts, counts),
        st.just(Refused("QUEUE_FULL", "not now")),
        st.just(Failed("gone")),
    )


@st.composite
def batches(draw: st.DrawFn) -> list[tuple[int, list[News]]]:
    handles = draw(st.lists(st.sampled_from([*NAMES]), max_size=6))
    return [(handle, draw(st.lists(news_of(NAMES[handle]), min_size=1, max_size=5))) for handle in handles]


@given(batches())
def test_what_is_packed_comes_out_by_handle_and_in_order(told: list[tuple[int, list[News]]]) -> None:
    expected: dict[int, list[News]] = {}
    for handle, news in told:
        expected.setdefault(handle, []).extend(news)
    assert unpack(pack(told), NAMES) == expected


@given(batches(), st.sampled_from([*NAMES]))
def test_what_has_been_forgotten_is_dropped(told: list[tuple[int, list[News]]], forgotten: int) -> None:
    known = {handle: name for handle, name in NAMES.items() if handle != forgotten}
    assert unpack(pack(told), known) == unpack(pack([each for each in told if each[0] in known]), NAMES)


def test_a_plain_token_costs_no_object() -> None:
    plain = TokenEmitted("r", 3, Sample(7), 5)
    told = TokenEmitted("r", 3, Sample(7, -0.5), 6)
    packed = pack([(0, [plain, told])])
    assert packed.rare == (told,)
    assert len(packed.data) == 2 * 4 * 8
