"""Copies of checkpoints with the names that vLLM gives to weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from tokenprune.errors import UserError

__all__ = ["NAMED", "TOWER", "copy_model", "vllm_name"]

_PARTS = "embeddings|encoder|head|post_layernorm|pre_layrnorm"
TOWER = re.compile(rf"^((?:model\.)?vision_tower)\.(?=(?:{_PARTS})\.)")
"""How the name of a weight of a CLIP or SigLIP encoder begins if ``vision_model`` is missing."""

NAMED = r"\1.vision_model."
"""What replaces `TOWER`."""

_TOWERS = ("clip_vision_model", "siglip_vision_model")


def vllm_name(name: str) -> str:
    """The name that vLLM gives to a weight of a model with a CLIP or SigLIP encoder.

    Checkpoints that newer releases of ``transformers`` save lack ``vision_model``.

    >>> vllm_name("model.vision_tower.embeddings.class_embedding")
    'model.vision_tower.vision_model.embeddings.class_embedding'
    """
    return TOWER.sub(NAMED, name)


def copy_model(source: Path, target: Path) -> list[str]:
    """Copy a model's folder so that vLLM loads it without a plug-in; ``transformers`` does too.

    Args:
        source: A folder with ``config.json`` and weights in ``*.safetensors``.
        target: The folder of the copy.

    Returns:
        Names of the files.

    Raises:
        UserError: ``source`` has no weights in this format.
    """
    if not any(source.glob("*.safetensors")):
        raise UserError(f"{source} has no *.safetensors; save the model with save_pretrained.")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    renames = config.get("vision_config", {}).get("model_type") in _TOWERS
    target.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in source.iterdir() if path.is_file())
    for file in files:
        copy = target / file.name
        if renames and file.suffix == ".safetensors":
            _copy_weights(file, copy)
        elif renames and file.name.endswith(".safetensors.index.json"):
            index = json.loads(file.read_text(encoding="utf-8"))
            index["weight_map"] = {vllm_name(k): v for k, v in index["weight_map"].items()}
            copy.write_text(json.dumps(index, indent=2), encoding="utf-8")
        else:
            shutil.copyfile(file, copy)
    return [file.name for file in files]


def _copy_weights(file: Path, copy: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        tensors = {vllm_name(name): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        save_file(tensors, copy, metadata=opened.metadata())
