"""The selector cost of every method as a share of the prefill of LLaVA-NeXT-7B.

The image is square: 5 views, 2880 patch tokens, features of width 4096.  The method at R = 0.25
and each signal that it needs are measured on random tensors of the real shapes.  The time of the
prefill is that of one real decoder layer times 32.  Its memory is the working memory of a layer,
the KV cache of 32 layers, and their weights; a second figure leaves the weights out.  The memory of
a method is the largest of the selection and of each signal alone.  `Ledger.selector_bytes` also
counts packing and what the engine copies for a method inside the language model.

Methods inside the vision encoder are measured in a CLIP ViT-L/14 with random weights: what they add
to it, as a share of the same prefill, and the whole vision encoder with and without the method.
"""

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import tokenprune as tp
from tokenprune.attention import Projections, decoder_keys
from tokenprune.compatibility import check_compatible
from tokenprune.compressor import Compressor, Stage, cut_layer
from tokenprune.cost.arithmetic import DecoderShape
from tokenprune.encoder import EncoderCompressor
from tokenprune.engine import vision
from tokenprune.engine.decoder import LayerSignals
from tokenprune.engine.forward import Given, Pass, Prompts, Span
from tokenprune.errors import UserError
from tokenprune.experiments.benchmarks import tower
from tokenprune.experiments.benchmarks.record import Figure, noise_of
from tokenprune.experiments.benchmarks.shapes import (
    FIVE_VIEWS,
    LLAVA_NEXT_7B,
    PREFIX,
    TEXT,
    VISION_HEADS,
    VISION_WIDTH,
    dtype_of,
    llava,
    tokens_at,
)
from tokenprune.experiments.benchmarks.watching import host_waits, watching
from tokenprune.experiments.common.timing import Timing, peak_memory, timed
from tokenprune.layout import TokenLayout
from tokenprune.tokens import VisualTokens

GOALS = dict.fromkeys(("globalcom2", "fastv", "visionzip", "fastervlm", "vidcom2", "hired"), 0.01)
GOALS |= dict.fromkeys(("divprune", "cdpruner", "dart", "pyramiddrop", "sparsevlm"), 0.03)
RETENTION = 0.25
TINY = DecoderShape(layers=32, hidden=64, intermediate=96, heads=32, kv_heads=32, head_dim=2)


