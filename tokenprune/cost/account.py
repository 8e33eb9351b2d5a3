"""Collects the cost of one prompt's prefill while the prompt runs.

The engine enters the events of a real forward, the forecast those of a simulated one.  Only this
module turns the entries into a `Ledger`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from tokenprune.compressor import Compressor, Selection
from tokenprune.cost.arithmetic import (
    DecoderShape,
    VisionShape,
    copied_bytes,
    encoder_flops,
    held_bytes,
    merging_bytes,
    signal_bytes,
    signal_flops,
    view_flops,
)
from tokenprune.cost.ledger import Ledger, settle
from tokenprune.cost.measuring import Work
from tokenprune.layout import TokenLayout
from tokenprune.signals import Kept, Signal
from tokenprune.tokens import Encoding, VisualTokens

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter
    from tokenprune.facts import ModelFacts, VisionFacts

__all__ = [
    "Account",
    "Attended",
    "Images",
    "Sizes",
    "attended_for",
]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that the cost of a prefill depends on.

    Attributes:
        facts: Facts about the model.
        decoder: Sizes of its language model.
        vision: Sizes of its vision encoder.
    """

    facts: ModelFacts
    decoder: DecoderShape
    vision: VisionShape

    @classmethod
    def of(cls, adapter: Adapter) -> Sizes:
        """Read from the configuration of the model."""
        return cls(
            facts=adapter.facts,
            decoder=DecoderShape.of(adapter.language_model.config),
            vision=VisionShape.of(adapter.base.config.vision_config),
        )

    def views(self, layouts: Sequence[TokenLayout]) -> list[tuple[VisionFacts, int]]:
        """The facts for all views of each size, and the number of these views."""
        counts: Counter[VisionFacts] = Counter()
        for layout in layouts:
            counts[self.facts.vision.at(layout)] += layout.views
        return [*counts.items()]


class Attended(NamedTuple):
    """Attention rows, or only keys, that are computed in a decoder layer for a selection.

    Attributes:
        layer: Index of the layer whose number of tokens is the number of keys.
        queries: Number of attention rows, 0 for only keys.
        recomputed: Whether the keys are computed for it, because no KV cache has them.
        kept: How each row is stored.
        row: Row of the batch, or None for every row that has images.
        means: Whether the query is the mean of the queries of all tokens, each projected.
        shared: Whether the queries are those that the model projected for itself.
    """

    layer: int
    queries: int
    recomputed: bool
    kept: Kept = "mean"
    row: int | None = None
    means: bool = False
    shared: bool = False


def attended_for(
    signal: Signal,
    cut: int,
    *,
    cached: bool = True,
    text: int = 0,
    patches: int = 0,
    row: int | None = None,
    normed: bool = False,
) -> Attended | None:
    """The attention rows or keys that are computed for a signal of the language model, or None.

    Vectors that are read from the KV cache do not count, nor do the projections that replace them
    without a KV cache.

    Args:
        signal: The signal.
        cut: The decoder layer in front of which it is used.
        cached: Whether the layer's keys are in a KV cache.
        text: Number of text tokens after the image.
        patches: Number of patch tokens of the image.
        row: Row of the batch, for a signal of one image.
        normed: Whether the decoder normalises queries, so that their mean needs all of them.
    """
    info = signal.info
    ahead = info.layer == "next"  # has as many keys as the layer in front of it
    if info.source != "decoder layer" or (info.queries == "none" and not ahead):
        return None
    queries = {"none": 0, "one": 1, "text": text, "patches": patches}[info.queries]
    layer = signal.layer if info.layer == "named" else cut - 1
    means = normed and signal.name == "llm_global"
    again = ahead or not cached
    return Attended(layer, queries, again, info.kept, row, means, info.shares_queries)


class Images(NamedTuple):
    """Layouts of a prompt's images and videos at three points of the prefill.

    Attributes:
        before: In full.
        entered: In front of the first decoder layer.
        after: In front of the last decoder layer.
    """

    before: Sequence[TokenLayout]
    entered: Sequence[TokenLayout]
    after: Sequence[TokenLayout]


@dataclass(frozen=True)
class _Selected:
    """The inputs of one selection, and the work of its method.

    Attributes:
        work: The work of the method, measured when the ledger is made.
        bytes: Bytes that the method receives of all images.
        tapped: Layers whose attention input is held.
        queried: Whether their queries are held too.
        visual: Number of visual tokens of the prompt in front of the selection.
        merged: Number of merged vectors.
    """

    work: Work
    bytes: int
    tapped: tuple[int, ...]
    queried: bool
    visual: int
    merged: int


