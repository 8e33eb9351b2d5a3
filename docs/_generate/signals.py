"""A table of all signals, made from `tokenprune.signals.SIGNALS`."""

from __future__ import annotations

from tokenprune.signals import AXES, SIGNALS, SignalInfo

LAYERS = {"named": "`layer`", "previous": "in front of the cut", "next": "behind the cut"}


def table(_: str = "") -> str:
    """A Markdown table for each source of signals."""
    sources = dict.fromkeys(info.source for info in SIGNALS.values())
    parts = []
    for source in sources:
        rows = [_row(name, info) for name, info in SIGNALS.items() if info.source == source]
        head = ["| signal | shape | what it is | layer | paper |", "|---|---|---|---|---|"]
        parts.append(f"### {source.capitalize()}\n\n" + "\n".join(head + rows))
    return "\n\n".join(parts)


def axes(_: str = "") -> str:
    """A Markdown table of the axes of signals."""
    rows = [f"| `{name}` | {meaning} |" for name, meaning in AXES.items()]
    return "\n".join(["| axis | what it counts |", "|---|---|", *rows])


def _row(name: str, info: SignalInfo) -> str:
    shape = f"({', '.join(info.shape)}{',' if len(info.shape) == 1 else ''})"
    meaning = info.meaning + (" Needs a CLS token." if info.needs_cls else "")
    return f"| `{name}` | {shape} | {meaning} | {LAYERS.get(info.layer, '')} | {_linked(info)} |"


def _linked(info: SignalInfo) -> str:
    """The paper with a link to arXiv."""
    name, _, number = info.paper.rstrip(")").partition(" (")
    return f"[{name}](https://arxiv.org/abs/{number})"
