"""Every figure of the pages is that of its file, or stands in docs/claims/ as one that no file holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from docs.make.claims import Record, claims, over
from docs.make.figures import figures
from docs.make.stale import claimed, compared, main, pages


def test_the_figures_of_the_pages_are_those_of_their_files() -> None:
    wrong = "\n".join(map(str, compared(pages(), claimed())))
    assert not wrong, f"`make figures` mends what a file holds; docs/claims/README.md says more.\n{wrong}"


def test_another_digit_in_any_figure_is_noticed() -> None:
    """Of every twentieth: that its claim has words enough, and covers it."""
    texts, listed = pages(), claimed()
    every = [(page, end) for page, text in texts.items() for _, end in figures(text)]
    assert len(every) > 1000
    for page, end in every[::20]:
        text = texts[page]
        other = text[: end - 1] + str((int(text[end - 1]) + 3) % 10) + text[end:]
        own = [claim for claim in listed if claim.page == page]
        assert any(compared({page: other}, own)), f"{page}: {text[end - 40 : end]}"


def found(text: str) -> list[str]:
    return [text[begin:end] for begin, end in figures(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It takes 22.7 ms, or 3 to 5 s.", ["22.7", "3", "5"]),
        ("It takes 5ms, 16GB and 3x more.", ["5", "16", "3"]),
        ("3, 4 and 5 % of 272,000", ["3", "4", "5", "272,000"]),
        ("30\N{NO-BREAK SPACE}% in 4 \N{MULTIPLICATION SIGN} 8 rows, 1.5e-2", ["30", "1.5"]),
        ("all 40 of 64 are there", ["40", "64"]),
        ("| 8 rows | 12 | **7 / 9** | a 3 |", ["12", "7", "9"]),
        ("| 8 rows | \N{MINUS SIGN}20 % | +3 |", ["20", "3"]),
        ("![At 99 %](16.5.png) and [4.5](7.5.md)", ["99", "4.5"]),
        ("64 requests in 9 s", ["9"]),
    ],
)
def test_a_figure_is_a_number_with_a_unit_a_point_or_a_cell(text: str, expected: list[str]) -> None:
    assert found(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "jax 0.11.2 and Python 3.12",
        "`--rate 2.4`",
        "```\n5 ms\n```",
        "## 5 ms",
        "at 127.0.0.1:50051",
        "Qwen2.5",
    ],
)
def test_code_headings_versions_and_names_have_no_figures(text: str) -> None:
    assert found(text) == []


CLAIMS = """\
# page.md

## run.json as run
a step takes {run.step_ms:.1f} ms
for row in run.rows:
    | {row.name!s} | {row.tokens:,} |

## run*.json as runs
bias of {runs[0].bias:+.1f} %

## none: by hand
some 40 s

## not measured: a default
within 5 s
"""
PAGE = """\
# Page

Here a step takes 20.1 ms, with a bias of \N{MINUS SIGN}0.5 %. It is ready after some 40 s, within 5 s.

