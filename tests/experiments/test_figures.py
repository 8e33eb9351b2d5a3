"""Every figure at every width: texts are readable and in place, and PDF files can be edited."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from tests.figure_cases import Case, cases
from tokenprune.experiments.common.plots import save
from tokenprune.experiments.common.request import WIDTHS, FigureOptions

CASES = dict(cases())

DPI = 100

Box = tuple[float, float, float, float]


class Recorder:
    """The texts that a renderer draws: box in pixels from the upper left corner, size, text."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: list[tuple[Box, float, str]] = []
        draw = RendererAgg.draw_text

        def draw_text(
            renderer: RendererAgg, gc: object, x: float, y: float, s: str,
            prop: FontProperties, angle: float, *args: object, **options: object,
        ) -> None:  # fmt: skip
            width, height, descent = renderer.get_text_width_height_descent(s, prop, False)
            turn = math.radians(angle)
            along, up = (
                np.array([math.cos(turn), -math.sin(turn)]),
                np.array([-math.sin(turn), -math.cos(turn)]),
            )
            ends = [
                np.array([x, y]) + a * along + b * up
                for a in (0, width)
                for b in (-descent, height - descent)
            ]
            low, high = np.min(ends, axis=0), np.max(ends, axis=0)
            box = (float(low[0]), float(low[1]), float(high[0]), float(high[1]))
            if s.strip():
                self.found.append((box, float(prop.get_size_in_points()), s))
            draw(renderer, gc, x, y, s, prop, angle, *args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(RendererAgg, "draw_text", draw_text)

    def of(self, figure: Figure) -> list[tuple[Box, float, str]]:
        self.found = []
        figure.savefig(io.BytesIO(), format="raw", dpi=DPI)
        return self.found


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def faults(texts: list[tuple[Box, float, str]], size: tuple[float, float]) -> Iterator[str]:
    """A sentence for every text that is cut off, overlaps another or is too small."""
    boxes = np.array([box for box, *_ in texts])
    wide, tall = size
    for (left, top, right, bottom), points, text in texts:
        if left < -1 or top < -1 or right > wide + 1 or bottom > tall + 1:
            yield f"{text!r} is cut off"
        if points < 7:
            yield f"{text!r} has {points} points"
    inner = boxes + np.array([1.5, 1.5, -1.5, -1.5])  # letters may touch
    apart = (inner[:, None, :2] >= inner[None, :, 2:]).any(-1)
    both = ~(apart | apart.T) & ~np.eye(len(texts), dtype=bool)
    for first, second in zip(*np.triu(both).nonzero(), strict=True):
        yield f"{texts[first][2]!r} overlaps {texts[second][2]!r}"


@pytest.mark.parametrize("name", CASES)
def test_texts_of_every_figure_at_every_width(
    name: str, recorder: Recorder, tmp_path: Path
) -> None:
    case: Case = CASES[name]
    for width in WIDTHS:
        for number, figure in enumerate(case(FigureOptions(width=width))):
            texts = recorder.of(figure)
            assert len(texts) > 4, "nothing is drawn"
            size = tuple(np.array(figure.get_size_inches()) * DPI)
            found = list(faults(texts, size))
            assert not found, f"figure {number} at {width}: {found[:5]}"
            if width == "column":
                assert figure.get_figwidth() == 3.3
                save(figure, tmp_path / "figure", FigureOptions(formats=("pdf",), width=width))
                pdf = (tmp_path / "figure.pdf").read_bytes()
                assert b"/Type3" not in pdf
                assert b"/CIDFontType2" in pdf, "Type 42"
