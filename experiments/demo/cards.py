"""The answers as HTML: one card for each method."""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image

from tokenprune.experiments.demo.answers import Answer, Answers
from tokenprune.experiments.metrics.exact import is_exact
from tokenprune.spec import format
from tokenprune.units import flops_unit, percent

__all__ = ["cards", "listing", "refusal"]


def cards(answers: Answers, truth: str | None = None, hint: str = "") -> str:
    """The answers side by side, the uncompressed model first.

    Args:
        answers: As `Answerer.answers` returns them.
        truth: The true answer, if known.
        hint: A sentence above the cards.
    """
    film = " tp-film" if answers.clip.video else ""
    plain = answers.each[0]
    each = "".join(_card(one, plain, truth) for one in answers.each)
    above = f'<div class="tp-message tp-hint" role="note">{escape(hint)}</div>' if hint else ""
    return f'{above}<div class="tp-cards{film}">{each}</div>'


def refusal(sentence: str) -> str:
    """The sentence of an error."""
    return f'<div class="tp-message" role="alert">{escape(sentence)}</div>'


def listing(text: str) -> str:
    """A text of several lines, as it is written."""
    return f'<pre class="tp-code">{escape(text)}</pre>'


def _card(one: Answer, plain: Answer, truth: str | None) -> str:
    ledger = one.ledger
    unit, scale = flops_unit(ledger.uncompressed_flops)
    share = ledger.flops / (ledger.uncompressed_flops or 1)
    whole = one.compressor is None
    retention = "" if one.compressor is None else f", R = {percent(one.compressor.retention, None)}"
    tokens = f"{ledger.kept_patches} of {ledger.patch_tokens} ({percent(ledger.realised, None)})"
    flops = f"{ledger.flops / scale:.3g} {unit} ({percent(share, None)})"
    verdict = ""
    if truth is not None:
        right = is_exact(one.text, [truth])
        mark, word = ("✓", "right") if right else ("✗", "wrong")
        verdict = (
            f' <span class="tp-{word}" title="The true answer is {escape(truth)}.">{mark}</span>'
        )
    spec = one.label if one.compressor is None else format(one.compressor)
    parts = [
        f'<article class="tp-card" data-spec="{escape(spec)}">',
        f"<h3>{escape(one.label)}</h3>",
        f'<div class="tp-where">{escape(one.where)}{retention}</div>',
        *(_image(drawing, one.label) for drawing in one.drawings),
        f'<div class="tp-answer">{escape(one.text) or "(nothing)"}{verdict}</div>',
        _row("patch tokens" if whole else "kept tokens", tokens, ledger.realised),
        _row("FLOPs of the prefill", flops, share),
        _row(
            "time of the prefill",
            f"{one.milliseconds:.{0 if one.milliseconds >= 99.5 else 1}f} ms",
            None,
        ),
        *(f'<div class="tp-note">{escape(said)}</div>' for said in one.warnings),
        "</article>",
    ]
    return "".join(parts)


def _row(name: str, text: str, share: float | None) -> str:
    row = f'<div class="tp-row"><span>{name}</span><span>{escape(text)}</span></div>'
    if share is None:
        return row
    return f'{row}<div class="tp-bar"><div style="width:{min(100 * share, 100):.1f}%"></div></div>'


def _image(drawing: Image.Image, label: str) -> str:
    file = io.BytesIO()
    drawing.save(file, "PNG", compress_level=1)  # fast; the page is on the same machine
    data = base64.b64encode(file.getvalue()).decode("ascii")
    alt = f"The patches that {label} keeps"
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