| a | 1,000 |
| b | 2 |
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project of one page and one result."""
    (tmp_path / "docs/claims").mkdir(parents=True)
    (tmp_path / "bench/results").mkdir(parents=True)
    (tmp_path / "page.md").write_text(PAGE)
    (tmp_path / "docs/claims/page.txt").write_text(CLAIMS)
    measured(tmp_path, 20.12)
    return tmp_path


def measured(root: Path, step_ms: float, tokens: int = 1000) -> None:
    rows = [{"name": "a", "tokens": tokens}, {"name": "b", "tokens": 2}]
    result = {"step_ms": step_ms, "bias": -0.5, "rows": rows}
    (root / "bench/results/run.json").write_text(json.dumps(result))


def wrong(root: Path, text: str) -> list[str]:
    """What is said of a page with this text."""
    return [each.what for each in compared({"page.md": text}, claimed(root))]


def test_a_page_that_says_what_its_files_say_is_right(root: Path) -> None:
    assert wrong(root, PAGE) == []


@pytest.mark.parametrize(
    ("right", "planted", "said"),
    [
        ("20.1 ms", "20.2 ms", "`run.json` says something else (docs/claims/page.txt:4)"),
        ("1,000", "1,001", "docs/claims/page.txt:6"),
        ("\N{MINUS SIGN}0.5 %", "+0.5 %", "docs/claims/page.txt:9"),
        ("40 s", "41 s", "docs/claims/page.txt:12 has another figure, and no file holds it"),
        ("5 s", "6 s", "docs/claims/page.txt:15"),
        ("a step takes 20.1 ms", "a step of 20.1 ms", "does not have what docs/claims/page.txt:4 says"),
        ("It is", "It took 7 s, and is", "docs/claims/ does not say where '7' is from"),
        ("| 2 |", "| 2 | 3 |", "docs/claims/ does not say where '3' is from"),
    ],
)
def test_a_wrong_figure_is_named_with_its_place(root: Path, right: str, planted: str, said: str) -> None:
    assert PAGE.count(right) == 1
    assert said in wrong(root, PAGE.replace(right, planted))[0]


def test_what_is_measured_again_is_mended_and_what_no_file_holds_is_not(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_hand = PAGE.replace("40 s", "41 s")
    (root / "page.md").write_text(by_hand)
    measured(root, 23.46, 1234)
    assert main([], root)
    assert "  - a step takes 20.1 ms\n  + a step takes 23.5 ms" in capsys.readouterr().out
    assert (root / "page.md").read_text() == by_hand
    assert main(["--write"], root), "what is by hand is not mended"
    assert (root / "page.md").read_text() == by_hand.replace("20.1", "23.5").replace("1,000", "1,234")
    (root / "page.md").write_text(PAGE)
    assert not main(["--write"], root)
    assert not main([], root)


def test_rows_with_the_same_label_are_told_apart_by_their_order(root: Path) -> None:
    (root / "docs/claims/page.txt").write_text(
        "# page.md\n## run.json as run\nfor row in run.rows:\n    | same | {row.tokens} |\n"
    )
    said = [
        (each.span, each.new) for each in compared({"page.md": "| same | 7 |\n| same | 8 |\n"}, claimed(root))
    ]
    assert said == [((0, 12), "| same | 1000 |"), ((13, 25), "| same | 2 |")]


def test_what_stands_above_the_sections_of_a_page_is_for_all_of_them_and_no_other_page(root: Path) -> None:
    section = "## run.json as run\na step takes {ms(run.step_ms)}\n"
    text = f"# page.md\nms = lambda value: f'{{value:.1f}} ms'\n{section}{section}"
    file = root / "docs/claims/page.txt"
    file.write_text(text)
    assert [each.text for each in claimed(root)] == ["a step takes 20.1 ms"] * 2
    file.write_text(f"{text}# other.md\n{section}")
    with pytest.raises(ValueError, match=r"page\.txt:9: NameError"):
        claimed(root)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# page.md\n## run.json as run\n\na {run.stop_ms} ms\n", "page.txt:4: AttributeError"),
        ("# page.md\n## gone.json as gone\n", "no file gone.json"),
        ("# page.md\n## run.json as run\n5 ms\n", "nothing is put in"),
        ("# page.md\n## somewhere\n", "a heading says"),
        ("# page.md\n5 ms\n", "no heading above it"),
        ("# page.md\n## run.json as run\n    {run.step_ms} ms\n", "no loop above"),
        ("# page.md\n## run.json as run\n{only(run.rows, name='c').tokens}\n", "0 records with"),
    ],
)
def test_a_claim_that_cannot_be_computed_is_named_with_its_line(root: Path, text: str, said: str) -> None:
    (root / "docs/claims/page.txt").write_text(text)
    with pytest.raises(ValueError, match=r"docs/claims/page\.txt:\d") as error:
        claims(root / "docs/claims", root / "bench/results")
    assert said in str(error.value)


def test_taper_is_over_another_policy_by_the_seeds_that_both_have() -> None:
    figures = {("taper", 1): 6.0, ("taper", 2): 3.0, ("taper", 3): 90.0, ("off", 2): 1.0, ("off", 1): 2.0}
    rows = [Record(policy=policy, seed=seed, tokens=value) for (policy, seed), value in figures.items()]
    assert over([Record(rows=rows[:2]), Record(rows=rows[2:])], "off", "tokens") == 3.0


def test_a_claim_about_a_page_that_is_not_there_is_named(root: Path) -> None:
    assert [str(each) for each in compared({}, claimed(root))] == [
        "page.md: there is no such page (docs/claims/page.txt:4)"
    ]
