"""Checks of the weights of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.errors import UserError
from tokenprune.offload import resident
from tokenprune.texts import first_line

__all__ = [
    "FILES",
    "bad_values",
    "check_shards",
    "infinite",
    "integers",
    "json_object",
    "refuse_faults",
    "weight_files",
]


_SHOWN = 10  # the most names of tensors in a message


FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)
"""The files of a folder that are read besides the weights.  Each holds a JSON object."""


def json_object(name: str, file: Path) -> dict[str, Any]:
    """The content of ``file``.  Raises `UserError` if it is not a JSON object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"cannot load {name!r}: {file.name} is not valid JSON ({first_line(str(error))})."
        ) from error
    if not isinstance(found, dict):
        raise UserError(
            f"cannot load {name!r}: {file.name} must hold a JSON object, "
            f"got a {type(found).__name__}."
        )
    return found


def refuse_faults(name: str, faults: Mapping[str, Iterable[str]]) -> None:
    """Raise one `UserError` that names the tensors of a checkpoint that cannot be used.

    Args:
        name: The name that the user gave for the checkpoint.
        faults: From the fault to the names of the tensors that have it.
    """
    said = []
    for fault, names in faults.items():
        listed = sorted(names)
        if listed:
            more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
            some = f"{len(listed)} tensor{'s' if len(listed) > 1 else ''}"
            said.append(f"{some} {fault} ({', '.join(listed[:_SHOWN])}{more})")
    if said:
        raise UserError(
            f"cannot load {name!r}: {'; '.join(said)}. Get the checkpoint again, or one that "
            "belongs to this config."
        )


def bad_values(model: nn.Module, files: Iterable[Path]) -> dict[str, list[str]]:
    """Faults in the values of the weights that ``model`` loaded from ``files``.

    If the weights are quantised, the original numbers are checked in the files.
    """
    from transformers.modeling_utils import load_state_dict

    quantizer = getattr(model, "hf_quantizer", None)
    faults: dict[str, list[str]] = {"NaN or infinite": [], "of integers": []}
    for file in files:
        state = load_state_dict(file, map_location="meta" if quantizer is None else "cpu")
        if quantizer is None or not quantizer.pre_quantized:
            faults["of integers"] += integers(state, model)
        faults["NaN or infinite"] += _infinite(state)
    if quantizer is None:
        faults["NaN or infinite"] = infinite(model)
    return faults


def infinite(model: nn.Module) -> list[str]:
    """Names of weights (parameters and stored buffers) with NaN or infinite values.

    Offloaded weights are read back one module at a time.
    """
    stored = model.state_dict().keys()
    found: list[str] = []
    for prefix, module in model.named_modules():
        with torch.no_grad(), resident(module):
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            named = {f"{prefix}.{short}".lstrip("."): value for short, value in own}
            found += _infinite({name: named[name] for name in named.keys() & stored})
    return found


def _infinite(state: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors with NaN or infinite values; `aminmax` propagates both."""
    floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    extremes = {
        name: torch.stack(value.detach().aminmax()).isfinite().all()
        for name, value in state.items()
        if value.dtype in floats and not value.is_meta and value.numel()
    }
    return [name for name, finite in extremes.items() if not finite]


def integers(state: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """Names of stored integer tensors that are not buffers of the model and would be cast.

    Args:
        state: The stored tensors, under any names.
        model: The model that they are for.
    """
    own = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    return [
        f"{name}: {str(value.dtype).removeprefix('torch.')}"
        for name, value in state.items()
        if not value.is_floating_point() and name.rpartition(".")[2] not in own
    ]


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """The files that ``from_pretrained`` reads from ``folder``, in its order of preference."""
    inserted = f".{variant}" if variant else ""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        file = folder / f"{stem}{inserted}.{suffix}"
        if file.is_file():
            return [file]
        index = folder / f"{stem}.{suffix}.index{inserted}.json"
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [folder / shard for shard in sorted(set(shards))]
    return []


def check_shards(name: str, folder: Path) -> None:
    """Raise `UserError` if an index of shards is malformed or names a missing file."""
    for index in (folder / file for file in FILES if file.endswith(".index.json")):
        if not index.is_file():
            continue
        found = json_object(name, index)
        shards = found.get("weight_map")
        if not (
            isinstance(found.get("metadata"), dict)
            and isinstance(shards, dict)
            and shards
            and all(isinstance(file, str) for file in shards.values())
        ):
            raise UserError(
                f"cannot load {name!r}: {index.name} must have 'metadata' and a 'weight_map' of "
                "tensors to files."
            )
        gone = sorted(file for file in set(shards.values()) if not (folder / file).is_file())
        if gone:
            more = " ..." if len(gone) > _SHOWN else ""
            raise UserError(
                f"cannot load {name!r}: {len(gone)} of its {len(set(shards.values()))} files of "
                f"weights are missing ({', '.join(gone[:_SHOWN])}{more}); download them again."
            )
