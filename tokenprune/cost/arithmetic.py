"""Computes FLOPs and bytes of models, signals and packing from shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenprune.facts import active_width
from tokenprune.signals import SIGNALS, Kept, Signal
from tokenprune.units import CHUNK

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter
    from tokenprune.facts import VisionFacts
    from tokenprune.tokens import Encoding, VisualTokens

__all__ = [
    "DecoderShape",
    "VisionShape",
    "copied_bytes",
    "encoder_flops",
    "held_bytes",
    "merging_bytes",
    "prefill_flops",
    "signal_bytes",
    "signal_flops",
    "signal_widths",
    "view_flops",
]


def signal_widths(adapter: Adapter) -> dict[str, int]:
    """Name of a signal to the size of its last axis, if the model determines it."""
    vision = adapter.facts.vision
    sizes = {
        "vision_width": vision.hidden,
        "vision_head_width": vision.hidden // vision.heads,
        "projector_width": vision.hidden * vision.merge_size**2,
    }
    if adapter.has_language_model:
        sizes |= DecoderShape.of(adapter.language_model.config).widths
    return {
        name: sizes[info.shape[-1]] for name, info in SIGNALS.items() if info.shape[-1] in sizes
    }


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder that determine its cost."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> DecoderShape:
        """Read from the text config of a ``transformers`` model."""
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=active_width(config),
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )

    @property
    def widths(self) -> dict[str, int]:
        """Sizes of the axes of signals (`tokenprune.signals.AXES`)."""
        kv_width = self.kv_heads * self.head_dim
        return {"heads": self.heads, "hidden": self.hidden, "kv_width": kv_width}

    def kv_bytes(self, size: int) -> int:
        """Bytes of one token in one layer's KV cache, at ``size`` bytes a number."""
        return 2 * self.kv_heads * self.head_dim * size

    def row_flops(
        self, tokens: int, recomputed: bool, rows: int = 1, projected: int | None = None
    ) -> float:
        """FLOPs of attention rows over ``tokens`` keys: projections, and products of all heads.

        Args:
            tokens: Number of keys.
            recomputed: Whether the keys are projected again, because no KV cache has them.
            rows: Number of queries.
            projected: Number of states that are projected to queries; None for one per row.
        """
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        again = 2 * tokens * self.hidden * key if recomputed else 0
        asking = rows if projected is None else projected
        return asking * 2 * self.hidden * query + rows * 2 * tokens * query + again

    def row_bytes(
        self, tokens: int, recomputed: bool, size: int, rows: int = 1, kept: Kept = "mean"
    ) -> int:
        """Peak bytes while attention rows are computed.

        They contain the normalised input of the layer; recomputed keys, with three copies during
        the rotation; the float32 logits, masked logits and softmax of all heads, for at most
        `CHUNK` queries at a time; and the stored rows, in parts and concatenated.
        The sum over queries takes less on the CPU, which computes fewer heads at a time.

        Args:
            tokens, recomputed, rows: As in `row_flops`.
            size: Bytes of a number in the model.
            kept: The stored form: the mean over heads of every query, all heads of every query, or
                the sum over queries.
        """
        states = tokens * self.hidden
        keys = tokens * self.kv_heads * self.head_dim * size if recomputed else 0
        wide, chunk = 4 * tokens, min(rows, CHUNK)
        of_each = {"mean": 1, "heads": self.heads, "sum": 0}[kept]
        working = wide * (3 * self.heads * chunk + (rows - chunk) * of_each)
        joined = wide * 2 * rows * of_each
        peak = states * size + max(4 * keys, keys + max(working, joined))
        return max(peak, 8 * states) if recomputed else peak  # RMSNorm computes in float32

    def vector_bytes(self, tokens: int, size: int, name: str) -> int:
        """Bytes of the copies while the vectors of a signal are computed for all tokens."""
        info = SIGNALS[name]
        copies, dtype = info.copies or (0, "model")
        return copies * tokens * self.widths[info.shape[-1]] * (4 if dtype == "float32" else size)


def prefill_flops(tokens: Sequence[int], shape: DecoderShape) -> float:
    """FLOPs of a prefill in which layer ``l`` processes ``tokens[l]`` tokens.

    Per layer ``2n(4d² + 3dm) + 4n²d`` for ``n`` tokens, width ``d`` and MLP width ``m``, the
    projections adjusted for grouped-query attention.  Attention products are counted without the
    causal mask, as in the efficiency tables of the GlobalCom² repository (LLaVA-NeXT-7B, 2880
    tokens: 41.7 TFLOPs).
    """
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    linear = 2 * shape.hidden * (2 * query + 2 * key_value + 3 * shape.intermediate)
    return float(sum(n * linear + 4 * n * n * query for n in tokens))


def signal_flops(
    signals: Iterable[Signal],
    vision: VisionFacts,
    views: int,
    attended: Sequence[int] | None = None,
) -> float:
    """FLOPs of the attention rows that signals of the vision encoder need.

    A signal needs one row, or one for each token of a view (`SignalInfo.queries`).  Projections and
    the row of a pooling head do not count, because the model computes them without the signal too.

    Args:
        signals: The signals; those of the language model do not count here.
        vision: Facts about the vision encoder.
        views: Number of views.
        attended: Number of tokens of a view in each layer, if a method acted inside the encoder.
    """
    total = 0.0
    for signal in signals:
        if signal.in_llm or signal.needs_head:
            continue
        keys = vision.tokens if attended is None else attended[signal.layer]
        whole = vision.pairs(signal.layer) if attended is None else keys**2
        pairs = whole if signal.resolve(vision.has_cls).info.queries == "all" else keys
        total += 2 * views * pairs * vision.hidden
    return total


