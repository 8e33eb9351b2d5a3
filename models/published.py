"""Configs of published models.

Tokens, FLOPs and bytes follow from the config alone.  A model built from it on the ``meta`` device
has all shapes and no weights.

Sources of the sizes: ``config.json`` of the language models (lmsys/vicuna-7b-v1.5 and -13b-v1.5,
mistralai/Mistral-7B-Instruct-v0.2, NousResearch/Nous-Hermes-2-Yi-34B, meta-llama/Meta-Llama-3-8B,
Qwen/Qwen2-0.5B, -7B and -72B) and of the vision encoders (openai/clip-vit-large-patch14-336,
google/siglip-so400m-patch14-384 without its last layer), and the grid pinpoints of LLaVA-NeXT and
LLaVA-OneVision (arXiv 2408.03326).  Vocabulary sizes are those of the language models plus the
conversion's padding if it is known; only the size of the weights depends on them.

The config.json of Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct states few sizes of the vision
encoder; the others are defaults of `Qwen2_5_VLVisionConfig`.  That of Qwen/Qwen3-VL-4B-Instruct and
-8B-Instruct states all.  OpenGVLab/InternVL3-2B-hf and -8B-hf have InternViT-300M-448px and
Qwen2.5-1.5B and -7B (arXiv 2504.10479, table 1), with a vocabulary of 151674.
"""

from __future__ import annotations

import re
from typing import Any

__all__ = [
    "HUB_IDS",
    "KNOWN",
    "hub_id",
    "known_name",
]


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


def _llava(decoder: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": decoder | {"max_position_embeddings": 4096},
        "vision_config": _CLIP,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_seq_length": 576,
        "tie_word_embeddings": False,
    }


def _qwen25(decoder: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    sections = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    text = {"model_type": "qwen2_5_vl_text", "rope_parameters": sections}
    vision = {
        "model_type": "qwen2_5_vl",
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": decoder["hidden_size"],
        "patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return {
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "text_config": decoder
        | text
        | {"max_position_embeddings": 128000, "tie_word_embeddings": tied},
        "vision_config": vision,
        "tie_word_embeddings": tied,
    }


def _qwen3(decoder: dict[str, Any], vision: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    sections = {"rope_type": "default", "mrope_section": [24, 20, 20], "rope_theta": 5e6}
    text = {"model_type": "qwen3_vl_text", "head_dim": 128, "rope_parameters": sections}
    return {
        "model_type": "qwen3_vl",
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "text_config": decoder
        | text
        | {"max_position_embeddings": 262144, "tie_word_embeddings": tied},
        "vision_config": {
            "model_type": "qwen3_vl",
            "num_heads": 16,
            "patch_size": 16,
            "out_hidden_size": decoder["hidden_size"],
            **vision,
        },
        "tie_word_embeddings": tied,
    }


def _internvl(decoder: dict[str, Any]) -> dict[str, Any]:
    longer = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    return {
        "model_type": "internvl",
        "architectures": ["InternVLForConditionalGeneration"],
        "text_config": decoder | {"rope_parameters": longer, "tie_word_embeddings": False},
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "attention_bias": True,
            "image_size": [448, 448],
            "patch_size": [14, 14],
        },
        "tie_word_embeddings": False,
    }


_QWEN3_SMALL = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}


_QWEN3_LARGE = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24],
}


KNOWN: dict[str, dict[str, Any]] = {
    "llava-1.5-7b": _llava(_decoder("llama", 4096, 11008, 32, 32, 32, 32064)),
    "llava-1.5-13b": _llava(_decoder("llama", 5120, 13824, 40, 40, 40, 32064)),
    "llava-v1.6-vicuna-7b": _next(_decoder("llama", 4096, 11008, 32, 32, 32, 32064)),
    "llava-v1.6-vicuna-13b": _next(_decoder("llama", 5120, 13824, 40, 40, 40, 32064)),
    "llava-v1.6-mistral-7b": _next(_decoder("mistral", 4096, 14336, 32, 32, 8, 32064)),
    "llava-v1.6-34b": _next(_decoder("llama", 7168, 20480, 60, 56, 8, 64064)),
    "llama3-llava-next-8b": _next(_decoder("llama", 4096, 14336, 32, 32, 8, 128320)),
    "llava-onevision-qwen2-0.5b": _onevision(_decoder("qwen2", 896, 4864, 24, 14, 2, 151936)),
    "llava-onevision-qwen2-7b": _onevision(_decoder("qwen2", 3584, 18944, 28, 28, 4, 152064)),
    "llava-onevision-qwen2-72b": _onevision(_decoder("qwen2", 8192, 29568, 80, 64, 8, 152064)),
    "Qwen2.5-VL-3B": _qwen25(_decoder("qwen2", 2048, 11008, 36, 16, 2, 151936), tied=True),
    "Qwen2.5-VL-7B": _qwen25(_decoder("qwen2", 3584, 18944, 28, 28, 4, 152064), tied=False),
    "Qwen3-VL-4B": _qwen3(
        _decoder("qwen3", 2560, 9728, 36, 32, 8, 151936), _QWEN3_SMALL, tied=True
    ),
    "Qwen3-VL-8B": _qwen3(
        _decoder("qwen3", 4096, 12288, 36, 32, 8, 151936), _QWEN3_LARGE, tied=False
    ),
    "InternVL3-2B": _internvl(_decoder("qwen2", 1536, 8960, 28, 12, 2, 151674)),
    "InternVL3-8B": _internvl(_decoder("qwen2", 3584, 18944, 28, 28, 4, 151674)),
}


HUB_IDS: dict[str, str] = {
    **{
        name: f"llava-hf/{name}{'-ov' if 'onevision' in name else ''}-hf"
        for name in KNOWN
        if "llava" in name
    },
    **{name: f"Qwen/{name}-Instruct" for name in KNOWN if name.startswith("Qwen")},
    **{name: f"OpenGVLab/{name}-hf" for name in KNOWN if name.startswith("InternVL")},
}
"""Names in `KNOWN` to the Hub ids of the checkpoints that ``transformers`` reads."""


def known_name(name: str) -> str | None:
    """The name in `KNOWN` of a model, or None.

    Args:
        name: That name, also with the owner and the endings of its Hub id, and in any case.

    >>> known_name("llava-hf/llava-onevision-qwen2-7b-ov-hf"), known_name("qwen2.5-vl-7b")
    ('llava-onevision-qwen2-7b', 'Qwen2.5-VL-7B')
    """
    short = re.sub(r"^(llava-hf|qwen|opengvlab)/|(-ov)?(-hf|-instruct|-ov)$", "", name.lower())
    short = short.replace("llava-v1.5-", "llava-1.5-")  # as the authors write it
    return next((one for one in KNOWN if one.lower() == short), None)


def hub_id(name: str) -> str | None:
    """The Hub id of a published model that is called by its name alone, or None.

    >>> hub_id("llava-v1.6-vicuna-7b"), hub_id("testbed-next")
    ('llava-hf/llava-v1.6-vicuna-7b-hf', None)
    """
    return None if "/" in name else HUB_IDS.get(known_name(name) or "")
