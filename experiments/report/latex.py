"""Several runs of `compare` as a table for a paper."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from tokenprune.experiments.common.run_folder import UNCOMPRESSED

__all__ = [
    "booktabs",
]


_SIGNS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def booktabs(runs: Sequence[tuple[str, pd.DataFrame]]) -> str:
    """A ``table`` with a row per method and three columns per run and retention ratio.

    The columns are the accuracy in % with the ends of its 95 % interval as indices, the rank (equal
    accuracies share one), and the decoder's FLOPs in % of the uncompressed ones.  An accuracy is
    bold if it lies within the interval of the best method of its column.  The uncompressed model
    has no rank.

    Args:
        runs: As `side_by_side.read` returns them.

    Returns:
        LaTeX that needs the package ``booktabs``.
    """
    columns = [column for name, summary in runs for column in _columns(name, summary)]
    labels = dict.fromkeys(label for *_, cells in columns for label in cells)
    methods = sorted(label for label in labels if label != UNCOMPRESSED)
    body = [
        _row(label, [cells.get(label, ("--",) * 3) for *_, cells in columns]) for label in methods
    ]
    if UNCOMPRESSED in labels:
        first = [cells.get(UNCOMPRESSED, ("--",) * 3) for *_, cells in columns]
        body[:0] = [_row(UNCOMPRESSED, first), r"\midrule"]
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        r"\caption{Accuracy in \% with its 95\,\% confidence interval, rank, and FLOPs of the "
        r"decoder in \% of the uncompressed model. Bold: the best method of a column, and all "
        r"methods whose accuracy lies within its interval.}",
        rf"\begin{{tabular}}{{l{'rrr' * len(columns)}}}",
        r"\toprule",
        *_heads(columns),
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


_Cells = dict[str, tuple[str, ...]]


def _columns(name: str, summary: pd.DataFrame) -> Iterator[tuple[str, float, _Cells]]:
    """For each retention ratio the name of the run, the ratio, and label to texts."""
    steps = sorted(summary["retention"].unique(), reverse=True)
    full = summary[summary["label"] == UNCOMPRESSED]
    for step in [step for step in steps if step < 1] or steps:
        rows = summary[(summary["retention"] == step) & (summary["label"] != UNCOMPRESSED)]
        ranks = rows["accuracy"].rank(method="min", ascending=False)
        least = rows.loc[rows["accuracy"].idxmax(), "accuracy_low"] if len(rows) else 0.0
        cells: _Cells = {}
        for index, row in pd.concat([full, rows]).iterrows():
            ranked = row["label"] != UNCOMPRESSED
            cells[str(row["label"])] = (
                _accuracy(row, bold=ranked and row["accuracy"] >= least),
                f"{ranks[index]:.0f}" if ranked else "--",
                f"{100 * row['flops'] / row['uncompressed_flops']:.0f}",
            )
        yield name, float(step), cells


def _accuracy(row: pd.Series, *, bold: bool) -> str:
    value, low, high = (100 * row[f"accuracy{end}"] for end in ("", "_low", "_high"))
    shown = rf"\mathbf{{{value:.1f}}}" if bold else f"{value:.1f}"
    return rf"${shown}_{{{low:.1f}}}^{{{high:.1f}}}$"


def _heads(columns: Sequence[tuple[str, float, _Cells]]) -> Iterator[str]:
    """The name of every run and retention ratio over its columns, and the columns' names."""
    heads = [
        rf"\multicolumn{{3}}{{c}}{{{_escaped(name)}, $R = {100 * step:.3g}\,\%$}}"
        for name, step, _ in columns
    ]
    yield _row("", [(head,) for head in heads])
    yield " ".join(
        rf"\cmidrule(lr){{{2 + 3 * place}-{4 + 3 * place}}}" for place in range(len(columns))
    )
    yield _row("method", [("accuracy", "rank", "FLOPs")] * len(columns))


def _row(label: str, cells: Sequence[Sequence[str]]) -> str:
    texts = [_escaped(label), *(text for cell in cells for text in cell)]
    return " & ".join(texts) + r" \\"


def _escaped(text: str) -> str:
    return "".join(_SIGNS.get(sign, sign) for sign in text)
