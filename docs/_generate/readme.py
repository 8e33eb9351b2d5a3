"""The tables of the README: ``python docs/_generate/readme.py`` rewrites them in place."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import tokenprune as tp
from tokenprune.registry import strategies

ROOT = Path(__file__).resolve().parents[2]
RETENTION = ("0.5", "0.25", "0.1")
STAGES = {"encoder": "vision encoder", "pre_llm": "before the LLM", "llm": "inside the LLM"}


def comparison() -> str:
    """Accuracy in % and, in brackets, decoder FLOPs in %, of the default comparison."""
    path = ROOT / "experiments" / "results" / "testbed-next" / "summary.csv"
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "overall"]
    found = {(row["label"], row["retention"]): row for row in rows}
    full = _cell(found["uncompressed", "1.0"])
    lines = ["| method | R = 50 % | 25 % | 10 % |", "|---|---|---|---|"]
    lines.append(f"| uncompressed (R = 100 %) | {full} | | |")
    for name in ("uniform", "random", "fastv", "globalcom2"):
        cells = [_cell(found[name, retention]) for retention in RETENTION]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: dict[str, str]) -> str:
    share = float(row["flops"]) / float(row["uncompressed_flops"])
    return f"{100 * float(row['accuracy']):.1f} ({100 * share:.0f})"


def methods() -> str:
    """All methods that are part of tokenprune, from their cards."""
    lines = ["| method | paper | stage | needs | verified |", "|---|---|---|---|---|"]
    baselines = []
    for name in strategies.names():
        cls = strategies.get(name)
        if not cls.__module__.startswith("tokenprune."):
            continue
        card = cls.card
        if not card.arxiv:
            baselines.append(f"`{name}`")
            continue
        needs = sorted({signal.name for signal in tp.create(name, retention=0.5).needs})
        verified = "yes" if card.verified else "no"
        cells = (
            f"`{name}`",
            f"[{card.paper}](https://arxiv.org/abs/{card.arxiv})",
            STAGES[cls.stage],
            ", ".join(needs) or "–",
        )
        lines.append(f"| {' | '.join(cells)} | {verified} |")
    return "\n".join([*lines, f"| {', '.join(baselines)} | baselines | | – | |"])


def filled(text: str) -> str:
    """``text`` with its tables made anew."""
    for name, table in (("comparison", comparison()), ("methods", methods())):
        region = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(
            region, lambda found, new=table: f"{found[1]}{new}\n{found[2]}", text, flags=re.S
        )
        assert count == 1, name
    return text


if __name__ == "__main__":
    page = ROOT / "README.md"
    page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
