"""The models that lmms-eval finds through the entry point group ``lmms_eval.models``."""

from __future__ import annotations

from typing import Any

__all__ = ["MODELS", "manifests"]


MODELS = {
    "tokenprune_llava_hf": "LlavaHf",
    "tokenprune_llava_onevision": "LlavaOnevision",
    "tokenprune_qwen2_5_vl": "Qwen25VL",
    "tokenprune_qwen3_vl": "Qwen3VL",
    "tokenprune_internvl_hf": "InternVLHf",
}
"""Model id to the class in `tokenprune.experiments.lmms.model`; ``Chat`` is added for messages."""


def manifests() -> list[Any]:
    """A ``ModelManifest`` of every model; lmms-eval calls this.

    A task with ``doc_to_messages`` reaches the chat class; ``--force_simple`` selects the simple
    one, which multiple-choice tasks need.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    place = "tokenprune.experiments.lmms.model"
    return [
        ModelManifest(
            model_id=name,
            simple_class_path=f"{place}.{made}",
            chat_class_path=f"{place}.{made}Chat",
        )
        for name, made in MODELS.items()
    ]
