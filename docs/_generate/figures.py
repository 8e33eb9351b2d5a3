"""Figures that are drawn while the site is built, in the colours of the page."""

from __future__ import annotations

import re
from io import StringIO

import matplotlib
import results
from matplotlib.figure import Figure

_INK = "#123456"  # replaced by the colour of the page's text
_PANEL = 3.2  # inches
_COLOURS = ("#4c72f0", "#e0723c", "#3aa76d", "#b65fcf")


def of_method(name: str) -> str:
    """Accuracy against retention in every stored comparison that has the method, as inline SVG.

    Variants of the method are drawn too; `uniform` and the uncompressed model stand beside them.
    """
    labels = results.labels_of(name)
    found = {
        title: table
        for title, table in results.comparisons().items()
        if table["label"].isin(labels).any()
    }
    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "tokenprune",
            "text.color": _INK,
            "axes.labelcolor": _INK,
            "axes.edgecolor": _INK,
            "xtick.color": _INK,
            "ytick.color": _INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    ):
        width = _PANEL * len(found)
        margins = {"left": 0.7 / width, "right": 1 - 0.1 / width, "top": 0.9, "bottom": 0.18}
        figure = Figure(figsize=(width, 2.7))
        axes = figure.subplots(1, len(found), sharey=True, squeeze=False, gridspec_kw=margins)[0]
        for panel, (title, table) in zip(axes, found.items(), strict=True):
            _panel(panel, table, labels)
            panel.set_title(title, fontsize=9)
        axes[0].set_ylabel("accuracy (%)")
        axes[0].legend(frameon=False, fontsize=8, loc="lower right")
        drawn = StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    title = f"Accuracy of {name} against the retention ratio"
    return _inline(drawn.getvalue(), title, width / (_PANEL * len(results.comparisons())))


def _panel(axes: matplotlib.axes.Axes, table: results.Table, labels: list[str]) -> None:
    full = table.loc[table["retention"] == 1, "accuracy"].iloc[0]
    axes.axhline(100 * full, color=_INK, linewidth=0.8, linestyle=":", label="uncompressed")
    shown = [*labels, *(["uniform"] if "uniform" not in labels else [])]
    for index, label in enumerate(shown):
        rows = table[(table["label"] == label) & (table["retention"] < 1)].sort_values("retention")
        if rows.empty:
            continue
        mine = label in labels
        axes.errorbar(
            100 * rows["retention"],
            100 * rows["accuracy"],
            yerr=[
                100 * (rows["accuracy"] - rows["accuracy_low"]),
                100 * (rows["accuracy_high"] - rows["accuracy"]),
            ],
            color=_COLOURS[index % len(_COLOURS)] if mine else _INK,
            linestyle="-" if mine else "--",
            linewidth=1.6 if mine else 1,
            marker="o",
            markersize=4,
            capsize=2,
            label=label,
        )
    axes.set_xlabel("retention (%)")
    axes.grid(alpha=0.15, color=_INK)


def _inline(svg: str, title: str, share: float) -> str:
    """The drawing as HTML, ``share`` of the page wide, with text in the colour of the page."""
    body = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    body = re.sub(r"font: ([\d.]+px) [^;]*;", r"font: \1 sans-serif;", body)
    body = body.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    lines = [line for line in body.splitlines() if line.strip()]
    body = "\n".join(lines)
    return f'<div class="figure" style="max-width: {100 * share:.0f}%">\n{body}\n</div>'
