"""FLOPs and bytes of models, signals and packing, from shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tokenprune.attention import CHUNK

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter
    from tokenprune.signals import Signal
    from tokenprune.tokens import Encoding, VisualTokens

__all__ = [
    "DecoderShape",
    "Kept",
    "VisionShape",
    "copied_bytes",
    "encoder_flops",
    "held_bytes",
    "kept_of",
    "merging_bytes",
    "prefill_flops",
    "signal_bytes",
    "signal_flops",
]


_OF_ALL = {"llm_states", "llm_keys", "llm_keys_ahead"}


Kept = Literal["mean", "heads", "sum"]
"""What is kept of the attention rows of several queries (`DecoderShape.row_bytes`)."""


def kept_of(names: Iterable[str]) -> Kept:
    """What is kept of the rows that signals of these names are made of; the most, of several."""
    names = set(names)
    if "llm_text_heads" in names:
        return "heads"
    return "sum" if names & {"llm_self", "llm_cross"} and "llm_text" not in names else "mean"


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder that its cost depends on."""

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
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )

    def kv_bytes(self, size: int) -> int:
        """Bytes that one token takes in one layer's KV cache, ``size`` bytes a number."""
        return 2 * self.kv_heads * self.head_dim * size

    def row_flops(self, tokens: int, recomputed: bool, rows: int = 1) -> float:
        """FLOPs of attention rows over ``tokens`` keys: queries, products of all heads, keys.

        Args:
            tokens: How many keys.
            recomputed: Whether the keys have to be projected again (no KV cache to read).
            rows: How many queries.
        """
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        again = 2 * tokens * self.hidden * key if recomputed else 0
        return rows * (2 * self.hidden * query + 2 * tokens * query) + again

    def row_bytes(
        self, tokens: int, recomputed: bool, size: int, rows: int = 1, kept: Kept = "mean"
    ) -> int:
        """Bytes that exist at the same time while such rows are computed.

        The normalised input of the layer, which outlives it; keys that are computed again, with
        three copies of them while they are rotated; float32 logits, masked logits and their softmax
        of all heads, for at most `CHUNK` queries at a time; and what is kept of all queries, once
        as it grows and once joined.

        Args:
            tokens, recomputed, rows: As in `row_flops`.
            size: Bytes of a number in the model.
            kept: Of every query the mean over heads, all heads, or nothing but a sum over queries.
        """
        states = tokens * self.hidden
        keys = tokens * self.kv_heads * self.head_dim * size if recomputed else 0
        wide, chunk = 4 * tokens, min(rows, CHUNK)
        of_each = {"mean": 1, "heads": self.heads, "sum": 0}[kept]
        working = wide * (3 * self.heads * chunk + (rows - chunk) * of_each)
        joined = wide * 2 * rows * of_each
        looking = states * size + max(4 * keys, keys + max(working, joined))
        return max(looking, 8 * states) if recomputed else looking  # RMSNorm works in float32

    def vector_bytes(self, tokens: int, size: int, name: str) -> int:
        """Bytes at work while all tokens' ``llm_states`` are normed or ``llm_keys`` moved."""
        if name == "llm_states":
            return 8 * tokens * self.hidden  # in float32
        return 3 * tokens * self.kv_heads * self.head_dim * size


def prefill_flops(tokens: Sequence[int], shape: DecoderShape) -> float:
    """FLOPs of a prefill in which layer ``l`` processes ``tokens[l]`` tokens.

    Per layer ``2n(4d² + 3dm) + 4n²d`` for ``n`` tokens, width ``d`` and MLP width ``m``, the
    projections adjusted for grouped-query attention; non-causal count of the attention products,
    as in the efficiency tables of the GlobalCom² repository (LLaVA-NeXT-7B, 2880 tokens: 41.7
    TFLOPs).
    """
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    linear = 2 * shape.hidden * (2 * query + 2 * key_value + 3 * shape.intermediate)
    return float(sum(n * linear + 4 * n * n * query for n in tokens))


def signal_flops(
    signals: Iterable[Signal],
    adapter: Adapter,
    views: int,
    attended: Sequence[int] | None = None,
) -> float:
    """FLOPs of the vision tower's attention rows that a method asks for, over ``views`` views.

    ``received`` needs a row for every query, every other kind the CLS row alone; projections run
    anyway.  Keys and unprojected vectors are read off, and a pooling head computes its row anyway.
    ``attended`` says how many tokens of a view each layer saw, where a method acted inside the
    tower.
    """
    total = 0.0
    for signal in signals:
        if signal.in_llm or signal.needs_head:
            continue
        keys = adapter.vision_tokens if attended is None else attended[signal.layer]
        queries = keys if signal.resolve(adapter.has_cls).name == "received" else 1
        total += 2 * views * queries * keys * adapter.vision_width
    return total


