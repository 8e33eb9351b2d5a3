"""Figures: points equal the table, and names are legible."""

import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from PIL import Image

from tokenprune.errors import UserError
from tokenprune.experiments.common import glyphs, plots
from tokenprune.experiments.common.plots import save, spread
from tokenprune.experiments.common.request import FigureOptions
from tokenprune.experiments.common.summary import OVERALL
from tokenprune.experiments.compare import figures
from tokenprune.experiments.compare.figures import accuracy, accuracy_by_cost, accuracy_by_kind

KINDS = (OVERALL, "count", "digit")


def summary(
    failed: str = "",
    methods: tuple[str, ...] = ("uniform", "fastv"),
    kinds: tuple[str, ...] = KINDS,
) -> pd.DataFrame:
    rows = []
    for place, method in enumerate(("uncompressed", *methods)):
        for retention in (1.0, 0.5, 0.1) if place else (1.0,):
            for kind in kinds:
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
    assert ticks == ["100", "50", "10"]
    assert figure.axes[0].get_xlabel() == "visual tokens kept (retention, %)"
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
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["uncompressed", "uniform", "fastv"]


def test_the_legend_takes_an_empty_panel() -> None:
    columns = FigureOptions(width="column")
    figure = accuracy_by_kind(summary(kinds=(OVERALL, "a", "b", "c")), "Title", options=columns)
    assert [axes.axison for axes in figure.axes] == [True] * 3 + [False]
    assert figure.axes[3].get_legend() is not None
    assert not figure.legends


def test_ticks_are_labelled_exactly() -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.set_ylim(0.92, 0.98)
    plots.in_percent(axes.yaxis)
    shown = {tick.get_position()[1]: tick.get_text() for tick in axes.get_yticklabels()}
    assert len(shown) > 2
    for place, text in shown.items():
        assert float(text) == pytest.approx(100 * place, abs=1e-9)
    axes.set_yticks([0.975, 0.925])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["97.5", "92.5"]


def test_matched_costs_are_not_called_kept_tokens() -> None:
    """At matched FLOPs the place on the axis is that of uniform; FastV keeps fewer tokens."""
    table = summary().assign(match="flops", asked_retention=lambda rows: rows["retention"], n=10)
    table.loc[table["method"] == "fastv", "retention"] *= 0.4
    few = figures.drawn(table, "m")["accuracy"].axes[0]
    assert few.get_xlabel() == "prefill FLOPs: those of uniform at this retention (%)"
    crowd = summary(methods=tuple("abcdefghi")).assign(match="flops", n=10)
    crowd["asked_retention"] = crowd["retention"]
    (legend,) = figures.drawn(crowd, "m")["accuracy"].legends
    names = {text.get_text() for text in legend.get_texts()}
    assert names >= {"prefill FLOPs of uniform at 50 %", "prefill FLOPs of uniform at 10 %"}


def test_leaders_start_at_the_ends_of_lines() -> None:
    table = summary()
    (axes,) = accuracy(table, "Title").axes
    for text in axes.texts:
        assert isinstance(text, Annotation)
        assert text.arrow_patch is not None
        if text.get_text() == "fastv":
            assert text.xy[1] == pytest.approx(0.9 - 0.27 - 0.02)


def test_only_the_uncompressed_model_can_be_drawn() -> None:
    for draw in (accuracy, accuracy_by_cost):
        assert texts(draw(summary(methods=()), "Title")) == ["uncompressed 90.0 %"]


def test_saved_as_picture_and_for_print(tmp_path: Path) -> None:
    long = ("uniform", "globalcom2:alpha=0.3,tau=5,score=cls_attention")
    save(accuracy(summary(methods=long), "Title"), tmp_path / "plots" / "accuracy")
    with Image.open(tmp_path / "plots" / "accuracy.png") as image:
        assert image.width == round(6.9 * 220)
    assert (tmp_path / "plots" / "accuracy.pdf").read_bytes().startswith(b"%PDF")
    assert len(list((tmp_path / "plots").iterdir())) == 2


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.01, 0.2))
def test_labels_keep_their_order_and_distance(values: list[float], gap: float) -> None:
    placed = spread(values, [gap] * len(values), 2.0)
    ordered = [place for _, place in sorted(zip(values, placed, strict=True))]
    steps = [b - a for a, b in pairwise(ordered)]
    assert all(step >= gap - 1e-6 for step in steps)
    assert ordered[0] >= gap / 2 - 1e-6
    assert ordered[-1] <= 2 - gap / 2 + 1e-6
    if gap / 2 <= min(values) and all(b - a >= gap for a, b in pairwise(sorted(values))):
        assert placed == pytest.approx(values), "labels that have room stay"


def test_labels_of_several_lines_take_more_room() -> None:
    assert spread([5.0, 5.0], [2.0, 6.0], 20.0) == pytest.approx([3.0, 7.0])
    assert spread([0.0, 0.0], [4.0, 4.0], 20.0) == pytest.approx([2.0, 6.0])
    assert spread([1.0, 1.0], [4.0, 4.0], 6.0) == pytest.approx([1.0, 5.0]), "out on both sides"


