"""Small checkpoints of every family on disk, and ways to break them."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, SiglipVisionConfig

from tokenprune.models import testbed
from tokenprune.models.adapter import tiny_decoder

FAMILIES = ("testbed-next", "testbed-onevision")
DECODERS = ("llama", "mistral", "qwen2")
TOWERS = ("clip", "siglip")
KINDS = [(bed, decoder, tower) for bed in FAMILIES for decoder in DECODERS for tower in TOWERS]


def write(
    folder: Path, bed: str, decoder: str, tower: str, *, tied: bool = False, shards: int = 1
) -> Path:
    """A random model with the processor of a testbed; the folder."""
    source = testbed.path(bed)
    config = transformers.AutoConfig.from_pretrained(source)
    was = config.vision_config
    text = tiny_decoder(decoder)
    text.vocab_size, text.tie_word_embeddings = config.text_config.vocab_size, tied
    makes = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[tower]
    config.text_config, config.tie_word_embeddings = text, tied
    config.vision_config = makes(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=was.image_size,
        patch_size=was.patch_size,
    )
    config.vision_feature_layer = -1
    config.vision_feature_select_strategy = "default" if tower == "clip" else "full"
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])(copy.deepcopy(config))
    size = sum(value.nbytes for value in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=size // shards + 1)
    for file in source.iterdir():
        if "token" in file.name or "process" in file.name or file.suffix == ".jinja":
            shutil.copy(file, folder)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint of one file."""
    return load_file(folder / "model.safetensors")


def broken(folder: Path, to: Path, state: dict[str, Tensor]) -> Path:
    """A copy of ``folder`` with other weights."""
    to.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, to)
    save_file(state, to / "model.safetensors", metadata={"format": "pt"})
    return to