class Account:
    """The cost of one prompt's prefill.

    It holds numbers and layouts, but no features and no KV cache, so that it may outlive the
    forward.

    Attributes:
        visual: Number of visual tokens that each decoder layer processes (`count`).
    """

    def __init__(
        self,
        sizes: Sizes,
        compressor: Compressor | None,
        cuts: Mapping[int, Compressor],
        needs: frozenset[Signal],
    ) -> None:
        """Open the account of a prompt.

        Args:
            sizes: Sizes of the model.
            compressor: The compressor of the prompt, or None.
            cuts: Index of a decoder layer to the compressor that selects in front of it.
            needs: Signals that the model computes for the compressor.
        """
        self._sizes, self._cuts, self._needs = sizes, cuts, needs
        self._given = compressor.needs if compressor is not None else frozenset[Signal]()
        self._requested = compressor.retention if compressor is not None else 1.0
        self._runs: Sequence[tuple[TokenLayout, Encoding | None]] = ()
        self._flops, self._bytes = 0.0, 0
        self._selected: list[_Selected] = []
        self._held, self._there = 0, 0  # bytes and visual tokens in front of the next selections
        self.visual = [0] * sizes.decoder.layers

    def encode(self, runs: Sequence[tuple[TokenLayout, Encoding | None]], size: int) -> None:
        """Enter the run of the vision encoder.

        Args:
            runs: For every image or video, its full layout and the record of the encoder's run if a
                method acted inside it.  The record is the same for all of them.
            size: Bytes of a number.
        """
        self._runs = runs
        encoding = runs[-1][1] if runs else None
        attended = None if encoding is None else encoding.attended
        vision, views = self._sizes.facts.vision, 0
        for facts, count in self._sizes.views([layout for layout, _ in runs]):
            self._flops += signal_flops(self._needs, facts, count, attended)
            self._bytes += signal_bytes(self._needs, facts, count, size, attended)
            views += count
        if encoding is not None:
            merging = merging_bytes(encoding, vision.hidden, views, size)
            self._bytes = max(self._bytes, merging)

    def count(self, layer: int, visual: int) -> None:
        """Enter that the decoder layers from ``layer`` on process ``visual`` visual tokens."""
        self.visual[layer:] = [visual] * (len(self.visual) - layer)

    def begin(self, images: Sequence[VisualTokens]) -> None:
        """Enter ``images``, with their signals, in front of the next selections."""
        self._held = sum(held_bytes(one, inside=False, needs=self._given) for one in images)
        self._there = sum(map(len, images))

    def select(
        self,
        part: Compressor,
        known: VisualTokens,
        given: VisualTokens,
        selection: Selection,
        full: TokenLayout,
        tapped: Iterable[int] = (),
    ) -> None:
        """Enter the selection of one image.

        Args:
            part: The method.
            known: The image with the signals from outside the language model.
            given: The image as the method received it, with all signals.
            selection: The selection.
            full: Layout of the whole image or video.
            tapped: Layers whose attention input is held.
        """
        held = self._held
        if given is not known:
            held += held_bytes(given, inside=True) - held_bytes(known, inside=False)
        self._selected.append(
            _Selected(
                work=Work.of(part, given, full),
                bytes=held,
                tapped=tuple(sorted(tapped)),
                queried=any(signal.info.shares_queries for signal in part.needs),
                visual=self._there,
                merged=0 if selection.features is None else len(selection.keep),
            )
        )

    def ledger(
        self,
        images: Images,
        attended: Iterable[Attended],
        *,
        text: int,
        size: int,
        kv_before: Sequence[int] = (),
    ) -> Ledger:
        """Compute the ledger.

        Args:
            images: Layouts of the prompt's images and videos.
            attended: Attention rows and keys that were computed in this prompt's decoder layers.
            text: Number of text tokens of the prompt.
            size: Bytes of a number.
            kv_before: As in the ledger.
        """
        decoder = self._sizes.decoder
        tokens = [text + visual for visual in self.visual]
        flops, held = self._attention(list(attended), tokens, size)
        if images.before:
            held += self._vectors(tokens, size)
        copied = 0
        for one in self._selected:
            states, cost = sum(tokens[layer] for layer in one.tapped), one.work.cost()
            flops += cost.flops
            width = decoder.hidden + one.queried * decoder.heads * decoder.head_dim
            held.append(one.bytes + int(cost.bytes) + states * width * size)
            slots = text + one.visual
            copied = max(copied, copied_bytes(slots, one.merged, decoder, size))
        return settle(
            shape=decoder,
            size=size,
            requested=self._requested,
            before=images.before,
            entered=images.entered,
            after=images.after,
            text=text,
            visual_per_layer=self.visual,
            selector_flops=self._flops + flops,
            selector_bytes=max([self._bytes, *held]),
            merged_bytes=copied,
            kv_before=kv_before,
            vision_flops=sum(
                layout.views * self._encoder_flops(layout, run) for layout, run in self._runs
            ),
            uncompressed_vision_flops=sum(
                layout.views * self._encoder_flops(layout) for layout in images.before
            ),
        )

    def _attention(
        self, attended: Sequence[Attended], tokens: Sequence[int], size: int
    ) -> tuple[float, list[int]]:
        """Total FLOPs of the attention rows, and the peak bytes of each entry."""
        decoder, flops, held = self._sizes.decoder, 0.0, []
        for one in attended:
            count = tokens[one.layer]
            projected = 0 if one.shared else count if one.means else None
            flops += decoder.row_flops(count, one.recomputed, one.queries, projected)
            held.append(decoder.row_bytes(count, one.recomputed, size, one.queries, one.kept))
        return flops, held

    def _vectors(self, tokens: Sequence[int], size: int) -> list[int]:
        """Peak bytes while vectors of all tokens are computed, for each signal of each cut."""
        return [
            self._sizes.decoder.vector_bytes(tokens[layer - 1], size, signal.name)
            for layer, part in self._cuts.items()
            for signal in part.needs
            if signal.info.copies is not None
        ]

    def _encoder_flops(self, layout: TokenLayout, run: Encoding | None = None) -> float:
        """FLOPs of the vision encoder on one view; ``run`` if a method acted inside it."""
        if run is None:
            return view_flops(self._sizes.facts.vision.at(layout), self._sizes.decoder.hidden)
        return encoder_flops(run.attended, self._sizes.vision, run.processed)
