"""Names for compressed features in a server's cache."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch

import tokenprune as tp
from tokenprune.compressor import Compressor
from tokenprune.errors import UserError
from tokenprune.pictures import picture
from tokenprune.serving.specs import served
from tokenprune.spec import format as spec_of

if TYPE_CHECKING:
    from tokenprune.pipeline import Pipeline

__all__ = ["fingerprint", "uuid"]

SHOWN = 80
"""Number of characters of a spec that a name shows."""


def uuid(image: Any, spec: Compressor | str, weights: str, *, same_prompt: bool = False) -> str:
    """A name for the compressed features of an image, under which a server may cache them.

    Two names are equal only if the features are: they depend on the pixels, on the spec with its
    retention and all options, on ``weights``, on ``same_prompt`` and on the version of tokenprune.
    Rounding is not named: a batch, an attention kernel or a device may change the last bits.

    Args:
        image: As in `image_embeds`.
        spec: A compressor, or a spec with its retention.
        weights: A name for the model: its weights, its dtype and its processor (`fingerprint`).
        same_prompt: As in `image_embeds`.

    Returns:
        The spec and 64 hexadecimal digits.

    Raises:
        UserError: ``weights`` is empty, the image cannot be read, or the method cannot be served.
    """
    if not (isinstance(weights, str) and weights.strip()):
        raise UserError(
            f"weights must name the model, got {weights!r:.60}; give serving.fingerprint(pipe)."
        )
    compressor = spec if isinstance(spec, Compressor) else served(spec)
    shown = picture(image)
    digest = hashlib.sha256()
    named = [
        *(tp.__version__, weights, same_prompt, shown.size),
        *(f"{type(part).__module__}:{part!r}" for part in compressor.parts()),
    ]
    _add(digest, json.dumps(named).encode())
    _add(digest, shown.tobytes())
    return f"{spec_of(compressor)[:SHOWN]}:{digest.hexdigest()}"


def fingerprint(pipeline: Pipeline) -> str:
    """A name for all of a model that image features depend on.

    It covers the weights outside the language model, their dtypes, the configuration, and the
    settings of the image processor.  It does not depend on the place of the files.

    Args:
        pipeline: The model with its processor.

    Returns:
        64 hexadecimal digits.

    Raises:
        UserError: Weights are offloaded, so that they cannot be read.
    """
    adapter, digest = pipeline.adapter, hashlib.sha256()
    config = adapter.base.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "text_config"):
        config.pop(name, None)
    settings = pipeline.processor.image_processor.to_dict()
    options = dict(adapter.image_options)
    _add(digest, json.dumps([config, settings, options], sort_keys=True, default=str).encode())
    inside = f"{adapter.facts.paths.text}."
    for name, values in sorted(adapter.base.state_dict().items()):
        if name.startswith(inside):
            continue
        if values.device.type == "meta":
            raise UserError(
                f"the weights {name!r} are offloaded and cannot be read; load the model without "
                "offloading, or name the weights yourself."
            )
        _add(digest, json.dumps([name, str(values.dtype), list(values.shape)]).encode())
        _add(digest, values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, content: bytes | memoryview) -> None:
    """Add ``content`` with its length, so that no two lists of contents give the same digest."""
    digest.update(len(content).to_bytes(8, "big"))
    digest.update(content)
