"""The table of signals that a method can ask for, with their sources and costs.

To add a signal, add an entry to `SIGNALS` and a function that computes it: in
`tokenprune.engine.vision` for the vision encoder, in `tokenprune.engine.decoder` for the decoder
layers.  The engine, the ledger, the forecast, the synthetic tokens, the compatibility checks and
the documentation read the entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from tokenprune.errors import unknown

__all__ = [
    "AXES",
    "SIGNALS",
    "Kept",
    "Signal",
    "SignalInfo",
]

AXES: Mapping[str, str] = {
    "N": "entries of the packed sequence",
    "P": "patch tokens",
    "T": "text tokens of the prompt after the image",
    "Q": "tokens of the question in the text encoder",
    "heads": "query heads of a decoder layer",
    "hidden": "width of the language model",
    "kv_width": "key-value heads of a decoder layer times the width of a head",
    "vision_width": "width of the vision encoder",
    "projector_width": "width of what the projector receives: all patches of a token side by side",
    "vision_head_width": "width of a head of the vision encoder",
    "joint_width": "width of the space that images and texts share",
}
"""Name of an axis of a signal to the entries that it counts."""

Source = Literal[
    "vision layer", "pooling head", "projector", "text encoder", "decoder layer", "prompt"
]
Sample = Literal["attention", "logits", "rotation", "vectors"]
Kept = Literal["mean", "heads", "sum"]
"""How the attention rows of several queries are stored."""


@dataclass(frozen=True, kw_only=True)
class SignalInfo:
    """The properties of a signal that do not depend on the model.

    Attributes:
        source: The part of the model that provides it.  A *text encoder* shares a space with a
            vision encoder.  No model here has one, but the caller may provide its signals.
        shape: Its axes, named in `AXES`.
        meaning: A description in one sentence.
        paper: A method that ranks or merges by it, with its arXiv id.
        dtype: ``float32`` for every model, or ``model`` for the dtype of the model.
        layer: The layer that provides it: ``named`` is `Signal.layer`, ``previous`` is the decoder
            layer in front of the cut, ``next`` is the one after the cut, computed ahead of it, and
            ``none`` is for a signal without a layer.
        scope: Whether it is computed once for all tokens of a ``batch``, or for each ``image``.
        queries: The attention rows that are computed for it: ``none``, ``one`` (of the CLS token or
            of the query token), or one for each token of the ``text``, of the ``patches`` or of the
            whole view (``all``).
        joint_heads: Whether all heads are joined into one.
        copies: Number of copies of the vectors of all tokens while they are computed, and their
            dtype (as ``dtype``).  None if there are no copies, or if the cost of the attention rows
            includes them.
        needs_cls: Whether the vision encoder must have a CLS token.
        stands_for: Names of the signals that it stands for: with a CLS token, and without.
        found_in: The attribute of `VisualTokens` that contains it.  Vectors that the decoder layers
            compute for all tokens are in both ``signals`` and ``text``.
        sample: The random numbers that replace it in tests and forecasts: ``attention`` is positive
            and sums to 1 over the entries, ``logits`` and ``vectors`` are normal, and ``rotation``
            is uniform in [1, 2].
    """

    source: Source
    shape: tuple[str, ...]
    meaning: str
    paper: str = ""
    dtype: Literal["float32", "model"] = "float32"
    layer: Literal["named", "previous", "next", "none"] = "named"
    scope: Literal["batch", "image"] = "image"
    queries: Literal["none", "one", "text", "patches", "all"] = "none"
    joint_heads: bool = False
    copies: tuple[int, Literal["float32", "model"]] | None = None
    needs_cls: bool = False
    stands_for: tuple[str, str] | None = None
    found_in: Literal["signals", "text", "inputs"] = "signals"
    sample: Sample = "vectors"

    @property
    def in_llm(self) -> bool:
        """Whether the language model provides it."""
        return self.source in ("decoder layer", "prompt")

    @property
    def is_aligned(self) -> bool:
        """Whether it has a value for each of the N entries."""
        return self.shape[0] == "N"

    @property
    def is_vector(self) -> bool:
        """Whether it has a vector for each of the N entries."""
        return self.is_aligned and len(self.shape) > 1

    @property
    def is_attention(self) -> bool:
        """Whether a higher value means that an entry receives more attention."""
        return self.sample in ("attention", "logits")

    @property
    def is_of_all_tokens(self) -> bool:
        """Whether it has vectors of all tokens, from which those of an image are copied."""
        return self.is_vector and self.scope == "batch"

    @property
    def is_tapped(self) -> bool:
        """Whether the attention input of a decoder layer is kept for it."""
        return self.source == "decoder layer" and self.layer in ("named", "previous")

    @property
    def shares_queries(self) -> bool:
        """Whether it reads the queries that a decoder layer projected for itself.

        For a few queries it is cheaper to project them again than to keep those of all tokens.
        """
        return self.source == "decoder layer" and self.queries == "patches"

    @property
    def kept(self) -> Kept:
        """How each attention row is stored: mean over heads, all heads, or sum over queries."""
        if "heads" in self.shape:
            return "heads"
        return "sum" if self.queries in ("text", "patches") and "T" not in self.shape else "mean"


@dataclass(frozen=True)
class Signal:
    """A tensor that a method asks for besides the features.

    Attributes:
        name: A key of `SIGNALS`.
        layer: Index of the layer of the vision encoder or of the language model; a negative index
            counts from the end.  It is used only if `SignalInfo.layer` is ``named``.

    Raises:
        UnknownNameError: `SIGNALS` has no such name.
    """

    name: str
    layer: int = -1

    def __post_init__(self) -> None:
        if self.name not in SIGNALS:
            raise unknown("signal", self.name, SIGNALS)

    @property
    def info(self) -> SignalInfo:
        """Its entry in `SIGNALS`."""
        return SIGNALS[self.name]

    @property
    def in_llm(self) -> bool:
        """Whether the language model provides it."""
        return self.info.in_llm

    @property
    def needs_cls(self) -> bool:
        """Whether the vision encoder must have a CLS token."""
        return self.info.needs_cls

    @property
    def needs_head(self) -> bool:
        """Whether the vision encoder must have an attention pooling head."""
        return self.info.source == "pooling head"

    @property
    def needs_text_tower(self) -> bool:
        """Whether the model must have a text encoder that shares a space with its patches."""
        return self.info.source == "text encoder"

    @property
    def in_vision_layer(self) -> bool:
        """Whether a layer of the vision encoder provides it."""
        return self.info.source == "vision layer"

    @property
    def is_vector(self) -> bool:
        """Whether it has a vector for each of the N entries, rather than a number."""
        return self.info.is_vector

    @property
    def is_aligned(self) -> bool:
        """Whether it has a value for each of the N entries; otherwise it belongs to the text."""
        return self.info.is_aligned

    def resolve(self, has_cls: bool) -> Signal:
        """The signal that this one stands for in a vision encoder with or without a CLS token."""
        names = self.info.stands_for
        return self if names is None else replace(self, name=names[0 if has_cls else 1])


SIGNALS: Mapping[str, SignalInfo] = {
    # -- vision encoder --------------------------------------------------------------------------
    "cls_logits": SignalInfo(
        source="vision layer",
        shape=("N",),
        meaning="Scaled products of the CLS token's query with the key of each patch, before the "
        "softmax, mean over heads.",
        paper="GlobalCom² (2501.05179)",
        queries="one",
        needs_cls=True,
        sample="logits",
    ),
    "cls_attention": SignalInfo(
        source="vision layer",
        shape=("N",),
        meaning="Attention that the CLS token pays to each patch, softmax over all keys, mean over "
        "heads.",
        paper="FasterVLM (2412.01818)",
        queries="one",
        needs_cls=True,
        sample="attention",
    ),
    "cls_joint": SignalInfo(
        source="vision layer",
        shape=("N",),
        meaning="Attention that the CLS token pays to each patch if all heads are joined into one, "
        "scaled by the root of the full width.",
        paper="LLaVA-PruMerge (2403.15388)",
        queries="one",
        joint_heads=True,
        needs_cls=True,
        sample="attention",
    ),
    "received": SignalInfo(
        source="vision layer",
        shape=("N",),
        meaning="Attention that each patch receives, mean over all queries of its view and over "
        "heads; in windowed layers (Qwen2.5-VL), none from queries outside its window.",
        paper="HoliTom (2505.21334)",
        queries="all",
        sample="attention",
    ),
    "saliency": SignalInfo(
        source="vision layer",
        shape=("N",),
        meaning="`cls_logits` if the vision encoder has a CLS token, otherwise `received`.",
        paper="GlobalCom² (2501.05179)",
        stands_for=("cls_logits", "received"),
        sample="logits",
    ),
    "keys": SignalInfo(
        source="vision layer",
        shape=("N", "vision_head_width"),
        meaning="Key of each patch, mean over heads, before a rotation by its place.",
        paper="VisionZip (2412.04467)",
    ),
    "joint_keys": SignalInfo(
        source="vision layer",
        shape=("N", "vision_width"),
        meaning="Keys of each patch, all heads concatenated.",
        paper="LLaVA-PruMerge (2403.15388)",
        joint_heads=True,
    ),
    "head_attention": SignalInfo(
        source="pooling head",
        shape=("N",),
        meaning="Attention that the pooling head pays to each patch, softmax over the patches, "
        "mean over heads.",
        paper="SigLIP (2303.15343)",
        layer="none",
        sample="attention",
    ),
    "unprojected": SignalInfo(
        source="projector",
        shape=("N", "projector_width"),
        meaning="Input of the projector; `VisualTokens.project` maps merged vectors.",
        paper="VisionZip (2412.04467)",
        dtype="model",
        layer="none",
    ),
    "clip_patches": SignalInfo(
        source="text encoder",
        shape=("N", "joint_width"),
        meaning="Embedding of each patch in the space that images and texts share.",
        paper="CDPruner (2506.10967)",
        layer="none",
    ),
    "clip_text": SignalInfo(
        source="text encoder",
        shape=("Q", "joint_width"),
        meaning="Embeddings of the question in the space of `clip_patches`.",
        paper="CDPruner (2506.10967)",
        layer="none",
        found_in="text",
    ),
    # -- language model --------------------------------------------------------------------------
    "llm_prompt": SignalInfo(
        source="prompt",
        shape=("T", "hidden"),
        meaning="Input embeddings of the text after the image; also available in front of the "
        "language model.",
        paper="CDPruner (2506.10967)",
        dtype="model",
        layer="none",
        found_in="text",
    ),
    "llm_inputs": SignalInfo(
        source="prompt",
        shape=("P", "hidden"),
        meaning="Input of the language model: all patch tokens of the image, and the text after "
        "it (T, hidden); the same at every cut.",
        paper="SparseVLM (2410.04417)",
        dtype="model",
        layer="none",
        found_in="inputs",
    ),
    "llm_attention": SignalInfo(
        source="decoder layer",
        shape=("N",),
        meaning="Attention that the last prompt token pays to each entry, softmax over all keys, "
        "mean over heads.",
        paper="FastV (2403.06764)",
        scope="batch",
        queries="one",
        sample="attention",
    ),
    "llm_ahead": SignalInfo(
        source="decoder layer",
        shape=("N",),
        meaning="`llm_attention` of the layer after the cut.",
        paper="PyramidDrop (2410.17247)",
        layer="next",
        scope="batch",
        queries="one",
        sample="attention",
    ),
    "llm_keys": SignalInfo(
        source="decoder layer",
        shape=("N", "kv_width"),
        meaning="Rotated keys of each entry, all heads concatenated, as in a prompt without "
        "padding.",
        paper="DART (2502.11494)",
        dtype="model",
        scope="batch",
        copies=(3, "model"),
    ),
    "llm_values": SignalInfo(
        source="decoder layer",
        shape=("N", "kv_width"),
        meaning="Values of each entry, all heads concatenated.",
        paper="VATP (2406.12335)",
        dtype="model",
        scope="batch",
        copies=(1, "model"),
    ),
    "llm_keys_ahead": SignalInfo(
        source="decoder layer",
        shape=("N", "kv_width"),
        meaning="Rotated keys of each entry in the layer after the cut, all heads concatenated.",
        paper="PACT (2504.08966)",
        dtype="model",
        layer="next",
        scope="batch",
    ),
    "llm_states": SignalInfo(
        source="decoder layer",
        shape=("N", "hidden"),
        meaning="Hidden states of each entry in front of the cut, after the final norm.",
        paper="DART (2502.11494)",
        dtype="model",
        layer="none",
        scope="batch",
        copies=(2, "float32"),
    ),
    "llm_text": SignalInfo(
        source="decoder layer",
        shape=("N", "T"),
        meaning="Attention that each text token after the image pays to each entry, softmax over "
        "all keys, mean over heads.",
        paper="SparseVLM (2410.04417)",
        layer="previous",
        queries="text",
        sample="attention",
    ),
    "llm_text_heads": SignalInfo(
        source="decoder layer",
        shape=("N", "T", "heads"),
        meaning="`llm_text` of each head.",
        paper="SparseVLM (2410.04417)",
        layer="previous",
        queries="text",
        sample="attention",
    ),
    "llm_text_rotary": SignalInfo(
        source="decoder layer",
        shape=("N", "T"),
        meaning="Products of queries and keys of ones, rotated to the position ids of the text "
        "tokens and of the entries (`rotary_product`).",
        paper="SparseVLM (2410.04417)",
        layer="previous",
        sample="rotation",
    ),
    "llm_self": SignalInfo(
        source="decoder layer",
        shape=("N",),
        meaning="Maximum over heads of the attention that each entry receives, mean over the "
        "image's patch tokens.",
        paper="FitPrune (2409.10197)",
        layer="previous",
        queries="patches",
        sample="attention",
    ),
    "llm_cross": SignalInfo(
        source="decoder layer",
        shape=("N",),
        meaning="Maximum over heads of the attention that each entry receives, mean over the text "
        "tokens after the image.",
        paper="FitPrune (2409.10197)",
        layer="previous",
        queries="text",
        sample="attention",
    ),
    "llm_global": SignalInfo(
        source="decoder layer",
        shape=("N",),
        meaning="Attention that the mean of all queries up to the image's last token pays to each "
        "entry, without rotation, softmax over these states, mean over heads, in the layer after "
        "the cut.",
        paper="PACT (2504.08966)",
        layer="next",
        queries="one",
        sample="attention",
    ),
}
"""Every signal by name."""
