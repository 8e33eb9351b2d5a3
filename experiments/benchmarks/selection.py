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
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

import tokenprune as tp
from tokenprune.attention import (
    Projections,
    attention_received,
    cls_row,
    decoder_keys,
    decoder_mass,
    decoder_row,
    decoder_rows,
    key_vectors,
    moved_keys,
    rotary_product,
)
from tokenprune.compatibility import check_compatible
from tokenprune.compressor import Compressor, Stage
from tokenprune.cost.arithmetic import DecoderShape
from tokenprune.encoder import EncoderCompressor
from tokenprune.errors import UserError
from tokenprune.experiments.benchmarks import tower
from tokenprune.experiments.benchmarks.record import Figure
from tokenprune.experiments.benchmarks.shapes import (
    FIVE_VIEWS,
    LLAVA_NEXT_7B,
    PREFIX,
    TEXT,
    VISION_HEADS,
    VISION_WIDTH,
    decoder_config,
    dtype_of,
    tokens_at,
)
from tokenprune.experiments.benchmarks.watching import host_waits, watching
from tokenprune.experiments.common.timing import peak_memory, timed
from tokenprune.layout import TokenLayout
from tokenprune.signals import Signal

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
        config = decoder_config(shape)
        config._attn_implementation = "sdpa"
        self.layer = LlamaDecoderLayer(config, 0).to(device, dtype).requires_grad_(False).eval()
        self.norm = LlamaRMSNorm(shape.hidden).to(device, dtype).requires_grad_(False)
        self.rotary = LlamaRotaryEmbedding(config).to(device)
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
        return hidden, self.rotary(hidden, at)

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
        steps = [(compressor, 0.0)]
        if compressor.cuts:
            steps = [(compressor.at(cut), float(cut)) for cut in compressor.cuts]
        needs = frozenset().union(*(part.needs for part, _ in steps))
        tokens = tokens_at(
            self.layout, needs, self.shape.hidden, dtype=self.dtype, device=self.device
        )
        tokens = replace(tokens, entered=len(tokens.layout.patches))
        chosen = asked = memory = 0.0
        waits: list[Any] = []
        largest = 0.0
        for part, _ in steps:
            work = functools.partial(part, tokens)
            with watching() as seen:
                selection = work()
            waits.append(host_waits(part, tokens))
            largest = max(largest, seen.largest / len(tokens) ** 2)
            chosen += timed(work, warmup=0, repeats=self.repeats, device=self.device).median
            memory = max(memory, peak_memory(work, self.device))
            for signal in part.needs:
                look = self._signal(signal, len(tokens))
                if look is not None:
                    asked += timed(look, repeats=self.repeats, device=self.device).median
                    memory = max(memory, peak_memory(look, self.device))
            tokens = tokens.take(selection.keep)
        goal = GOALS.get(name)
        yield Figure(
            case=name, figure="time / prefill", value=(chosen + asked) / seconds, better="low",
            goal=goal, note=f"selection {1000 * chosen:.3g} ms, signals {1000 * asked:.3g} ms",
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

    def _signal(self, signal: Signal, count: int) -> Callable[[], Any] | None:
        """What the engine computes for ``signal``; None if the model computes it anyway."""
        name = signal.resolve(has_cls=True).name
        vision = self.vision.joint() if name in ("cls_joint", "joint_keys") else self.vision
        if name.startswith("cls"):
            return functools.partial(cls_row, vision, softmax=name != "cls_logits")
        if name == "received":
            return functools.partial(attention_received, vision)
        if name in ("keys", "joint_keys"):
            return functools.partial(key_vectors, vision)
        if not signal.in_llm:
            return None
        hidden, rotary = self._hidden(count)
        attention: Any = self.layer.self_attn
        total, device = hidden.shape[1], self.device
        last = torch.tensor([total - 1], device=device)
        visible = torch.ones(1, total, dtype=torch.bool, device=device)
        if name == "llm_ahead":
            norm = self.layer.input_layernorm
            return lambda: decoder_row(attention, norm(hidden), rotary, last, visible)
        if name == "llm_states":
            return lambda: self.norm(hidden)
        if name == "llm_keys_ahead":
            norm = self.layer.input_layernorm
            return lambda: decoder_keys(attention, norm(hidden), rotary)
        if name == "llm_global":
            return lambda: self._global_row(hidden)
        keys = decoder_keys(attention, hidden, rotary)
        if name == "llm_attention":
            return lambda: decoder_row(attention, hidden, rotary, last, visible, keys)
        if name == "llm_keys":
            back = self.rotary(hidden, torch.zeros(1, 1, dtype=torch.long, device=device))
            return lambda: moved_keys(attention, keys, back)
        both = (rotary[0][0], rotary[1][0])
        asking = torch.arange(total - TEXT, total, device=device)
        if name == "llm_text_rotary":
            return lambda: rotary_product(both, asking)
        if name in ("llm_text", "llm_text_heads"):
            rows = functools.partial(decoder_rows, by_head=name == "llm_text_heads")
            allowed = visible.expand(TEXT, -1)
            return lambda: rows(attention, hidden[0], both, asking, allowed, keys[0])
        if name in ("llm_self", "llm_cross"):
            asks = asking if name == "llm_cross" else torch.arange(count, device=device)
            return lambda: decoder_mass(
                attention,
                hidden[0],
                both,
                asks,
                lambda some: visible.expand(len(some), -1),
                keys[0],
            )
        return None

    def _global_row(self, hidden: Tensor) -> Tensor:
        """Attention of the mean of all states, without rotation, as the engine computes it."""
        states = self.layer.input_layernorm(hidden)
        both = torch.cat([states, states.float().mean(1, keepdim=True).to(states)], 1)
        still = both.new_ones(*both.shape[:2], self.shape.head_dim)
        last = torch.tensor([both.shape[1] - 1], device=self.device)
        visible = torch.ones(both.shape[:2], dtype=torch.bool, device=self.device)
        visible[:, -1] = False
        attention: Any = self.layer.self_attn
        return decoder_row(attention, both, (still, torch.zeros_like(still)), last, visible)


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
