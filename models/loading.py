"""Loading a model by name: a testbed, a folder, the Hub, or a published config without weights."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import torch

from tokenprune.adapter import Adapter
from tokenprune.errors import UserError, unknown
from tokenprune.models import checkpoints
from tokenprune.models.checkpoints import read_config
from tokenprune.models.published import KNOWN, known_name
from tokenprune.pipeline import Pipeline
from tokenprune.registry import adapters

__all__ = [
    "adapter_at_random",
    "adapter_without_weights",
    "host_of",
    "load",
    "published_config",
    "without_weights",
]


def load(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    **options: Any,
) -> Pipeline:
    """Load a model and its processor.

    Args:
        name: An embedded testbed (``testbed-next``), a Hub id such as
            ``llava-hf/llava-v1.6-vicuna-7b-hf``, the name alone of a published model
            (``llava-v1.6-vicuna-7b``, as in `published.HUB_IDS`), a local folder, or ``timm/`` and
            the name of a vision transformer of timm, which has no language model (`load_timm`).
        device: Device of the weights; None means ``device_map`` if it is given, else the CPU.
        dtype: ``float32``, ``bfloat16``, ... or ``auto`` for that of the checkpoint.  The testbeds
            are stored in half precision; for them ``auto`` is float32.
        trust_remote_code: Whether Python code that comes with the checkpoint may be executed.
        **options: For ``from_pretrained``: ``device_map``, ``quantization_config``,
            ``attn_implementation``, ``revision``, ...; or, for timm models, for `load_timm`:
            ``pretrained``, ``grid``, ``img_size``, ...

    Raises:
        UserError: The name, dtype or device is unknown, the model class has no adapter, the
            checkpoint is incomplete or broken, its weights do not fit the model or are not finite,
            or its code is not trusted.
    """
    name = str(name)
    dtype = checkpoints.dtype_of(dtype)
    device = None if device is None else checkpoints.device_of(device)
    if name.startswith("timm/"):
        from tokenprune.models.timm_vision import load_timm

        return Pipeline(*load_timm(name.removeprefix("timm/"), device, dtype, **options))
    if "pretrained" in options:
        raise UserError(
            f"pretrained= is for timm models (timm/<name>); {name!r} has its own weights."
        )
    if device is not None and options.get("device_map") is not None:
        raise UserError("give either device= or device_map=, not both.")
    source = checkpoints.source_of(name, trusted=trust_remote_code)
    if source.embedded and dtype == "auto":
        dtype = torch.float32
    config = checkpoints.config_of(source, options)
    kind, family = host_of(config)
    processor = checkpoints.read_processor(source, options)
    model = checkpoints.read_model(kind, config, source, dtype, options)
    if device is not None:
        with checkpoints.reading(name, f"on {device}: "):
            model = model.to(device)
    processor.tokenizer.padding_side = "left"  # as batched generation needs it
    pipe = Pipeline(family(model), processor, source.folder)
    _rehearse(pipe, name)
    return pipe


def without_weights(name: str, *, trust_remote_code: bool = False, **options: Any) -> Pipeline:
    """The pipeline of a model with config and processor, but without modules to run.

    Args:
        name, trust_remote_code: As in `load`.
        **options: Those of `load` that locate files, such as ``revision``.

    Raises:
        UserError: There is no such model, or no adapter for its class.
    """
    source = checkpoints.source_of(name, trusted=trust_remote_code)
    config = checkpoints.config_of(source, options)
    _, family = host_of(config)
    model: Any = SimpleNamespace(config=config)
    return Pipeline(family(model), checkpoints.read_processor(source, options), source.folder)


def _rehearse(pipe: Pipeline, name: str) -> None:
    """Prepare a small image, and raise `UserError` if processor and model disagree about it."""
    adapter, facts = pipe.adapter, pipe.adapter.facts
    rows, columns = facts.vision.view_shape
    view = rows * facts.vision.patch_size[0], columns * facts.vision.patch_size[1]
    size = view[0] + 1, view[1]
    with checkpoints.reading(name, "its processor fails on an image: "):
        inputs = pipe.prepare([PIL.Image.new("RGB", size[::-1])], ["?"])
        ids, pixels = inputs["input_ids"], inputs[adapter.image_arguments[0]]
        written = int((ids == facts.placeholders["image"]).sum())
    with checkpoints.reading(name, "its config: "):
        made = len(adapter.layout(size))
        words = adapter.model.get_input_embeddings().num_embeddings
    reasons = {
        f"its processor writes {written} placeholders, but the model makes {made} tokens": (
            written != made
        ),
        f"its processor makes views of {tuple(pixels.shape[-2:])} pixels; the model takes {view}": (
            pixels.ndim > 3 and tuple(pixels.shape[-2:]) != view
        ),
        "its processor makes NaN or infinite pixels": not bool(pixels.isfinite().all()),
        f"its tokenizer has ids beyond the {words} words of the model": int(ids.max()) >= words,
        "its vision encoder lacks a vision_feature_layer of its config": not _has_layers(adapter),
        "a token id in its generation_config.json is not a number": not _has_ids(adapter.model),
    }
    for reason, found in reasons.items():
        if found:
            raise UserError(f"cannot load {name!r}: {reason}; its files do not belong together.")


def _has_layers(adapter: Adapter) -> bool:
    """Whether the vision encoder has the layers whose hidden states the model uses."""
    chosen = getattr(adapter.base.config, "vision_feature_layer", -1)
    depth = len(adapter.vision_layers)
    layers = [chosen] if isinstance(chosen, int) else chosen
    # transformers addresses the embeddings only by the negative index, not by 0.
    return all(-depth - 1 <= layer <= depth and layer != 0 for layer in layers)


def _has_ids(model: Any) -> bool:
    """Whether the special tokens of the generation config are ids or lists of ids."""
    settings = getattr(model, "generation_config", None)
    given = [getattr(settings, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    listed = [some if isinstance(some, list) else [some] for some in given]
    return all(isinstance(one, int | None) for some in listed for one in some)


def host_of(config: Any) -> tuple[str, type[Adapter]]:
    """The model class that ``config`` is for, and its adapter.

    Raises:
        UnknownNameError: No adapter knows the class.
    """
    hosts = {host: adapters.get(a) for a in adapters.names() for host in adapters.get(a).hosts}
    named = config.architectures or [type(config).__name__]
    kind = str(named[0] if isinstance(named, list) else named)
    if kind not in hosts:
        raise unknown("model class with an adapter", kind, hosts)
    return kind, hosts[kind]


def published_config(name: str) -> Any:
    """The ``transformers`` config called ``name``.

    Args:
        name: One of `KNOWN` (also spelled as the Hub id of its conversion,
            ``llava-hf/llava-v1.6-vicuna-7b-hf`` or ``Qwen/Qwen2.5-VL-7B-Instruct``), an embedded
            testbed, a local folder with a ``config.json``, or a Hub id, of which only the config is
            downloaded.

    Raises:
        UserError: There is no config of that name.
    """
    from transformers import AutoConfig

    short = known_name(name)
    if short is None:
        try:
            return read_config(name)
        except UserError as error:
            raise UserError(
                f"{error} Sizes known without a download: {', '.join(KNOWN)}."
            ) from error
    known = copy.deepcopy(KNOWN[short])
    return AutoConfig.for_model(known.pop("model_type"), **known)


def adapter_without_weights(name: str, *, layers: int | None = None) -> Adapter:
    """The adapter of a model on the ``meta`` device, which has all shapes and no weights.

    Args:
        name: As for `published_config`.
        layers: Number of decoder layers; None means all.

    Raises:
        UserError: There is no such config, no adapter for it, or it has no language model.
    """
    return adapter_at_random(name, layers=layers, device="meta")


def adapter_at_random(
    name: str,
    *,
    layers: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Adapter:
    """The adapter of a model with random weights, which is as fast as the trained model.

    Args:
        name: As for `published_config`.
        layers: Number of decoder layers; None means all.
        device: Device of the weights.
        dtype: Dtype of the weights.

    Raises:
        UserError: As `adapter_without_weights`, or ``layers`` is below 1 or above the model's.
    """
    from transformers import AutoModelForImageTextToText

    if name.startswith("timm/"):
        raise UserError(f"{name} has no language model, so there is no cost to compute.")
    config = copy.deepcopy(published_config(name))
    _, family = host_of(config)
    text = config.get_text_config()
    if layers is not None:
        if not 1 <= layers <= text.num_hidden_layers:
            raise UserError(
                f"{name} has {text.num_hidden_layers} decoder layers, so layers must lie in "
                f"1 .. {text.num_hidden_layers}, got {layers}."
            )
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, trust_remote_code=False
        )
    return family(model.eval())
