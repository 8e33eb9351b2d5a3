"""The cost of a method at given shapes, computed without weights, images or a forward.

The method's code runs on random tokens with the layout of the images, at the same points of the
prefill as in the engine.  Rounding, separators and several cuts therefore have their real effect,
and `tokenprune.cost.account` computes the ledger, as in the engine.  If the number of kept tokens
depends on the content of an image, draws differ, and the forecast is an estimate.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenprune.adapter import Adapter, ModelLike, adapter_of
from tokenprune.compatibility import check_compatible
from tokenprune.compressor import Compressor, placed
from tokenprune.cost.account import Account, Attended, Images, Sizes, attended_for
from tokenprune.cost.arithmetic import signal_widths
from tokenprune.cost.ledger import Ledger
from tokenprune.encoder import EncoderCompressor, encoder_part
from tokenprune.engine.decoder import tapped_layers
from tokenprune.engine.tower import dry_run
from tokenprune.errors import RetentionWarning
from tokenprune.layout import TokenLayout
from tokenprune.signals import Signal
from tokenprune.synthetic import sample_tokens
from tokenprune.tokens import VisualTokens

__all__ = ["Forecast", "forecast"]

_INPUTS, _PROMPT = Signal("llm_inputs"), Signal("llm_prompt")


@dataclass(frozen=True)
class Forecast:
    """The ledgers of several random draws.

    Attributes:
        draws: One `Ledger` for each draw.
        by_content: Whether counts depend on the image even if all draws agree.  They do if patches
            merge in the vision encoder, because clusters inside the canvas padding are dropped.
    """

    draws: tuple[Ledger, ...]
    by_content: bool = False

    @property
    def ledger(self) -> Ledger:
        """The ledger with the median layer average."""
        ordered = sorted(self.draws, key=lambda one: one.layer_average)
        return ordered[len(ordered) // 2]

    @property
    def exact(self) -> bool:
        """Whether all draws process the same number of tokens in every layer.

        A few draws may miss rounding that depends on the content in rare cases.
        """
        return not self.by_content and len({one.visual_per_layer for one in self.draws}) == 1

    @property
    def mark(self) -> str:
        """``≈`` if the counts depend on the content, else an empty string."""
        return "" if self.exact else "≈"


def forecast(
    model: ModelLike,
    compressor: Compressor | None,
    layouts: Sequence[TokenLayout],
    text: int = 0,
    *,
    asking: int | Sequence[int] | None = None,
    size: int = 2,
    draws: int = 5,
) -> Forecast:
    """Forecast the ledger of one prompt's prefill with a KV cache.

    Args:
        model: A model, which may be on the ``meta`` device, its adapter or its pipeline.
        compressor: The method, or None.
        layouts: Layouts of the prompt's images and videos (`Adapter.layout`).
        text: Number of text tokens.
        asking: Number of text tokens after the images, for methods that use text as queries; one
            number for each image or video if text is between them.  By default, all text tokens
            follow the images.  If there are none, one uncounted token replaces them.
        size: Bytes of a number: 2 for half precision.
        draws: Number of random draws that the method runs on.

    Raises:
        UserError: The model lacks what the method needs.
    """
    adapter = adapter_of(model)
    if compressor is not None:
        check_compatible(adapter.facts, compressor)
    after = text if asking is None else asking
    each = [after] * len(layouts) if isinstance(after, int) else after
    each = [max(1, number) for number in each]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RetentionWarning)
        made = [
            _Draw(adapter, compressor, layouts, text, each, size, seed).ledger()
            for seed in range(draws)
        ]
    part = encoder_part(compressor)
    return Forecast(tuple(made), part is not None and bool(layouts) and part.by_content)


class _Draw:
    """The state of one random prompt while it passes through the model."""

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
        self.needs = needs = compressor.needs if compressor is not None else frozenset[Signal]()
        self.sizes = Sizes.of(adapter)
        self.before, self.inside = placed(compressor, self.sizes.decoder.layers)
        self.account = Account(self.sizes, compressor, self.inside, needs)
        self.attended: list[Attended] = []
        encoded = frozenset(signal for signal in needs if not signal.in_llm)
        self.images = [
            sample_tokens(
                encoded | (needs & {_PROMPT}), layout, seed=1000 * seed + index, text=words
            )
            for index, (layout, words) in enumerate(zip(layouts, asking, strict=True))
        ]
        part = encoder_part(compressor)
        if part is not None:
            self.images = [self._encoded(part, tokens) for tokens in self.images]
        self.account.encode([(one.layout, one.encoding) for one in self.images], size)

    def _encoded(self, part: EncoderCompressor, tokens: VisualTokens) -> VisualTokens:
        """``tokens`` as a vision encoder that runs under ``part`` returns them."""
        run = dry_run(self.adapter, part, tokens.layout, self.seed)
        clusters = run.clusters([tokens.layout], self.adapter.view_shape)[0]
        return replace(tokens, clusters=clusters, encoding=run.encoding)

    def ledger(self) -> Ledger:
        """Run the method and compute the ledger."""
        for part in self.before:
            self._select(part, self.images)
        entered = [tokens.layout for tokens in self.images]
        self.images = [
            replace(
                tokens,
                entered=len(tokens.layout.patches),
                inputs=sample_tokens(frozenset(), tokens.layout, seed=self.seed, text=words).inputs,
            )
            for tokens, words in zip(self.images, self.asking, strict=True)
        ]
        self.account.count(0, sum(map(len, self.images)))
        for layer, part in self.inside.items():
            if self.images:
                self.attended += self._attended(part, layer)
            given = [
                self._between_layers(part, tokens, words)
                for tokens, words in zip(self.images, self.asking, strict=True)
            ]
            self._select(part, given, tapped_layers(part.needs, {layer: part}))
            self.account.count(layer, sum(map(len, self.images)))
        after = [tokens.layout for tokens in self.images]
        layouts = Images(before=self.layouts, entered=entered, after=after)
        return self.account.ledger(layouts, self.attended, text=self.text, size=self.size)

    def _select(
        self, part: Compressor, given: Sequence[VisualTokens], tapped: Iterable[int] = ()
    ) -> None:
        """Run the selections of ``part`` for every image, and enter their cost."""
        sized = [self._sized(tokens) for tokens in self.images]
        self.account.begin(sized)
        left = []
        each = zip(self.images, sized, given, self.layouts, strict=True)
        for tokens, known, shown, full in each:
            selection = part(shown)
            wide = known if shown is tokens else self._sized(shown)
            self.account.select(part, known, wide, selection, full, tapped)
            left.append(tokens.take(selection.keep))
        self.images = left

    def _attended(self, part: Compressor, layer: int) -> list[Attended]:
        """Attention rows and keys that the engine computes for ``part`` in front of ``layer``."""
        found = []
        for signal in part.needs:
            each = list(zip(self.images, self.asking, strict=True))
            for tokens, words in each if signal.info.scope == "image" else each[:1]:
                text, patches = min(words, self.text), len(tokens.layout.patches)
                normed = self.sizes.facts.decoder.query_norms
                found.append(attended_for(signal, layer, text=text, patches=patches, normed=normed))
        return [one for one in found if one is not None]

    def _between_layers(self, part: Compressor, tokens: VisualTokens, words: int) -> VisualTokens:
        """One image, followed by ``words`` text tokens, as ``part`` receives it between layers."""
        wanted = frozenset(signal for signal in part.needs if signal.in_llm)
        drawn = sample_tokens(wanted, tokens.layout, seed=self.seed + 7, text=words)
        return replace(
            tokens,
            features=drawn.features,
            signals={**tokens.signals, **drawn.signals},
            text={**tokens.text, **drawn.text},
        )

    def _sized(self, tokens: VisualTokens) -> VisualTokens:
        """``tokens`` with the real widths and dtypes, on the ``meta`` device, to compute costs."""
        half = {2: torch.bfloat16, 4: torch.float32}.get(self.size, torch.float32)
        widths = signal_widths(self.adapter)

        def empty(signal: Signal, value: Tensor) -> Tensor:
            if signal.name not in widths:
                return value.to("meta")
            dtype = half if signal.info.dtype == "model" else torch.float32
            sizes = *value.shape[:-1], widths[signal.name]
            return torch.empty(sizes, device="meta", dtype=dtype)

        def wide(value: Tensor) -> Tensor:
            return torch.empty(len(value), self.sizes.decoder.hidden, device="meta", dtype=half)

        asked = tokens.entered is not None and _INPUTS in self.needs
        inputs = tokens.inputs if asked else None
        return replace(
            tokens,
            features=wide(tokens.features),
            signals={signal: empty(signal, value) for signal, value in tokens.signals.items()},
            text={signal: empty(signal, value) for signal, value in tokens.text.items()},
            inputs=None if inputs is None else (wide(inputs[0]), wide(inputs[1])),
        )