# --- options --------------------------------------------------------------------------------------


def test_files_have_the_formats_and_the_width_that_are_asked_for(tmp_path: Path) -> None:
    options = FigureOptions(formats=("svg", "png"), width="column", title=False)
    figure = accuracy(summary(), "Title", "subtitle", options)
    assert save(figure, tmp_path / "a.b", options) == ["a.b.svg", "a.b.png"]
    assert not {"Title", "subtitle"} & {text.get_text() for text in figure.findobj(Text)}
    with Image.open(tmp_path / "a.b.png") as image:
        assert image.width == 990
    first = (tmp_path / "a.b.svg").read_bytes()
    save(figure, tmp_path / "a.b", options)
    assert (tmp_path / "a.b.svg").read_bytes() == first


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"width": "colum"}, "Did you mean 'column'"),
        ({"formats": ("pdf", "jpg")}, "no format is called 'jpg'"),
        ({"formats": ()}, "no format is given"),
    ],
)
def test_other_options_are_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        FigureOptions(**asked)


# --- characters -----------------------------------------------------------------------------------


@pytest.fixture
def fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[font_manager.FontEntry]]:
    """The installed fonts: Matplotlib's own alone, and what a test adds."""
    known = font_manager.fontManager.ttflist
    own = [font for font in known if font.name == glyphs.FONT]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    for function in (glyphs.legible, glyphs._font_of):
        function.cache_clear()
    yield own
    for function in (glyphs.legible, glyphs._font_of):
        function.cache_clear()


def test_characters_without_a_font_are_shown_as_codes(fonts: list[Any]) -> None:
    table = summary().replace({"kind": {"count": "数"}})
    with pytest.warns(UserWarning, match="no installed font has the characters '数'"):
        figure = accuracy_by_kind(table, "Title é ²")
    assert figure.axes[0].get_title(loc="left") == r"\u6570"
    assert "Title é ²" in {text.get_text() for text in figure.findobj(Text)}


def test_characters_are_drawn_in_an_installed_font_that_has_them(
    fonts: list[font_manager.FontEntry], tmp_path: Path
) -> None:
    """A font with a single character: a box for 数."""
    pen = TTGlyphPen(None)
    for number, point in enumerate(((0, 0), (0, 700), (700, 700), (700, 0))):
        (pen.lineTo if number else pen.moveTo)(point)
    pen.closePath()
    made = FontBuilder(1000, isTTF=True)
    made.setupGlyphOrder([".notdef", "number"])
    made.setupCharacterMap({ord("数"): "number"})
    made.setupGlyf({".notdef": pen.glyph(), "number": pen.glyph()})
    made.setupHorizontalMetrics({".notdef": (800, 0), "number": (800, 0)})
    made.setupHorizontalHeader(ascent=800, descent=-200)
    made.setupNameTable({"familyName": "Numbers", "styleName": "Regular", "psName": "Numbers"})
    made.setupOS2()
    made.setupPost()
    made.save(tmp_path / "numbers.ttf")
    font_manager.fontManager.addfont(tmp_path / "numbers.ttf")
    assert glyphs.legible("数 n") == "数 n"
    assert glyphs.families("数 n") == [glyphs.FONT, "Numbers"]
    options = FigureOptions(formats=("pdf",))
    figure = accuracy_by_kind(summary().replace({"kind": {"count": "数"}}), "数", options=options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(figure, tmp_path / "figure", options)
    content = (tmp_path / "figure.pdf").read_bytes()
    assert b"Numbers" in content
    assert b"/Type3" not in content


@given(st.text("ab :数,%", max_size=40), st.floats(0.1, 2))
def test_wrapped_lines_fit_and_lose_only_spaces(text: str, inches: float) -> None:
    lines = glyphs.wrapped(text, inches, 7).split("\n")
    for line in lines:
        assert len(line) <= 1 or glyphs.text_width(line, 7) <= inches
    assert "".join(lines).replace(" ", "") == glyphs.legible(text).replace(" ", "")


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


def test_many_methods_by_cost_are_all_numbered() -> None:
    figure = figures.by_cost(summary("broken", CROWD), "title")
    half, tenth, key = figure.axes
    for axes in (half, tenth):
        assert sorted(text.get_text() for text in axes.texts) == ["1", "2", "3"]
    points = next(line for line in half.lines if line.get_marker() == "o")
    assert list(points.get_xdata()) == pytest.approx([0.6] * 3)
    names = [text.get_text() for text in key.texts]
    assert names == ["1", "uniform", "2", "fastv", "3", "dart"]


def test_many_methods_by_kind_give_a_map_per_retention(tmp_path: Path) -> None:
    figure = figures.by_kind(summary("broken", CROWD), "title", "40 questions")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["50 % kept", "10 % kept"]
    numbers = [text.get_text() for text in figure.axes[0].texts]
    assert numbers == ["74", "74", "73", "73", "72", "72"]
    save(figure, tmp_path / "kinds")
    assert (tmp_path / "kinds.png").exists()
