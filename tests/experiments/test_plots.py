"""Figures: points equal the table, and names are legible."""

from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from tokenprune.experiments.common import plots
from tokenprune.experiments.common.plots import save, spread
from tokenprune.experiments.common.summary import OVERALL
from tokenprune.experiments.compare import figures
from tokenprune.experiments.compare.figures import accuracy, accuracy_by_cost, accuracy_by_kind

KINDS = (OVERALL, "count", "digit")


def summary(failed: str = "", methods: tuple[str, ...] = ("uniform", "fastv")) -> pd.DataFrame:
    rows = []
    for place, method in enumerate(("uncompressed", *methods)):
        for retention in (1.0, 0.5, 0.1) if place else (1.0,):
            for kind in KINDS:
                value = None if method == failed else 0.9 - 0.3 * (1 - retention) - 0.01 * place
                rows.append(
                    {
                        "method": method.partition(":")[0],
                        "label": method,
                        "retention": retention,
                        "kind": kind,
                        "status": "failed" if method == failed else "ok",
                        "accuracy": value,
                        "flops": (0.2 + 0.8 * retention) * 1e9,
                        "uncompressed_flops": 1e9,
                        "accuracy_low": None if value is None else value - 0.05,
                        "accuracy_high": None if value is None else value + 0.04,
                    }
                )
    types = dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high"), float)
    return pd.DataFrame(rows).astype(types)


def points(figure: Figure, label: str) -> list[float]:
    """Heights of the markers of a method in the first panel."""
    container = {c.get_label(): c for c in figure.axes[0].containers}[label]
    return [float(y) for y in container.lines[0].get_ydata()]


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_points_intervals_and_names() -> None:
    table = summary()
    figure = accuracy(table, "Title", "subtitle")
    assert points(figure, "fastv") == pytest.approx([0.9 - 0.15 - 0.02, 0.9 - 0.27 - 0.02])
    assert {"uniform", "fastv", "uncompressed 90.0 %"} == set(texts(figure))
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert ticks == ["100 %", "50 %", "10 %"]
    bars = {c.get_label(): c for c in figure.axes[0].containers}["uniform"].lines[2][0]
    low, high = bars.get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.74 - 0.05, 0.74 + 0.04))


def test_by_cost() -> None:
    figure = accuracy_by_cost(summary(), "Title", "subtitle")
    container = {c.get_label(): c for c in figure.axes[0].containers}["fastv"]
    assert list(container.lines[0].get_xdata()) == pytest.approx([0.6, 0.28])
    left, right = figure.axes[0].get_xlim()
    assert left > 1 > 0.28 > right, "the uncompressed model on the left, as in the other figures"


@pytest.mark.parametrize("kind", [r"$\frac{1$", "$x_1$ or $y_2$", "a_b^c$"])
def test_dollar_signs_do_not_start_a_formula(kind: str, tmp_path: Path) -> None:
    """As mathtext the first does not parse, and the second would lose its signs."""
    table = summary().replace({"kind": {"count": kind}})
    title = f"Accuracy of {kind}"
    for draw in (accuracy_by_kind, figures.by_kind):
        figure = draw(table, title, kind)
        save(figure, tmp_path / "figure")
        shown = figure.findobj(Text)
        for said in (title, kind):
            found = [text for text in shown if text.get_text().strip() == said]
            assert [text.get_parse_math() for text in found] == [False] * max(len(found), 1)
    bars = pd.DataFrame({"place": [kind, "b"], "shown": "x", "value": 0.5, "low": 0.4, "high": 0.6})
    figure = plots.bars(bars, places={kind: kind, "b": "b"}, hues=["x"], title=title,
                        subtitle="", label="value")  # fmt: skip
    save(figure, tmp_path / "bars")
    ticks = [text for text in figure.findobj(Text) if text.get_text() == kind]
    assert [text.get_parse_math() for text in ticks] == [False] * max(len(ticks), 1)


@pytest.mark.parametrize("failed", ["fastv", "uncompressed"])
def test_what_failed_is_left_out(failed: str) -> None:
    figure = accuracy(summary(failed), "Title")
    assert not any(failed in text for text in texts(figure))
    assert "uniform" in texts(figure)
    assert len(accuracy_by_kind(summary(failed), "Title").axes) >= 2
    assert not any(failed in text for text in texts(accuracy_by_cost(summary(failed), "Title")))


def test_one_panel_per_kind() -> None:
    figure = accuracy_by_kind(summary(), "Title", "subtitle")
    assert [axes.get_title("left") for axes in figure.axes][:2] == ["count", "digit"]
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    assert len(legends) == 1
    names = [text.get_text() for text in legends[0].get_texts()]
    assert names == ["uncompressed", "uniform", "fastv"]


def test_only_the_uncompressed_model_can_be_drawn() -> None:
    for draw in (accuracy, accuracy_by_cost):
        assert texts(draw(summary(methods=()), "Title")) == ["uncompressed 90.0 %"]


def test_saved_as_picture_and_for_print(tmp_path: Path) -> None:
    long = ("uniform", "globalcom2:alpha=0.3,tau=5,score=cls_attention")
    save(accuracy(summary(methods=long), "Title"), tmp_path / "plots" / "accuracy")
    with Image.open(tmp_path / "plots" / "accuracy.png") as image:
        assert image.width > 1600
    assert (tmp_path / "plots" / "accuracy.pdf").read_bytes().startswith(b"%PDF")
    assert len(list((tmp_path / "plots").iterdir())) == 2


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.2))
def test_labels_keep_their_order_and_distance(values: list[float], gap: float) -> None:
    placed = spread(values, gap)
    ordered = [place for _, place in sorted(zip(values, placed, strict=True))]
    steps = [b - a for a, b in pairwise(ordered)]
    assert all(step >= gap - 1e-6 for step in steps)
    assert sum(placed) == pytest.approx(sum(values), abs=1e-5), "moved as a whole: by nothing"


# --- many methods ---------------------------------------------------------------------------------

CROWD = ("uniform", "fastv", "dart", "broken")


def test_many_methods_are_ranked_and_all_are_drawn() -> None:
    table = summary("broken", CROWD)
    figure = figures.by_retention(table, "title", "subtitle")
    (axes,) = figure.axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["uniform", "fastv", "dart"], "best first, what failed left out"
    shown = {c.get_label(): c.lines[0].get_xdata() for c in axes.containers}
    assert list(shown) == ["50 % kept", "10 % kept"]
    assert list(shown["50 % kept"]) == pytest.approx([0.74, 0.73, 0.72])
    assert list(shown["10 % kept"]) == pytest.approx([0.62, 0.61, 0.60])
    assert [line.get_xdata()[0] for line in axes.lines if line.get_label() == "uncompressed"] == [
        0.9
    ]


def test_many_methods_by_cost_name_the_best_at_each_cost() -> None:
    figure = figures.by_cost(summary("broken", CROWD), "title")
    assert texts(figure) == ["uniform 50 %", "uniform 10 %"]
    (first, *_) = figure.axes[0].lines
    assert list(first.get_xdata()) == pytest.approx([0.6] * 3)


def test_many_methods_by_kind_give_a_map_per_retention(tmp_path: Path) -> None:
    figure = figures.by_kind(summary("broken", CROWD), "title", "40 questions")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["50 % kept", "10 % kept"]
    numbers = [text.get_text() for text in figure.axes[0].texts]
    assert numbers == ["74", "74", "73", "73", "72", "72"]
    save(figure, tmp_path / "kinds")
    assert (tmp_path / "kinds.png").exists()
