"""Configs of published models.

Tokens, FLOPs and bytes follow from the config alone.  A model built from it on the ``meta`` device
has all shapes and no weights.

Sources of the sizes: ``config.json`` of the language models (lmsys/vicuna-7b-v1.5 and -13b-v1.5,
mistralai/Mistral-7B-Instruct-v0.2, NousResearch/Nous-Hermes-2-Yi-34B, meta-llama/Meta-Llama-3-8B,
Qwen/Qwen2-0.5B, -7B and -72B) and of the vision encoders (openai/clip-vit-large-patch14-336,
google/siglip-so400m-patch14-384 without its last layer), and the grid pinpoints of LLaVA-NeXT and
LLaVA-OneVision (arXiv 2408.03326).  Vocabulary sizes are those of the language models plus the
conversion's padding if it is known; only the size of the weights depends on them.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "KNOWN",
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