def signal_bytes(
    signals: Iterable[Signal],
    adapter: Adapter,
    views: int,
    size: int,
    attended: Sequence[int] | None = None,
) -> int:
    """Bytes that the tower's signals hold until they are packed.

    Queries and keys of every layer that is looked at outlive the layer (``size`` bytes a number,
    and a float32 copy where that is smaller); the logits and the softmax of one row, or of `CHUNK`
    rows at a time for ``received``, come on top, for the largest of the signals.
    """
    seen = [s for s in signals if not s.in_llm and not s.needs_head and s.name != "unprojected"]

    def keys_of(layer: int) -> int:
        return adapter.vision_tokens if attended is None else attended[layer]

    wide = 2 * views * adapter.vision_width
    kept = sum(wide * keys_of(layer) * size for layer in {signal.layer for signal in seen})
    most = 0
    for signal in seen:
        keys = keys_of(signal.layer)
        kind = signal.resolve(adapter.has_cls).name
        copies = wide * keys * 4 if size < 4 else 0
        if kind in ("keys", "joint_keys"):
            copies //= 2  # queries are not looked at
        heads = 1 if kind in ("cls_joint", "joint_keys") else adapter.vision_heads
        queries = {"keys": 0, "joint_keys": 0, "received": min(CHUNK, keys)}.get(kind, 1)
        most = max(most, copies + 2 * 4 * views * heads * queries * keys)
    return kept + most


def merging_bytes(encoding: Encoding, width: int, views: int, size: int) -> int:
    """Bytes that merging inside the vision tower takes, in the layer where it takes most.

    Queries and keys outlive the attention; states and their weighted sums are in float32.

    Args:
        encoding: How the tower ran.
        width: Of the tower.
        views: How many ran together.
        size: Bytes of a number in the tower.
    """
    layers = zip(encoding.attended, encoding.processed, strict=True)
    most = max((2 * size * n + 4 * (n + 2 * left) for n, left in layers if left < n), default=0)
    return views * width * most


def copied_bytes(slots: int, merged: int, shape: DecoderShape, size: int) -> int:
    """Bytes of ``merged`` vectors and of the copy of all ``slots`` of a prompt they are put in."""
    return (slots + merged) * shape.hidden * size if merged else 0


def held_bytes(tokens: VisualTokens, *, inside: bool, needs: Iterable[Signal] | None = None) -> int:
    """Bytes of all that a strategy is shown of one image beyond what the model holds anyway.

    Signals, and inside the language model the copies that are made of hidden states and of what
    entered: features, text vectors, `VisualTokens.inputs`.  Vectors that the layers make of all
    tokens count twice, as the image's are a copy of its part.

    Args:
        tokens: What is known of the image.
        inside: Whether the strategy acts inside the language model.
        needs: Signals that it asked for, others being there for somebody else; None for all.
    """
    asked = set(tokens.signals if needs is None else map(tokens.found_as, needs))
    shown = [value for signal, value in tokens.signals.items() if signal in asked]
    if inside:
        shown += [tokens.features, *tokens.text.values(), *(tokens.inputs or ())]
        shown += [value for signal, value in tokens.signals.items() if signal.name in _OF_ALL]
    return sum(value.numel() * value.element_size() for value in shown)


@dataclass(frozen=True)
class VisionShape:
    """The sizes of a vision tower that its cost depends on."""

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


def encoder_flops(
    tokens: Sequence[int], shape: VisionShape, behind: Sequence[int] | None = None
) -> float:
    """FLOPs of the layers of a vision tower on one view.

    Per layer ``2n * 4d² + 4n²d`` for the attention over ``n`` tokens and ``2n' * 2dm`` for the MLP
    behind it, of width ``m`` and without a gate.  Patch embedding and projector are left out, as
    `prefill_flops` leaves out embedding and head.

    Args:
        tokens: What the attention of each layer that runs sees, CLS token included.
        shape: Of the tower.
        behind: What the MLP of each layer sees, where tokens are merged between the two.
    """
    linear = 2 * 4 * shape.hidden**2
    mlp = 2 * 2 * shape.hidden * shape.intermediate
    pairs = zip(tokens, tokens if behind is None else behind, strict=True)
    return float(sum(n * linear + 4 * n * n * shape.hidden + left * mlp for n, left in pairs))
