"""The tags by which models open, close and join branches of their own; some sets are known by name."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.outline import Numbered, Outline


@dataclass(frozen=True, slots=True, kw_only=True)
class TagGrammar:
    """The tags with which a model opens and closes branches of its own (Multiverse, NPR and their like).

    When `plan_close` is generated, each `outline` after the last `plan_open` becomes a branch that begins
    with `branch_open`, where `{label}` is replaced, and ends with `branch_close`. When all have ended, the
    parent goes on after `join_open`.
    """

    name: str
    plan_open: str
    outline: Outline
    plan_close: str
    branch_open: str
    branch_close: str
    join_open: str
    join: str = "kv"


MULTIVERSE = TagGrammar(
    name="multiverse",
    plan_open="<Goal>",
    outline=Numbered("<Outline>", ":", r"\d+(?:\.\d+)*"),
    plan_close="</Goal>",
    branch_open="\n<Path>\n{label}:",
    branch_close="</Path>",
    join_open="\n<Conclusion>\n",
)

# Native Parallel Reasoner (arXiv 2512.07461): Multiverse's mechanics in its own words, one level deep.
NPR = TagGrammar(
    name="npr",
    plan_open="<guideline>",
    outline=Numbered("<plan>", ":"),
    plan_close="</guideline>",
    branch_open="\n<step>\n{label}:",
    branch_close="</step>",
    join_open="\n<takeaway>\n",
)

# ThreadWeaver (github.com/facebookresearch/threadweaver): an ordinary model, which reads its threads again
# and closes the block by itself. Its own rollouts have no line break between two threads.
THREADWEAVER = TagGrammar(
    name="threadweaver",
    plan_open="<Outlines>",
    outline=Numbered("<Outline>", ":"),
    plan_close="</Outlines>",
    branch_open="\n<Thread>\n{label}:",
    branch_close="</Thread>",
    join_open="\n",
    join="reprefill",
)

GRAMMARS = {grammar.name: grammar for grammar in (MULTIVERSE, NPR, THREADWEAVER)}
