"""Checks of what clients send, before it reaches a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokenprune.errors import UserError

__all__ = ["check_embeds"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_embeds(
    embeds: Any, *, width: int, longest: int, dtype: torch.dtype = torch.float32
) -> None:
    """Raise `UserError` unless ``embeds`` are features that a server can take.

    A server may stop for all clients if one of them sends other tensors.

    Args:
        embeds: One image as a tensor (M, D), or several: a list of such tensors, or (B, M, D).
        width: D, the width of the language model.
        longest: The most features of all images together.
        dtype: The dtype of the server.  A number that is infinite in it is refused.
    """
    images = _images(embeds, width, longest)
    for index, one in enumerate(images):
        _check_one(one, f"embedding {index}", width)
    _check_total(sum(map(len, images)), longest)
    for index, one in enumerate(images):
        if not bool(one.to(dtype).isfinite().all()):
            raise UserError(
                f"embedding {index} has numbers that are NaN or infinite in {_name(dtype)}; send "
                "the features that the vision encoder returned."
            )


def _images(embeds: Any, width: int, longest: int) -> Sequence[Any]:
    """What ``embeds`` has for every image.  Raises `UserError` unless it is a list or a tensor."""
    if isinstance(embeds, list | tuple):
        return embeds
    if not isinstance(embeds, Tensor) or embeds.ndim not in (2, 3):
        raise UserError(
            f"image embeddings must be a tensor (tokens, {width}) or a list of such tensors, got "
            f"{_described(embeds)}."
        )
    _check_form(embeds, "the embeddings", width)
    if embeds.ndim == 2:
        return [embeds]
    _check_total(embeds.shape[0] * embeds.shape[1], longest)  # an expanded tensor may be endless
    return [*embeds]


def _check_form(one: Any, what: str, width: int) -> None:
    """Raise `UserError` unless ``one`` is a dense tensor of numbers in memory."""
    if not isinstance(one, Tensor):
        raise UserError(f"{what} must be a tensor (tokens, {width}), got {_described(one)}.")
    if one.layout is not torch.strided or one.is_nested or one.device.type == "meta":
        raise UserError(
            f"{what} must be a dense tensor with values, got {_described(one)}; call to_dense()."
        )
    if one.dtype not in DTYPES:
        raise UserError(
            f"{what} must be of {', '.join(map(_name, DTYPES))}, got {_described(one)}; convert it "
            "before it is sent."
        )


def _check_one(one: Any, what: str, width: int) -> None:
    """Raise `UserError` unless ``one`` has the form of the features of an image."""
    _check_form(one, what, width)
    if one.ndim != 2 or one.shape[1] != width or not len(one):
        raise UserError(
            f"{what} must have the shape (tokens, {width}) with at least one token, got "
            f"{tuple(one.shape)}; send features after the projector of the same model."
        )


def _check_total(total: int, longest: int) -> None:
    """Raise `UserError` unless all images have 1 to ``longest`` features together."""
    if not 0 < total <= longest:
        raise UserError(
            f"the embeddings have {total} tokens together, but this server takes 1 to {longest}; "
            "send fewer images, or compress them more."
        )


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"an object of type {type(value).__name__}"
    kind = "" if value.layout is torch.strided else f" ({_name(value.layout)})"
    shape = "of several shapes" if value.is_nested else f"of shape {tuple(value.shape)}"
    return f"a {_name(value.dtype)} tensor{kind} {shape} on {value.device}"


def _name(value: object) -> str:
    return str(value).removeprefix("torch.")
