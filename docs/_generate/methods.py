"""A page for every method: its card, its options, and what it reaches on the testbeds."""

from __future__ import annotations

import dataclasses
import inspect
import re
from functools import cache
from typing import Any

import figures
import results
from griffe import Docstring, DocstringSectionKind

import tokenprune as tp
from tokenprune import catalogue
from tokenprune.registry import strategies

STAGES = {
    "encoder": "`encoder`: inside the vision encoder",
    "pre_llm": "`pre_llm`: between projector and language model",
    "llm": "`llm`: between two decoder layers",
}


@cache
def classes() -> dict[str, type[Any]]:
    """The methods that are part of tokenprune, by name."""
    found = {name: strategies.get(name) for name in strategies.names()}
    return {name: cls for name, cls in found.items() if cls.__module__.startswith("tokenprune.")}


def pages() -> dict[str, str]:
    """Name and Markdown of every method's page."""
    return {name: _page(name, cls) for name, cls in classes().items()}


def table(_: str = "") -> str:
    """A Markdown table of all methods."""
    head = ["| method | paper | stage | signals | verified |", "|---|---|---|---|---|"]
    return "\n".join(
        head
        + [
            f"| [`{name}`]({name}.md) | {_paper(cls.card)} | `{cls.stage}` | {_signals(name)} "
            f"| {_verified(cls.card)} |"
            for name, cls in classes().items()
        ]
    )


def families(_: str = "") -> str:
    """A Markdown table: which method runs on which model family."""
    speaking = catalogue.families_by_method()
    rows = [["method", *(family.name for family in speaking)], ["---"] * (len(speaking) + 1)]
    rows += [
        [f"[`{name}`]({name}.md)", *(family.verdict(name) for family in speaking)]
        for name in classes()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def asking() -> dict[str, list[str]]:
    """Signal to links to the methods that ask for it with their default options."""
    found: dict[str, list[str]] = {}
    for name in classes():
        for signal in sorted({one.name for one in tp.create(name, retention=0.5).needs}):
            found.setdefault(signal, []).append(f"[`{name}`](methods/{name}.md)")
    return found


def _page(name: str, cls: type[Any]) -> str:
    card = cls.card
    facts = {
        "paper": _paper(card),
        "official code": _linked(card.code) or "none",
        "stage": STAGES[str(cls.stage)],
        "[signals](../signals.md)": _signals(name),
        "verified": _verified(card),
    }
    if cls.stage is not tp.Stage.LLM:
        facts["[count](../glossary.md#compression)"] = _count(name)
    text, options = _described(cls)
    parts = [
        f"# {name}",
        text,
        "| | |\n|---|---|\n" + "\n".join(f"| {what} | {value} |" for what, value in facts.items()),
        f"```bash\ntokenprune compare --methods uniform {name} --retention 0.5 0.25\n```",
        "## Options",
        options or "The method has no options of its own.",
    ]
    if card.deviations:
        parts += ["## Deviations", "\n".join(f"- {line}" for line in card.deviations)]
    if results.labels_of(name):
        parts += ["## On the testbeds", figures.of_method(name), results.of_method(name)]
    return "\n\n".join(parts) + "\n"


def _described(cls: type[Any]) -> tuple[str, str]:
    """The text of a class's docstring, and a table of its options."""
    sections = Docstring(inspect.getdoc(cls) or "").parse("google", warnings=False)
    said: dict[str, str] = {}
    text = []
    for section in sections:
        if section.kind is DocstringSectionKind.text:
            text.append(section.value)
        elif section.kind in (DocstringSectionKind.parameters, DocstringSectionKind.attributes):
            said.update({item.name: item.description for item in section.value})
    shared = {item.name for item in dataclasses.fields(tp.Compressor)}
    rows = [
        f"| `{item.name}` | `{_default(item)}` | {_line(said.get(item.name, ''))} |"
        for item in dataclasses.fields(cls)
        if item.name not in shared
    ]
    head = ["| option | default | meaning |", "|---|---|---|"]
    return "\n\n".join(text), "\n".join(head + rows) if rows else ""


def _default(item: dataclasses.Field[Any]) -> str:
    if item.default_factory is not dataclasses.MISSING:
        return str(item.default_factory())
    return "required" if item.default is dataclasses.MISSING else str(item.default)


def _line(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def _signals(name: str) -> str:
    """The signals that the method needs with its default options."""
    needs = sorted({signal.name for signal in tp.create(name, retention=0.5).needs})
    return ", ".join(f"`{signal}`" for signal in needs) or "none"


def _count(name: str) -> str:
    """Whether the size of an image with crops decides how many tokens stay."""
    layout = tp.TokenLayout.anyres((2, 2), (4, 4), (1, 7, 0, 8))
    known = tp.create(name, retention=0.25).count(layout) is not None
    return "follows from the size of the image" if known else "depends on the content"


def _paper(card: Any) -> str:
    if not card.arxiv:
        return card.paper
    return f"{card.paper}, [arXiv {card.arxiv}](https://arxiv.org/abs/{card.arxiv})"


def _linked(code: str) -> str:
    return re.sub(r"(https?://[^\s,()]+)", r"<\1>", code)


def _verified(card: Any) -> str:
    if card.verified:
        return f"yes: `tests/data/golden/{card.verified}`"
    return "no" if card.code else "there is no official code"
