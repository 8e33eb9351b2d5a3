"""The signals that a strategy can ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

__all__ = [
    "Signal",
]


@dataclass(frozen=True)
class Signal:
    """Something a strategy needs to see besides the features.

    Attributes:
        name: ``cls_logits`` (scaled query-key products of the vision tower's CLS token, mean over
            heads, before the softmax), ``cls_attention`` (the same after the softmax over all
            keys), ``received`` (mean attention a patch receives from all queries; needs no CLS),
            ``head_attention`` (attention of the tower's pooling head, softmaxed, mean over heads;
            SigLIP where the checkpoint kept the head), ``saliency`` (whichever the tower has:
            ``cls_logits`` with a CLS token, otherwise ``received``), or ``llm_attention`` (row of
            the last prompt token in a decoder layer, softmaxed, mean over heads).  ``cls_joint`` is
            the CLS row over all heads as one: products of the whole projections over the root of
            their width, softmaxed.  A vector per token are ``keys`` (of an encoder layer, mean over
            heads), ``joint_keys`` (all heads, one behind the other) and ``unprojected`` (what the
            projector receives).  ``llm_ahead`` is ``llm_attention`` of the very layer that a
            selection stands in front of, computed ahead of it; ``llm_keys`` are the rotated keys of
            a decoder layer, all heads, and ``llm_states`` the hidden states in front of the
            selection, behind the final norm: both vectors.  ``llm_text`` is (N, T), the attention
            that each of the T text tokens behind the image pays to the entries, softmaxed, mean
            over heads, in the layer that ran just before the selection; ``llm_text_heads``,
            (N, T, heads), is the same of every head, and ``llm_text_rotary``, (N, T), what rotary
            positions alone make of all-one queries and keys there (`rotary_product`);
            ``llm_cross`` (N,) is the mean over these text tokens, and ``llm_self`` (N,) over the
            image's patch tokens, of the largest attention of any head there.  ``llm_keys_ahead``
            are the keys of the layer that the selection stands in front of, and ``llm_global`` is
            the attention that the mean of all states up to the image's last token pays there to
            them, without rotation, softmaxed over the same, mean over heads.  ``llm_inputs`` asks
            for `VisualTokens.inputs`.  Of the prompt's text alone, hence in
            `VisualTokens.text`, are ``llm_prompt``, the input embeddings (T, D) of the text behind
            the image, known in front of the language model too, and ``clip_text``, the embeddings
            (M, E) of the question in CLIP's joint space, to which ``clip_patches`` (N, E) belong;
            no model here provides these two, the caller may (``given`` of `tokenprune.compress`).
        layer: Index of the encoder or decoder layer; negative counts from the end.  Of no meaning
            for ``head_attention`` and ``unprojected``, which come behind all layers.
    """

    name: Literal[
        "cls_logits",
        "cls_attention",
        "cls_joint",
        "received",
        "head_attention",
        "saliency",
        "keys",
        "joint_keys",
        "unprojected",
        "llm_attention",
        "llm_ahead",
        "llm_keys",
        "llm_states",
        "llm_text",
        "llm_text_heads",
        "llm_text_rotary",
        "llm_self",
        "llm_cross",
        "llm_global",
        "llm_keys_ahead",
        "llm_inputs",
        "llm_prompt",
        "clip_patches",
        "clip_text",
    ]
    layer: int = -1

    @property
    def in_llm(self) -> bool:
        """Whether the language model provides it (otherwise the vision tower does)."""
        return self.name.startswith("llm")

    @property
    def needs_cls(self) -> bool:
        """Whether the vision tower must have a CLS token."""
        return self.name.startswith("cls")

    @property
    def is_vector(self) -> bool:
        """Whether it is (N, C), a vector per token, and not (N,)."""
        return self.name in (
            "keys",
            "joint_keys",
            "unprojected",
            "llm_keys",
            "llm_keys_ahead",
            "llm_states",
            "llm_text",
            "llm_text_heads",
            "llm_text_rotary",
            "clip_patches",
        )

    @property
    def is_aligned(self) -> bool:
        """Whether it has a value for each of the N entries; otherwise it is of the text alone."""
        return self.name not in ("llm_inputs", "llm_prompt", "clip_text")

    @property
    def needs_text_tower(self) -> bool:
        """Whether there must be a text tower that shares a space with the vision tower."""
        return self.name.startswith("clip")

    @property
    def needs_head(self) -> bool:
        """Whether the vision tower must have an attention pooling head."""
        return self.name == "head_attention"

    def resolve(self, has_cls: bool) -> Signal:
        """What ``saliency`` stands for in a tower; every other signal is itself."""
        if self.name != "saliency":
            return self
        return replace(self, name="cls_logits" if has_cls else "received")
