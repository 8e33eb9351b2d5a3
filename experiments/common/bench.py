"""Times and memory of real prefills and decode steps."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from tokenprune.adapter import Adapter
from tokenprune.compressor import Compressor
from tokenprune.cost.arithmetic import DecoderShape, signal_widths
from tokenprune.cost.ledger import Ledger
from tokenprune.engine.cache import CACHE
from tokenprune.engine.session import compress
from tokenprune.engine.vision import encoded, observing
from tokenprune.experiments.common.patch_boxes import ViewSize
from tokenprune.experiments.common.prompt import Prompt
from tokenprune.experiments.common.timing import Timing, median_of, peak_memory, synchronise, timed
from tokenprune.layout import TokenLayout
from tokenprune.signals import Signal
from tokenprune.synthetic import sample_tokens

__all__ = [
    "Bench",
    "Curve",
    "Measurement",
]


DECODED = 6  # tokens whose decoding is timed


WARM_UP = 1


@dataclass(frozen=True)
class Curve:
    """Seconds over a number of tokens ``n``: ``a + b n + c n²``, none of them negative."""

    a: float
    b: float
    c: float

    @classmethod
    def through(cls, tokens: Sequence[int], seconds: Sequence[float]) -> "Curve":
        """The least-squares fit of the relative errors."""
        n, y = np.asarray(tokens, dtype=float), np.maximum(np.asarray(seconds, dtype=float), 1e-9)
        scale = n.max()
        terms = np.stack([np.ones_like(n), n / scale, (n / scale) ** 2], axis=1)
        found, _ = nnls(terms / y[:, None], np.ones_like(y))
        return cls(float(found[0]), float(found[1] / scale), float(found[2] / scale**2))

    def __call__(self, tokens: float) -> float:
        return self.a + self.b * tokens + self.c * tokens * tokens


@dataclass(frozen=True)
class Measurement:
    """Time and memory of one method.

    Attributes:
        prefill: Time of the language model, without `selector`.
        selector: Time of the selection, with attention rows and packing, without the signals of the
            vision encoder.
        decode: Time of a decode step.
        peak: Peak bytes of the prefill, with the KV cache, without weights.
        ledger: The ledger of the prefill.
    """

    prefill: Timing
    selector: Timing
    decode: Timing
    peak: int
    ledger: Ledger


@dataclass(eq=False)
class Bench:
    """Times methods on a model.

    Attributes:
        adapter: Of a model with weights, which may be random.
        prompt: The prompt; its adapter may be another one, of the full depth.
        batch_size: Prompts that run at once.
        repeats: Timed runs of each part, after one warm-up.
    """

    adapter: Adapter
    prompt: Prompt
    batch_size: int = 1
    repeats: int = 5
    _seen: dict[frozenset[Signal], Timing] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.adapter.device

    @property
    def depth(self) -> int:
        """The number of decoder layers of this model."""
        return len(self.adapter.decoder_layers)

    @cached_property
    def shape(self) -> DecoderShape:
        """The shape of the decoder of this model."""
        return DecoderShape.of(self.adapter.language_model.config)

    def _timed(self, work: Callable[[], Any]) -> Timing:
        return timed(work, warmup=WARM_UP, repeats=self.repeats, device=self.device)

    def _states(self, length: int) -> Tensor:
        """(B, length, D) random hidden states."""
        shape = self.batch_size, length, self.shape.hidden
        return torch.randn(shape, device=self.device, dtype=self.adapter.model.dtype)

    def _image_size(self) -> tuple[int, int]:
        """(height, width) in pixels of the prompt's image."""
        if self.prompt.image_size is not None:
            return self.prompt.image_size
        vision = self.adapter.facts.vision
        if vision.native:
            rows, cols = self.prompt.layouts[0].view_shape
            tall, wide = (side * vision.merge_size for side in vision.patch_size)
            return rows * tall, cols * wide
        side = 2 * ViewSize.of(self.adapter).side
        return side, side

    # -- the parts ---------------------------------------------------------------------------------

    @torch.no_grad()
    def vision(self, signals: frozenset[Signal] = frozenset()) -> Timing:
        """Time of the vision encoder on the prompt's image, with those ``signals`` it produces."""
        wanted = frozenset(signal for signal in signals if not signal.in_llm)
        if wanted not in self._seen:
            call = self.adapter.dummy_images([self._image_size()] * self.batch_size)
            dtype = self.adapter.model.dtype
            moved = {
                name: value.to(self.device, dtype if value.is_floating_point() else None)
                for name, value in call.items()
            }
            encode = self.adapter.encoders["image"]
            with observing(self.adapter, wanted):
                self._seen[wanted] = self._timed(
                    lambda: getattr(self.adapter.base, encode)(**moved)
                )
        return self._seen[wanted]

    def signals(self, method: Compressor) -> float:
        """Seconds that the signals of ``method`` add to the vision encoder."""
        return max(0.0, self.vision(method.needs).median - self.vision().median)

    @cached_property
    def outside(self) -> float:
        """Seconds of the final norm and the output head, for one position of each prompt."""
        states = torch.randn(
            self.batch_size,
            1,
            self.shape.hidden,
            device=self.device,
            dtype=self.adapter.model.dtype,
        )
        norm, head = self.adapter.language_model.norm, self.adapter.model.get_output_embeddings()
        with torch.no_grad():
            return self._timed(lambda: head(norm(states))).median

    @cached_property
    def layer(self) -> Curve:
        """Seconds of one decoder layer as a function of the tokens that it processes."""
        longest = self.prompt.visual + max(1, self.prompt.text)
        lengths = sorted({max(1, longest * share // 8) for share in (1, 2, 4, 6, 8)})
        language, seconds = self.adapter.language_model, []
        with torch.no_grad():
            for length in lengths:
                states = self._states(length)
                whole = self._timed(partial(language, inputs_embeds=states, use_cache=True))
                seconds.append(whole.median / self.depth)
        return Curve.through(lengths, seconds)

    @torch.no_grad()
    def run(
        self, method: Compressor | None, layouts: Sequence[TokenLayout] | None = None
    ) -> Measurement:
        """Time and memory of ``method`` on the prompt, or on one with other ``layouts``."""
        needs = method.needs if method is not None else frozenset()
        inputs = self._inputs(needs, layouts or self.prompt.layouts)
        watch = _Watch(self.device)
        selecting: list[float] = []
        gc.collect()  # so that no garbage of earlier runs is freed while memory is measured
        peak = self.watched(method, partial(peak_memory, device=self.device), inputs)
        with compress(self.adapter.model, method) as trace:
            trace.around = watch.running

            def prefill() -> Any:
                watch.seconds = 0.0
                out = self._forward(inputs())
                selecting.append(watch.seconds)
                return out

            whole = self._timed(prefill)
            selected = selecting[-len(whole.runs) :]
            ledger = trace.ledgers[0]
            decode = self._decode(inputs())
        rest = [total - part for total, part in zip(whole.runs, selected, strict=True)]
        return Measurement(median_of(rest), median_of(selected), decode, peak, ledger)

    @torch.no_grad()
    def watched(
        self,
        method: Compressor | None,
        watch: Callable[[Callable[[], Any]], int],
        inputs: Callable[[], dict[str, Any]] | None = None,
    ) -> int:
        """What ``watch`` returns about a function that runs one prefill under ``method``."""
        needs = method.needs if method is not None else frozenset()
        fresh = (inputs or self._inputs(needs, self.prompt.layouts))()
        with compress(self.adapter.model, method):
            return watch(lambda: self._forward(fresh))

    def _forward(self, inputs: dict[str, Any]) -> Any:
        return self.adapter.model(**inputs, use_cache=True, logits_to_keep=1)

    def _decode(self, inputs: dict[str, Any]) -> Timing:
        """Time of a decode step after the prompt."""
        out, mask = self._forward(inputs), inputs["attention_mask"]
        cache, seconds = getattr(out, CACHE), []
        token = torch.full((self.batch_size, 1), 5, device=self.device)
        for _ in range(WARM_UP + DECODED):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            step = {"input_ids": token, CACHE: cache}
            if not self.adapter.multimodal_positions:  # those would be numbered from the mask
                step["attention_mask"] = mask
            synchronise(self.device)
            start = time.perf_counter()
            self.adapter.model(**step, use_cache=True, logits_to_keep=1)
            synchronise(self.device)
            seconds.append(time.perf_counter() - start)
        return median_of(seconds[WARM_UP:])

    def _inputs(
        self, needs: frozenset[Signal], layouts: Sequence[TokenLayout]
    ) -> Callable[[], dict[str, Any]]:
        """A function that makes new inputs: ids, and synthetic features with their signals."""
        adapter, dtype = self.adapter, self.adapter.model.dtype
        widths = {"features": self.shape.hidden, **signal_widths(adapter)}
        wanted = frozenset(signal for signal in needs if not signal.in_llm)
        records = []
        for index, layout in enumerate(layouts):
            made = sample_tokens(wanted, layout, seed=index, widths=widths)
            moved = {signal: value.to(self.device) for signal, value in made.signals.items()}
            records.append(
                replace(
                    made,
                    layout=layout.to(self.device),
                    features=0.02 * made.features.to(self.device, dtype),
                    signals=moved,
                    projector=adapter.projector,
                )
            )
        prompt: list[int] = []
        for layout in layouts:
            prompt += [adapter.facts.placeholders[layout.modality]] * len(layout)
        words = max(1, self.prompt.text)  # every prompt has text
        ids = torch.tensor([[*prompt, *([5] * words)]] * self.batch_size, device=self.device)
        others = {
            **adapter.prompt_arguments(ids),
            **adapter.encoding_arguments([*layouts] * self.batch_size),
        }
        others = {name: value.to(self.device) for name, value in others.items()}

        def make() -> dict[str, Any]:
            features: dict[str, list[Tensor]] = {}
            for record in records * self.batch_size:
                feature = record.features.detach()
                feature.visual = record  # type: ignore[attr-defined]
                features.setdefault(record.layout.modality, []).append(feature)
            return {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                **others,
                "mm_encoder_outputs": {name: encoded(some) for name, some in features.items()},
            }

        return make

    # -- estimates ---------------------------------------------------------------------------------

    def layers_take(self, ledger: Ledger) -> float:
        """Seconds of all decoder layers, from the fitted curve."""
        return sum(map(self.layer, ledger.tokens_per_layer))

    def selector_curve(self, method: Compressor, at: Measurement | None = None) -> Curve:
        """Seconds of selection and encoder signals as a function of the visual tokens."""
        whole = at or self.run(method)
        counts, seconds = [self.prompt.visual], [whole.selector.median]
        for share in (0.25, 0.5):
            side = max(2, round((share * self.prompt.visual) ** 0.5))
            layout = TokenLayout.single((side, side), newline=False)
            counts.append(side * side)
            seconds.append(self.run(method, [layout]).selector.median)
        found = Curve.through(counts, seconds)
        return replace(found, b=found.b + self.signals(method) / self.prompt.visual)

    def price(self, method: Compressor) -> Callable[[Compressor], float]:
        """A function that estimates selection and prefill at any retention ratio, in milliseconds.

        The selection is timed once, at the retention ratio of ``method``.
        """
        selecting = self.run(method).selector.median + self.signals(method)

        def take(one: Compressor) -> float:
            ledger = self.prompt.forecast(one, draws=1).ledger
            return 1000 * (selecting + self.outside + self.layers_take(ledger))

        return take


class _Watch:
    """Adds up the seconds of the blocks inside `running`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        synchronise(self.device)
        start = time.perf_counter()
        try:
            yield
        finally:
            synchronise(self.device)
            self.seconds += time.perf_counter() - start
