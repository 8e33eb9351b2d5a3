"""Widths of texts in figures, and fonts for characters that Matplotlib's own font lacks."""

import re
import warnings
from functools import cache

from matplotlib import font_manager
from matplotlib.font_manager import FontProperties
from matplotlib.ft2font import FT2Font
from matplotlib.textpath import text_to_path

__all__ = [
    "FONT",
    "families",
    "legible",
    "text_width",
    "wrapped",
]


FONT = "DejaVu Sans"
"""Part of Matplotlib, so that figures are equal on all machines."""


# Lines break at spaces, behind the separators of specs, and between ideographs, which have none;
# a number stays with its unit.
_PIECES = re.compile(
    r" +(?!%)|(?: (?=%)|[^ :,;/+\u3000-\u9fff\uac00-\ud7af])+[:,;/+]*|[:,;/+]+|[^ ]"
)


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Width of the longest line, in inches."""
    return max(_width(line, size, bold) for line in legible(text).split("\n"))


@cache
def _width(line: str, size: float, bold: bool) -> float:
    font = FontProperties(family=families(line), size=size, weight="bold" if bold else "normal")
    # Hinting makes the letters of a picture up to 3 % wider.
    return 1.03 * text_to_path.get_text_width_height_descent(line, font, False)[0] / 72


def wrapped(text: str, inches: float, size: float, *, bold: bool = False) -> str:
    """``text`` with line breaks so that no line is wider than ``inches``."""
    lines = []
    for paragraph in legible(text).split("\n"):
        line = ""
        for piece in _PIECES.findall(paragraph):
            if text_width(line + piece.rstrip(" "), size, bold=bold) <= inches:
                line += piece
                continue
            if line.strip():
                lines.append(line.rstrip())
            line = piece.lstrip()
            while text_width(line, size, bold=bold) > inches and len(line) > 1:
                fits = len(line) - 1
                while fits > 1 and text_width(line[:fits], size, bold=bold) > inches:
                    fits -= 1
                lines.append(line[:fits])
                line = line[fits:]
        lines.append(line.rstrip())
    return "\n".join(lines)


@cache
def legible(text: str) -> str:
    r"""``text`` with ``\u`` escapes for characters that no installed font has, and a warning."""
    lacking = [sign for sign in dict.fromkeys(text) if not (sign.isascii() or _font_of(sign))]
    if lacking:
        warnings.warn(
            f"no installed font has the characters {''.join(lacking)!r}; figures show their codes "
            "instead. Install a font that has them, such as Noto Sans CJK.",
            stacklevel=2,
        )
    codes = {ord(sign): sign.encode("ascii", "backslashreplace").decode() for sign in lacking}
    return text.translate(codes)


def families(text: str) -> list[str]:
    """The fonts that have the characters of ``text``, Matplotlib's own first."""
    found = {_font_of(sign) for sign in text if not sign.isascii()}
    return [FONT, *sorted(name for name in found if name and name != FONT)]


@cache
def _font_of(sign: str) -> str | None:
    """The name of a font that has the character, or None."""
    if sign.isspace() or ord(sign) in _signs(font_manager.findfont(FONT)):
        return FONT
    files = sorted(font_manager.fontManager.ttflist, key=lambda font: (font.name, font.fname))
    # TrueType outlines first: the others cannot be embedded as Type 42.
    for font in sorted(files, key=lambda font: not font.fname.lower().endswith(".ttf")):
        if font.name.startswith("Last Resort") or font.style != "normal":
            continue  # the first has a box for every character
        if ord(sign) in _signs(font.fname):
            return font.name
    return None


@cache
def _signs(file: str) -> frozenset[int]:
    """The code points in a font; none of a font of pictures, such as emoji, or a damaged one."""
    try:
        font = FT2Font(file)
    except (OSError, RuntimeError):
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()