def measure(quick: bool, device: str, tell: Callable[[str], None]) -> Iterator[Figure]:
    """Shares of the prefill, synchronisations and the largest tensor of every method."""
    layout = TokenLayout.anyres((2, 2), (6, 6), (0, 12, 0, 12)) if quick else FIVE_VIEWS
    shape = TINY if quick else LLAVA_NEXT_7B
    bench = _Bench(shape, layout, device, torch.float32 if quick else dtype_of(device), quick)
    tell("prefill")
    seconds, held, weights = bench.prefill()
    case = "one layer" if quick else "LLaVA-NeXT-7B"
    what = f"one decoder layer times {shape.layers}, {bench.dtype}".replace("torch.", "")
    yield Figure(case=case, figure="prefill", value=seconds, unit="s", note=what)
    yield Figure(case=case, figure="prefill memory", value=held / 2**20, unit="MiB", note=what)
    yield Figure(case=case, figure="weights", value=weights / 2**20, unit="MiB", note=what)
    methods = [tp.create(name, retention=RETENTION) for name in tp.list_methods()]
    inside = [one for one in methods if isinstance(one, EncoderCompressor)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in methods:
            if one not in inside:
                tell(one.name)
                yield from bench.figures(one.name, one, seconds, held, weights)
        side = layout.view_shape[0]
        towers = tower.clip(side, device, bench.dtype, **(tower.SMALL if quick else {}))
        prefill = seconds, held, weights
        yield from tower.figures(inside, layout, shape.hidden, towers, prefill, bench.repeats, tell)
    tell("attention kernels")
    yield from _kernels(device)


class _Bench:
    """One decoder layer of a shape, and random inputs of a selection in front of it."""

    def __init__(
        self, shape: DecoderShape, layout: TokenLayout, device: str, dtype: torch.dtype, quick: bool
    ) -> None:
        self.shape, self.layout, self.device, self.dtype = shape, layout, device, dtype
        self.repeats = 1 if quick else 3
        self.adapter = llava(replace(shape, layers=1), device, dtype)
        self.adapter.model.requires_grad_(False)
        layers: Any = self.adapter.decoder_layers
        layers.extend([layers[0]] * (shape.layers - 1))  # one layer stands for all
        self.layer = layers[0]
        views, patches = layout.views, layout.view_shape[0] * layout.view_shape[1] + PREFIX
        draw = functools.partial(torch.randn, device=device, dtype=dtype)
        self.vision = Projections(
            VISION_HEADS, (VISION_WIDTH / VISION_HEADS) ** -0.5,
            draw(views, patches, VISION_WIDTH), draw(views, patches, VISION_WIDTH),
        )  # fmt: skip
        self.draw = draw

    def _hidden(self, count: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        hidden = self.draw(1, count + TEXT, self.shape.hidden)
        at = torch.arange(count + TEXT, device=self.device)[None]
        return hidden, self.adapter.language_model.rotary_emb(hidden, at)

    def prefill(self) -> tuple[float, float, float]:
        """Seconds of all layers; bytes of one layer at work plus the KV cache; bytes of weights."""
        hidden, rotary = self._hidden(len(self.layout))
        work = functools.partial(self.layer, hidden, position_embeddings=rotary)
        taken = timed(work, warmup=1, repeats=max(1, self.repeats - 1), device=self.device).median
        cache = self.shape.layers * self.shape.kv_bytes(hidden.element_size()) * hidden.shape[1]
        weights = sum(one.numel() * one.element_size() for one in self.layer.parameters())
        layers = self.shape.layers
        return layers * taken, peak_memory(work, self.device) + cache, layers * weights

    def figures(
        self, name: str, compressor: Compressor, seconds: float, held: float, weights: float
    ) -> Iterator[Figure]:
        steps: list[tuple[Compressor, int | float]] = [(compressor, 0)]
        if compressor.cuts:
            steps = [(compressor.at(cut), cut) for cut in compressor.cuts]
        needs = frozenset().union(*(part.needs for part, _ in steps))
        tokens = tokens_at(
            self.layout, needs, self.shape.hidden, dtype=self.dtype, device=self.device
        )
        tokens = replace(tokens, entered=len(tokens.layout.patches))
        memory = 0.0
        choices: list[Timing] = []
        signals: list[Timing] = []
        waits: list[Any] = []
        largest = 0.0
        for part, cut in steps:
            work = functools.partial(part, tokens)
            with watching() as seen:
                selection = work()
            waits.append(host_waits(part, tokens))
            largest = max(largest, seen.largest / len(tokens) ** 2)
            choices.append(timed(work, warmup=0, repeats=self.repeats, device=self.device))
            memory = max(memory, peak_memory(work, self.device))
            for look in self._looks(part, cut, tokens):
                signals.append(timed(look, warmup=1, repeats=self.repeats, device=self.device))
                memory = max(memory, peak_memory(look, self.device))
            tokens = tokens.take(selection.keep)
        goal = GOALS.get(name)
        chosen, asked = (sum(one.median for one in each) for each in (choices, signals))
        spread = math.hypot(*(noise_of(one) * one.median for one in (*choices, *signals)))
        yield Figure(
            case=name, figure="time / prefill", value=(chosen + asked) / seconds, better="low",
            noise=spread / (chosen + asked), goal=goal,
            note=f"selection {1000 * chosen:.3g} ms, signals {1000 * asked:.3g} ms",
        )  # fmt: skip
        yield Figure(
            case=name, figure="memory / prefill", value=memory / (held + weights), better="low",
            goal=goal, note=f"{memory / 2**20:.3g} MiB",
        )  # fmt: skip
        yield Figure(
            case=name, figure="memory / all but weights", value=memory / held, better="low"
        )
        most = max(waits, key=lambda seen: sum(seen.values()))
        yield Figure(
            case=name, figure="host waits a stage", value=sum(most.values()), unit="count",
            better="low", goal=1, note=", ".join(f"{n} {what}" for what, n in most.items() if n),
        )  # fmt: skip
        yield Figure(
            case=name, figure="largest tensor / N x N", value=largest, better="low",
            goal=self.shape.heads - 1, note="fewer elements than one N x N matrix per head",
        )  # fmt: skip

    def _looks(
        self, part: Compressor, cut: int | float, tokens: VisualTokens
    ) -> Iterator[Callable[[], Any]]:
        """What the engine computes for the signals of ``part``, beside the model's own work."""
        for signal in part.needs:
            if signal.info.source == "vision layer":
                compute = vision.COMPUTED[signal.resolve(has_cls=True).name]
                yield functools.partial(compute, self.vision)
        if any(signal.info.source == "decoder layer" for signal in part.needs):
            yield functools.partial(self._inside, part, *self._prompt(part, cut, tokens))

    def _inside(
        self, part: Compressor, layer: int, hidden: Tensor, rotary: Any, state: Pass, span: Span
    ) -> VisualTokens:
        """The tokens that ``part`` receives in front of ``layer``, with its signals."""
        kwargs = {"position_embeddings": rotary}
        signals = LayerSignals(self.adapter)
        rows = signals.everywhere(state, part, layer, hidden, kwargs, _each)
        return signals.tokens(state, span, part, layer, hidden, rows, _each)

    def _prompt(
        self, part: Compressor, cut: int | float, tokens: VisualTokens
    ) -> tuple[int, Tensor, Any, Pass, Span]:
        """A forward in front of a cut: the layer, its input, and the state of the engine."""
        layer, count = cut_layer(cut, self.shape.layers), len(tokens)
        hidden, rotary = self._hidden(count)
        total, index = hidden.shape[1], torch.arange(count)
        keys = decoder_keys(self.layer.self_attn, hidden, rotary)
        held = {"valid": torch.ones(1, total, dtype=torch.bool, device=self.device), "sizes": None}
        ran = SimpleNamespace(keys=keys, values=keys, held=total, **held)
        coming = SimpleNamespace(keys=None, values=None, held=0, **held)
        text = torch.arange(count, total)
        span = Span(
            row=0, first=0, last=count - 1, columns=index, index=index, tokens=tokens,
            layout=tokens.layout.host, carrier=tokens.features, record=tokens, placed=index,
            runs=torch.zeros_like(index), deep=index, there=index, entered=index, asks=total - 1,
        )  # fmt: skip
        state = Pass.start(Given(), hidden, {}, frozenset(range(layer)))
        state.prompts = Prompts(left=[total], text=[text], ends=[total - 1])
        state.spans, state.queries = [span], [text[-1:]]
        layers: list[Any] = [ran] * layer + [coming] * (self.shape.layers - layer)
        state.layers = layers
        state.tapped.update(dict.fromkeys(range(layer), (hidden, rotary)))
        projected = self.layer.self_attn.q_proj(hidden)
        state.projected.update(dict.fromkeys(range(layer), projected))
        return layer, hidden, rotary, state, span


def _each(what: Any, compute: Callable[[], Tensor]) -> Tensor:
    """Nothing is shared."""
    return compute()


def _kernels(device: str) -> Iterator[Figure]:
    """Whether every attention of the testbed runs in a fused kernel of the usual kind."""
    from tokenprune.experiments.common.questions import held_out

    pipe = tp.load("testbed-next", device=device)
    (item,) = held_out(1, 0, "image")
    inputs = pipe.prepare([item.images[0].open()], [item.question])
    modules = [*pipe.model.modules()]
    before = [
        getattr(one.config, "_attn_implementation", "") for one in modules if hasattr(one, "config")
    ]
    slow, eager, ran = 0, 0, 0
    for name in tp.list_methods():
        compressor = tp.create(name, retention=RETENTION)
        if compressor.stage is Stage.ENCODER:
            continue
        try:
            check_compatible(pipe.adapter.facts, compressor)
        except UserError:  # it needs a signal that the testbed lacks
            continue
        ran += 1
        with tp.compress(pipe.model, compressor), watching() as seen:
            pipe.model.generate(**inputs, max_new_tokens=2, do_sample=False)
            inside = [one.config._attn_implementation for one in modules if hasattr(one, "config")]
        slow += seen.attention - seen.fused
        eager += inside != before or not seen.attention
    note = f"over the {ran} methods that run on it, {before[0]}"
    yield Figure(
        case="testbed-next", figure="attention calls not fused", value=slow, unit="count",
        better="low", goal=0, note=note,
    )  # fmt: skip
    yield Figure(
        case="testbed-next", figure="methods that switch kernels", value=eager, unit="count",
        better="low", goal=0, note=note,
    )  # fmt: skip
