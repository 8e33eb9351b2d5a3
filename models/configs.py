"""Models by their config alone: published sizes, and adapters of models without weights.

Everything that costs (tokens, FLOPs, bytes) follows from the config; a model built from it on the
``meta`` device knows all its shapes and holds nothing.

Sources of the sizes: ``config.json`` of the language models (lmsys/vicuna-7b-v1.5 and -13b-v1.5,
mistralai/Mistral-7B-Instruct-v0.2, NousResearch/Nous-Hermes-2-Yi-34B, meta-llama/Meta-Llama-3-8B,
Qwen/Qwen2-0.5B, -7B and -72B) and of the towers (openai/clip-vit-large-patch14-336,
google/siglip-so400m-patch14-384 without its last layer), and the grid pinpoints of LLaVA-NeXT and
LLaVA-OneVision (arXiv 2408.03326).  Vocabulary sizes are those of the language models plus the
conversion's padding where it is known; nothing but the size of the weights depends on them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from tokenprune.errors import UserError
from tokenprune.models.adapter import Adapter, host_of, read_config

__all__ = ["KNOWN", "adapter_at_random", "adapter_without_weights", "config_of"]

_CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
_NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_ONEVISION_PINPOINTS = [[384 * rows, 384 * cols] for rows in range(1, 7) for cols in range(1, 7)]


def _decoder(
    kind: str, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, words: int
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": words,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": kind == "qwen2" and hidden == 896,
        "sliding_window": None,
    }


def _next(decoder: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "llava_next",
        "architectures": ["LlavaNextForConditionalGeneration"],
        "text_config": decoder,
        "vision_config": _CLIP,
        "image_grid_pinpoints": _NEXT_PINPOINTS,
        "tie_word_embeddings": decoder["tie_word_embeddings"],
    }


def _onevision(decoder: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "llava_onevision",
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "text_config": decoder,
        "vision_config": _SIGLIP,
        "image_grid_pinpoints": _ONEVISION_PINPOINTS,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": decoder["tie_word_embeddings"],
    }


KNOWN: dict[str, dict[str, Any]] = {
    "llava-v1.6-vicuna-7b": _next(_decoder("llama", 4096, 11008, 32, 32, 32, 32064)),
    "llava-v1.6-vicuna-13b": _next(_decoder("llama", 5120, 13824, 40, 40, 40, 32064)),
    "llava-v1.6-mistral-7b": _next(_decoder("mistral", 4096, 14336, 32, 32, 8, 32064)),
    "llava-v1.6-34b": _next(_decoder("llama", 7168, 20480, 60, 56, 8, 64064)),
    "llama3-llava-next-8b": _next(_decoder("llama", 4096, 14336, 32, 32, 8, 128320)),
    "llava-onevision-qwen2-0.5b": _onevision(_decoder("qwen2", 896, 4864, 24, 14, 2, 151936)),
    "llava-onevision-qwen2-7b": _onevision(_decoder("qwen2", 3584, 18944, 28, 28, 4, 152064)),
    "llava-onevision-qwen2-72b": _onevision(_decoder("qwen2", 8192, 29568, 80, 64, 8, 152064)),
}


def config_of(name: str) -> Any:
    """The ``transformers`` config called ``name``.

    Args:
        name: One of `KNOWN` (also spelled as the Hub id of its conversion,
            ``llava-hf/llava-v1.6-vicuna-7b-hf``), an embedded testbed, a local folder with a
            ``config.json``, or a Hub id, of which the config alone is fetched.

    Raises:
        UserError: There is none of that name.
    """
    from transformers import AutoConfig

    short = name.removeprefix("llava-hf/").removesuffix("-hf").removesuffix("-ov")
    if short not in KNOWN:
        try:
            return read_config(name)
        except UserError as error:
            raise UserError(
                f"{error} Sizes known without a download: {', '.join(KNOWN)}."
            ) from error
    known = copy.deepcopy(KNOWN[short])
    return AutoConfig.for_model(known.pop("model_type"), **known)


def adapter_without_weights(name: str, *, layers: int | None = None) -> Adapter:
    """The adapter of a model on the ``meta`` device: every shape, and no weight.

    Args:
        name: As for `config_of`.
        layers: Decoder layers, if not all of them.

    Raises:
        UserError: There is no such config, no adapter for it, or no language model behind it.
    """
    return adapter_at_random(name, layers=layers, device="meta")


def adapter_at_random(
    name: str,
    *,
    layers: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Adapter:
    """The adapter of a model with random weights, whose speed is that of the trained one.

    Args:
        name: As for `config_of`.
        layers: Decoder layers, if not all of them.
        device: Where the weights are made.
        dtype: Of the weights.

    Raises:
        UserError: As `adapter_without_weights`, or ``layers`` below 1 or above what there is.
    """
    from transformers import AutoModelForImageTextToText

    if name.startswith("timm/"):
        raise UserError(f"{name} has no language model whose cost could be told.")
    config = copy.deepcopy(config_of(name))
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
