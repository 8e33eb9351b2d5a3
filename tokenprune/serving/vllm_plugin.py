"""The plug-in that vLLM finds by the entry point ``vllm.general_plugins`` and loads by itself.

vLLM calls `register` in each of its processes.  It replaces no code of vLLM: it names, for four
model classes, subclasses that vLLM imports when it loads such a model.
"""

from __future__ import annotations

__all__ = ["MODELS", "register"]

MODELS = {
    "LlavaForConditionalGeneration": "Llava",
    "LlavaNextForConditionalGeneration": "LlavaNext",
    "LlavaOnevisionForConditionalGeneration": "LlavaOnevision",
    "InternVLForConditionalGeneration": "InternVL",
}
"""Architecture, as ``config.json`` names it, to the class in `tokenprune.serving.vllm_models`."""


def register() -> None:
    """Register the classes of `MODELS` in vLLM."""
    from vllm import ModelRegistry

    for architecture, name in MODELS.items():
        ModelRegistry.register_model(architecture, f"tokenprune.serving.vllm_models:{name}")
