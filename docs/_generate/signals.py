"""A table of all signals, made from `tokenprune.signals.SIGNALS`."""

from __future__ import annotations

import methods

from tokenprune.signals import AXES, SIGNALS, SignalInfo

LAYERS = {"named": "`layer`", "previous": "in front of the cut", "next": "behind the cut"}


def table(_: str = "") -> str:
    """A Markdown table for each source of signals."""
    sources = dict.fromkeys(info.source for info in SIGNALS.values())
    asking = methods.asking()
    parts = []
    for source in sources:
        rows = [
            _row(name, info, asking.get(name, []))
            for name, info in SIGNALS.items()
            if info.source == source
        ]
        head = [
            "| signal | shape | meaning | layer | methods | paper |",
            "|---|---|---|---|---|---|",
        ]
        parts.append(f"### {source.capitalize()}\n\n" + "\n".join(head + rows))
    return "\n\n".join(parts)


def axes(_: str = "") -> str:
    """A Markdown table of the axes of signals."""
    rows = [f"| `{name}` | {meaning} |" for name, meaning in AXES.items()]
    return "\n".join(["| axis | what it counts |", "|---|---|", *rows])


def _row(name: str, info: SignalInfo, asking: list[str]) -> str:
    shape = f"({', '.join(info.shape)}{',' if len(info.shape) == 1 else ''})"
    meaning = info.meaning + (" Needs a CLS token." if info.needs_cls else "")
    cells = (f"`{name}`", shape, meaning, LAYERS.get(info.layer, ""), ", ".join(asking) or "–")
    return f"| {' | '.join(cells)} | {_linked(info)} |"


def _linked(info: SignalInfo) -> str:
    """The paper with a link to arXiv."""
    name, _, number = info.paper.rstrip(")").partition(" (")
    return f"[{name}](https://arxiv.org/abs/{number})"