def signal_bytes(
    signals: Iterable[Signal],
    vision: VisionFacts,
    views: int,
    size: int,
    attended: Sequence[int] | None = None,
) -> int:
    """Bytes that the signals of the vision encoder hold until they are packed.

    Queries and keys of every layer that is read are held after the layer.  The largest signal adds
    float32 copies of them, if ``size`` is smaller, and the logits and the softmax of one row, or of
    `CHUNK` rows at a time.

    Args:
        signals, vision, views, attended: As in `signal_flops`.
        size: Bytes of a number in the model.
    """
    seen = [signal for signal in signals if signal.in_vision_layer]

    def keys_of(layer: int) -> int:
        return vision.tokens if attended is None else attended[layer]

    wide = 2 * views * vision.hidden
    kept = sum(wide * keys_of(layer) * size for layer in {signal.layer for signal in seen})
    most = 0
    for signal in seen:
        keys, info = keys_of(signal.layer), signal.resolve(vision.has_cls).info
        queries = {"none": 0, "one": 1, "all": min(CHUNK, keys)}[info.queries]
        copies = wide * keys * 4 if size < 4 else 0
        if not queries:
            copies //= 2  # keys only
        heads = 1 if info.joint_heads else vision.heads
        most = max(most, copies + 2 * 4 * views * heads * queries * keys)
    return kept + most


def merging_bytes(encoding: Encoding, width: int, views: int, size: int) -> int:
    """Peak bytes of merging inside the vision encoder, over its layers.

    Queries and keys are held after the attention; states and their weighted sums are in float32.

    Args:
        encoding: The record of the encoder's run.
        width: Width of the encoder.
        views: Number of views that ran together.
        size: Bytes of a number in the encoder.
    """
    layers = zip(encoding.attended, encoding.processed, strict=True)
    most = max((2 * size * n + 4 * (n + 2 * left) for n, left in layers if left < n), default=0)
    return views * width * most


def copied_bytes(slots: int, merged: int, shape: DecoderShape, size: int) -> int:
    """Bytes of the ``merged`` vectors, and of the copy of the prompt's ``slots`` for them."""
    return (slots + merged) * shape.hidden * size if merged else 0


def held_bytes(tokens: VisualTokens, *, inside: bool, needs: Iterable[Signal] | None = None) -> int:
    """Bytes that a method receives of one image beyond the tensors of the model.

    These are the signals and, inside the language model, the copies of hidden states, text vectors
    and `VisualTokens.inputs`.  Vectors that are computed for all tokens count twice, because those
    of the image are a copy.

    Args:
        tokens: The image.
        inside: Whether the method acts inside the language model.
        needs: Signals that the method asks for; None for all of ``tokens``.
    """
    asked = set(tokens.signals if needs is None else map(tokens.found_as, needs))
    shown = [value for signal, value in tokens.signals.items() if signal in asked]
    if inside:
        shown += [tokens.features, *tokens.text.values(), *(tokens.inputs or ())]
        shown += [value for one, value in tokens.signals.items() if one.info.is_of_all_tokens]
    return sum(value.numel() * value.element_size() for value in shown)


@dataclass(frozen=True)
class VisionShape:
    """The sizes of a vision encoder that determine its cost."""

    layers: int
    hidden: int
    intermediate: int

    @classmethod
    def of(cls, config: Any) -> VisionShape:
        """Read from the vision config of a ``transformers`` model."""
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
        )


def view_flops(vision: VisionFacts, out: int) -> float:
    """FLOPs of the vision encoder on one view.

    As `encoder_flops`, with the gate of the MLP (``3dm`` in place of ``2dm``), with the pairs of
    windowed layers (`VisionFacts.pairs`), and with the projectors that join ``k`` patches into one
    visual token: ``2(kd)² + 2kd * out`` for every token, once for each of `VisionFacts.mergers`.

    Args:
        vision: Facts about the encoder and the view (`VisionFacts.at`).
        out: Width of the language model.
    """
    wide, matrices = vision.hidden, 3 if vision.gated else 2
    linear = vision.tokens * 2 * wide * (4 * wide + matrices * vision.intermediate)
    total = sum(linear + 4 * wide * vision.pairs(layer) for layer in range(vision.layers))
    joined = wide * vision.merge_size**2
    tokens = vision.tokens // vision.merge_size**2
    return float(total + vision.mergers * tokens * 2 * joined * (joined + out))


def encoder_flops(
    tokens: Sequence[int], shape: VisionShape, mlp_tokens: Sequence[int] | None = None
) -> float:
    """FLOPs of the layers of a vision encoder on one view.

    Per layer ``2n * 4d² + 4n²d`` for the attention over ``n`` tokens and ``2n' * 2dm`` for the
    following MLP over ``n'`` tokens, of width ``m`` and without a gate.  Patch embedding and
    projector are not counted, nor are embedding and head in `prefill_flops`.

    Args:
        tokens: Number of tokens in the attention of each layer that runs, CLS token included.
        shape: Sizes of the encoder.
        mlp_tokens: Number of tokens in the MLP of each layer, if tokens are merged in front of it.
    """
    linear = 2 * 4 * shape.hidden**2
    mlp = 2 * 2 * shape.hidden * shape.intermediate
    pairs = zip(tokens, tokens if mlp_tokens is None else mlp_tokens, strict=True)
    return float(sum(n * linear + 4 * n * n * shape.hidden + left * mlp for n, left in pairs))
