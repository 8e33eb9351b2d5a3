"""What a method would cost at a given shape, without weights, images or a forward.

The strategy's own code runs on made-up tokens of the right geometry, in the places where the engine
would run it, so that rounding, separators and several cuts come out as they would; the arithmetic
is the ledger's.  What a method makes of the *content* is not foreseen: one whose counts
depend on it is run on several draws, and the forecast then is an estimate.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenprune.compressor import Compressor, placed
from tokenprune.cost.arithmetic import (
    DecoderShape,
    Kept,
    VisionShape,
    copied_bytes,
    encoder_flops,
    held_bytes,
    kept_of,
    merging_bytes,
    signal_bytes,
    signal_flops,
)
from tokenprune.cost.ledger import Ledger, settle
from tokenprune.cost.measuring import Work
from tokenprune.encoder import encoder_part
from tokenprune.engine.decoder import tapped_layers
from tokenprune.engine.tower import foreseen
from tokenprune.errors import RetentionWarning
from tokenprune.layout import TokenLayout
from tokenprune.signals import Signal
from tokenprune.synthetic import sample_tokens
from tokenprune.tokens import VisualTokens

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter

__all__ = ["Forecast", "forecast"]

_INPUTS, _PROMPT = Signal("llm_inputs"), Signal("llm_prompt")


@dataclass(frozen=True)
class Forecast:
    """The accounts of several draws.

    Attributes:
        draws: A `Ledger` for each.
        by_content: Whether counts depend on the image even where all draws agree, as where patches
            merge in the tower: those of the padding vanish with it.
    """

    draws: tuple[Ledger, ...]
    by_content: bool = False

    @property
    def ledger(self) -> Ledger:
        """The account with the median layer average."""
        ordered = sorted(self.draws, key=lambda one: one.layer_average)
        return ordered[len(ordered) // 2]

    @property
    def exact(self) -> bool:
        """Whether every draw processes equally many tokens in every layer.

        What a few draws do not show is not known: rounding that content seldom changes.
        """
        return not self.by_content and len({one.visual_per_layer for one in self.draws}) == 1

    @property
    def mark(self) -> str:
        """``≈`` where the counts depend on the content, else nothing."""
        return "" if self.exact else "≈"


def forecast(
    adapter: Adapter,
    compressor: Compressor | None,
    layouts: Sequence[TokenLayout],
    text: int = 0,
    *,
    asking: int | Sequence[int] | None = None,
    size: int = 2,
    draws: int = 5,
) -> Forecast:
    """The account of one prompt's prefill with a KV cache.

    Args:
        adapter: Of the model, which may lie on the ``meta`` device.
        compressor: The method, or None.
        layouts: Of the prompt's images and videos (`Adapter.layout`).
        text: Tokens of the prompt that are not visual.
        asking: How many of them lie behind the images, for methods that ask the text; default all
            of them.  Where there are none, one that is not counted stands in.  A number for each
            image or video where words lie between them.
        size: Bytes of a number: 2 for half precision.
        draws: On how many made-up contents the strategy runs.

    Raises:
        UserError: The model lacks what the method needs.
    """
    if compressor is not None:
        adapter.check(compressor)
    behind = text if asking is None else asking
    each = [behind] * len(layouts) if isinstance(behind, int) else behind
    each = [max(1, number) for number in each]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetentionWarning)
        made = [
            _Draw(adapter, compressor, layouts, text, each, size, seed).ledger()
            for seed in range(draws)
        ]
    tower = encoder_part(compressor)
    return Forecast(tuple(made), tower is not None and bool(layouts) and tower.by_content)


class _Draw:
    """One made-up prompt on its way through the model."""

    def __init__(
        self,
        adapter: Adapter,
        compressor: Compressor | None,
        layouts: Sequence[TokenLayout],
        text: int,
        asking: Sequence[int],
        size: int,
        seed: int,
    ) -> None:
        self.adapter, self.layouts = adapter, layouts
        self.text, self.asking, self.size, self.seed = text, asking, size, seed
        self.retention = compressor.retention if compressor is not None else 1.0
        self.needs = compressor.needs if compressor is not None else frozenset()
        self.shape = DecoderShape.of(adapter.language_model.config)
        self.before, self.inside = placed(compressor, self.shape.layers)
        towers = frozenset(signal for signal in self.needs if not signal.in_llm)
        early = towers | (self.needs & {_PROMPT})
        self.images = [
            sample_tokens(early, layout, seed=1000 * seed + index, text=words)
            for index, (layout, words) in enumerate(zip(layouts, asking, strict=True))
        ]
        views = sum(layout.views for layout in layouts)
        vision = VisionShape.of(adapter.base.config.vision_config)
        self.plain = views * encoder_flops([adapter.vision_tokens] * vision.layers, vision)
        self.vision, attended, part = self.plain, None, encoder_part(compressor)
        merging = 0
        if part is not None and layouts:
            runs = [foreseen(adapter, part, layout, seed) for layout in layouts]
            self.images = [
                replace(
                    tokens,
                    clusters=run.clusters([tokens.layout], adapter.view_shape)[0],
                    encoding=run.encoding,
                )
                for tokens, run in zip(self.images, runs, strict=True)
            ]
            attended = runs[-1].attended  # as the engine does
            self.vision = sum(
                layout.views * encoder_flops(run.attended, vision, run.processed)
                for layout, run in zip(layouts, runs, strict=True)
            )
            width = adapter.vision_width
            merging = max(merging_bytes(run.encoding, width, views, size) for run in runs)
        self.flops = signal_flops(towers, adapter, views, attended)
        self.bytes = max(merging, signal_bytes(towers, adapter, views, size, attended))
        self.tapped = 0  # bytes of the states that attention rows are made of
        self.merged = 0  # bytes of copies that merged tokens are put in

    def ledger(self) -> Ledger:
        """Run the method and settle."""
        for part in self.before:
            self._select(part, self.images, inside=False)
        entered = [tokens.layout for tokens in self.images]
        self.images = [
            replace(
                tokens,
                entered=len(tokens.layout.patches),
                inputs=sample_tokens(frozenset(), tokens.layout, seed=self.seed, text=words).inputs,
            )
            for tokens, words in zip(self.images, self.asking, strict=True)
        ]
        visual: list[int] = []
        for layer in range(self.shape.layers):
            if layer in self.inside:
                self._ask(self.inside[layer], layer, visual)
                shown = [
                    self._shown(self.inside[layer], tokens, words)
                    for tokens, words in zip(self.images, self.asking, strict=True)
                ]
                self._select(self.inside[layer], shown, inside=True)
            visual.append(sum(map(len, self.images)))
        return settle(
            shape=self.shape,
            size=self.size,
            requested=self.retention,
            before=self.layouts,
            entered=entered,
            after=[tokens.layout for tokens in self.images],
            text=self.text,
            visual_per_layer=visual,
            selector_flops=self.flops,
            selector_bytes=self.bytes,
            merged_bytes=self.merged,
            vision_flops=self.vision,
            uncompressed_vision_flops=self.plain,
        )

    def _select(self, part: Compressor, shown: Sequence[VisualTokens], *, inside: bool) -> None:
        """Let ``part`` choose of every image, and charge what that takes."""
        held = [held_bytes(self._sized(tokens), inside=False) for tokens in self.images]
        tapped = self.tapped if inside else 0
        for index, tokens in enumerate(shown):
            sized = self._sized(tokens)
            own = held_bytes(sized, inside=True) - held[index] if inside else 0
            cost = Work.of(part, sized, self.layouts[index]).cost()
            self.flops += cost.flops
            self.bytes = max(self.bytes, tapped + sum(held) + own + int(cost.bytes))
        slots = self.text + sum(map(len, self.images))
        chosen = [part(tokens) for tokens in shown]
        for one in chosen:
            if one.features is not None:
                copied = copied_bytes(slots, len(one.keep), self.shape, self.size)
                self.merged = max(self.merged, copied)
        self.images = [old.take(one.keep) for old, one in zip(self.images, chosen, strict=True)]

    def _ask(self, part: Compressor, layer: int, visual: Sequence[int]) -> None:
        """Charge the attention rows that ``part`` wants in front of ``layer``."""
        if not self.images:
            return
        rows: list[tuple[int, int, bool, Kept]] = []  # layer, queries, keys projected for it, kept
        for signal in part.needs:
            kept = kept_of([signal.name])
            if signal.name == "llm_attention":
                rows.append((signal.layer, 1, False, kept))
            elif signal.name == "llm_ahead":
                rows.append((layer - 1, 1, True, kept))
            elif signal.name in ("llm_text", "llm_text_heads", "llm_cross"):
                rows += [(layer - 1, min(words, self.text), False, kept) for words in self.asking]
            elif signal.name == "llm_self":
                rows += [(layer - 1, len(one.layout.patches), False, kept) for one in self.images]
            elif signal.name == "llm_global":
                rows += [(layer - 1, 1, True, kept)] * len(self.images)
            elif signal.name == "llm_keys_ahead":
                rows.append((layer - 1, 0, True, kept))
            elif signal.name in ("llm_keys", "llm_states"):
                count = self.text + visual[layer - 1]
                taken = self.shape.vector_bytes(count, self.size, signal.name)
                self.bytes = max(self.bytes, taken)
        for where, queries, again, kept in rows:
            count = self.text + visual[where]
            self.flops += self.shape.row_flops(count, again, queries)
            taken = self.shape.row_bytes(count, again, self.size, queries, kept)
            self.bytes = max(self.bytes, taken)
        seen = [visual[where] for where in tapped_layers(part.needs, {layer: part})]
        self.tapped = self.size * self.shape.hidden * sum(self.text + count for count in seen)

    def _shown(self, part: Compressor, tokens: VisualTokens, words: int) -> VisualTokens:
        """What ``part`` sees between two layers of one image with ``words`` behind it."""
        wanted = frozenset(signal for signal in part.needs if signal.in_llm)
        drawn = sample_tokens(wanted, tokens.layout, seed=self.seed + 7, text=words)
        return replace(
            tokens,
            features=drawn.features,
            signals={**tokens.signals, **drawn.signals},
            text={**tokens.text, **drawn.text},
        )

    def _sized(self, tokens: VisualTokens) -> VisualTokens:
        """The same with the true widths and dtypes, and nothing in it: for costs alone."""
        shape, tower = self.shape, self.adapter.vision_width
        half = {2: torch.bfloat16, 4: torch.float32}.get(self.size, torch.float32)
        widths = {
            "keys": (tower // self.adapter.vision_heads, torch.float32),
            "joint_keys": (tower, torch.float32),
            "unprojected": (tower, half),
            "llm_keys": (shape.kv_heads * shape.head_dim, half),
            "llm_keys_ahead": (shape.kv_heads * shape.head_dim, half),
            "llm_prompt": (shape.hidden, half),
            "llm_states": (shape.hidden, half),
            "llm_text_heads": (shape.heads, torch.float32),
        }

        def empty(signal: Signal, value: Tensor) -> Tensor:
            if signal.name not in widths:
                return value.to("meta")
            width, dtype = widths[signal.name]
            return torch.empty(*value.shape[:-1], width, device="meta", dtype=dtype)

        def wide(value: Tensor) -> Tensor:
            return torch.empty(len(value), shape.hidden, device="meta", dtype=half)

        asked = tokens.entered is not None and _INPUTS in self.needs
        inputs = tokens.inputs if asked else None
        return replace(
            tokens,
            features=wide(tokens.features),
            signals={signal: empty(signal, value) for signal, value in tokens.signals.items()},
            text={signal: empty(signal, value) for signal, value in tokens.text.items()},
            inputs=None if inputs is None else (wide(inputs[0]), wide(inputs[1])),
        )
