"""The pages that are made from the code, and those that name its files and words."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from docs.make.pages import pages
from taper_client.errors import RETRY_AFTER

ROOT = Path(__file__).parents[1]


def test_the_pages_that_are_made_from_the_code_are_those_of_the_code() -> None:
    stale = [path.name for path, text in pages().items() if path.read_text() != text]
    assert stale == [], "`make pages` makes them anew"


def test_the_files_that_a_request_passes_exist() -> None:
    page = (ROOT / "docs/life-of-a-request.md").read_text()
    named = re.findall(r"`((?:attention|docs|model|scheduler|serve)/[\w/]*(?:\.py)?)`", page)
    assert len(named) > 40
    assert [file for file in named if not (ROOT / file).exists()] == []


RECIPES = (
    "An attention backend",
    "An admission policy",
    "A sampling option",
    "An option of a stage",
    "An option of the server",
    "A model family",
    "A metric",
)


def test_there_is_a_recipe_for_each_kind_of_addition_and_its_files_exist() -> None:
    page = (ROOT / "docs/recipes.md").read_text()
    recipes = dict(re.findall(r"^## (.+?)\n(.+?)(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL))
    assert tuple(recipes) == RECIPES
    for name, recipe in recipes.items():
        files = [file for file in re.findall(r"`([\w/]+\.(?:py|proto))`", recipe) if "NAME" not in file]
        assert len(files) >= 3, name
        assert [file for file in files if not (ROOT / file).exists()] == [], name


def test_a_word_of_the_glossary_has_one_meaning() -> None:
    page = (ROOT / "docs/glossary.md").read_text()
    words = re.findall(r"^\| \*\*(.+?)\*\*", page, flags=re.MULTILINE)
    assert len(words) > 50
    assert Counter(words).most_common(1)[0][1] == 1
    named = re.findall(r"`((?:attention|scheduler|serve)[\w.]*)\.([A-Z]\w+)`", page)
    assert named
    for module, member in named:
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        assert f"class {member}" in source, f"{module}.{member}"


def test_every_reason_for_a_refusal_has_its_remedy() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    calls = page.partition("## An answer")[0]
    named = re.findall(r"`([A-Z][A-Z_]+)`", "\n".join(re.findall(r"^\| (.+?) \|", calls, re.MULTILINE)))
    assert sorted(named) == sorted(RETRY_AFTER)


def test_links_between_pages_lead_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/**/README.md")):
        if ".venv" in page.parts or "node_modules" in page.parts:
            continue
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#[^)]*)?\)", page.read_text()):
            path = page.parent / target if target else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor and path.suffix == ".md":
                headings = re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
                assert anchor[1:] in slugs, f"{page.name}: {target}{anchor}"


def test_the_files_that_hold_the_figures_exist() -> None:
    named = re.findall(r"`([\w*-]+\.json)`", (ROOT / "docs/results.md").read_text())
    assert len(named) > 5
    assert [name for name in named if not [*(ROOT / "bench/results").glob(name)]] == []


def readers() -> list[Path]:
    """Pages for readers: those of docs/, and what is made from the code."""
    return sorted(ROOT.glob("docs/**/*.md"))


def test_a_page_says_first_for_whom_it_is() -> None:
    for page in readers():
        title, paragraph, *_ = page.read_text().split("\n\n")
        assert title.startswith("# "), page.name
        assert paragraph.startswith("This page is for "), page.name


def test_pages_for_those_who_begin_are_a_screen_and_a_half() -> None:
    """Lines of 110 columns; words are what has a letter or a digit."""
    for name in ("quick-start", "plans", "best-of-n", "model-driven-forks", "streaming"):
        text = (ROOT / f"docs/{name}.md").read_text()
        lines = sum(-(-len(line) // 110) for line in text.splitlines())
        words = sum(any(map(str.isalnum, word)) for word in text.split())
        assert (lines <= 90, words <= 650) == (True, True), f"{name}: {lines} lines, {words} words"


def test_every_page_is_in_the_list_of_pages() -> None:
    """Once; those of the notebook are in its own."""
    for folder, below in (("docs", "reference/*.md"), ("docs/notebook", "*.md")):
        listing = ROOT / folder / "README.md"
        listed = Counter(re.findall(r"\]\(([^)#]*\.md)\)", listing.read_text().partition("\n| ")[2]))
        there = [
            page.relative_to(listing.parent)
            for page in {*listing.parent.glob("*.md")} | {*listing.parent.glob(below)}
        ]
        assert [page for page in map(str, there) if page != "README.md" and listed[page] != 1] == []
