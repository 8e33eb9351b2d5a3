"""Facts about a model: numbers and names that do not change while it runs.

`Adapter.facts` reads them.  Code that needs several facts reads the record once and keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from tokenprune.errors import UserError

if TYPE_CHECKING:
    from tokenprune.layout import TokenLayout

__all__ = [
    "DecoderFacts",
    "ModelFacts",
    "ModulePaths",
    "PositionScheme",
    "VisionFacts",
    "active_width",
    "no_language_model",
]

PositionScheme = Literal["rotary", "multimodal-rotary"]
"""One position id for each token, or one each for time, row and column."""


@dataclass(frozen=True)
class ModulePaths:
    """Where the parts of a model are, as attribute names of `Adapter.base`.

    Attributes:
        vision: The vision encoder.
        projector: The module between the vision encoder and the language model.
        text: The language model.
    """

    vision: str = "vision_tower"
    projector: str = "multi_modal_projector"
    text: str = "language_model"


@dataclass(frozen=True)
class VisionFacts:
    """Facts about a vision encoder.

    Attributes:
        model_type: Its ``model_type``, such as ``clip_vision_model``.
        layers: Number of layers.
        hidden: Width of the hidden states.
        intermediate: Width of the MLP.
        heads: Number of attention heads.
        view_shape: (rows, columns) of the patches of one view.
        patch_size: (height, width) of a patch in pixels of the view.
        prefix_tokens: Number of entries in front of the patches: CLS token, registers.
        has_cls: Whether entry 0 is a CLS token.
        has_head: Whether an attention pooling head follows the layers.
        merge_size: Side of the square of patches that the projector joins into one visual token.
        native: Whether the views have the size of the image, not `view_shape`.
        gated: Whether the MLP has a gate.
        window: Side of the windows within which layers attend, in visual tokens; 0 for none.
        global_layers: Layers that attend to the whole view all the same.
        mergers: Number of projectors that join patches into visual tokens.
        attention: Name of the attention implementation.
        readable: Whether every attention is a plain softmax of query times key.
        reducible: Whether every layer is one that `Adapter.vision_block` can run.
        resizable: Whether the encoder can interpolate its position embeddings.
    """

    model_type: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    view_shape: tuple[int, int]
    patch_size: tuple[int, int]
    prefix_tokens: int
    has_cls: bool
    has_head: bool = False
    merge_size: int = 1
    native: bool = False
    gated: bool = False
    window: int = 0
    global_layers: tuple[int, ...] = ()
    mergers: int = 0
    attention: str = "sdpa"
    readable: bool = True
    reducible: bool = True
    resizable: bool = True

    @property
    def tokens(self) -> int:
        """Number of entries of the encoder's sequence for one view."""
        return self.prefix_tokens + math.prod(self.view_shape)

    def at(self, layout: TokenLayout) -> VisionFacts:
        """The facts for the views of an image or video, which may have a size of their own."""
        if not self.native:
            return self
        rows, cols = (self.merge_size * side for side in layout.view_shape)
        return replace(self, view_shape=(rows, cols))

    def pairs(self, layer: int) -> int:
        """Number of pairs of a query and a key in a view, in encoder layer ``layer``."""
        if not self.window or layer % self.layers in self.global_layers:
            return self.tokens**2
        side, found = self.window * self.merge_size, 1
        for length in self.view_shape:
            whole, rest = divmod(length, side)
            found *= whole * side**2 + rest**2
        return found


@dataclass(frozen=True)
class DecoderFacts:
    """Facts about the decoder of a language model.

    Attributes:
        layers: Number of layers.
        hidden: Width of the hidden states.
        intermediate: Width of the MLP, of all active experts together.
        heads: Number of query heads.
        kv_heads: Number of key and value heads.
        head_dim: Width of a head.
        positions: Number of position ids that the decoder knows, None if there is no limit.
        position_scheme: What a position id consists of.
        query_norms: Whether the queries of each head are normalised.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int | None = None
    position_scheme: PositionScheme = "rotary"
    query_norms: bool = False

    @classmethod
    def of(cls, config: Any) -> DecoderFacts:
        """Read from the text config of a ``transformers`` model."""
        heads = config.num_attention_heads
        scaling = getattr(config, "rope_parameters", None) or {}
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=active_width(config),
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            positions=_known_positions(getattr(config, "max_position_embeddings", None), scaling),
            position_scheme="multimodal-rotary" if "mrope_section" in scaling else "rotary",
        )


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a vision-language model, or about a vision encoder alone.

    Attributes:
        family: Name of the model family.
        vision: The vision encoder.
        language_model: The language model's decoder, or None if there is no language model.
        placeholders: Modality to the token id that stands for one visual token in a prompt.
        paths: Where the modules are.
    """

    family: str
    vision: VisionFacts
    language_model: DecoderFacts | None
    placeholders: Mapping[str, int]
    paths: ModulePaths

    @property
    def decoder(self) -> DecoderFacts:
        """The language model's decoder.  Raises `UserError` if there is none."""
        if self.language_model is None:
            raise no_language_model(self.family)
        return self.language_model


def active_width(config: Any) -> int:
    """Width of the MLP that a token passes through: of all its experts, if the layers have some."""
    experts = getattr(config, "num_experts_per_tok", None)
    wide = getattr(config, "moe_intermediate_size", None)
    return experts * wide if experts and wide else int(config.intermediate_size)


def no_language_model(family: str) -> UserError:
    """The error for an operation that needs a language model, in a ``family`` without one."""
    return UserError(
        f"{family} models have no language model; use pipe.encode and pipe.select, or load a "
        "vision-language model."
    )


def _known_positions(trained: int | None, scaling: Mapping[str, Any]) -> int | None:
    """``max_position_embeddings``, multiplied by the factor of a rotary scaling if there is one."""
    if trained is None or not isinstance(scaling.get("factor"), int | float):
        return trained
    original = scaling.get("original_max_position_embeddings") or trained
    return max(trained, int(original * scaling["factor"]))
