"""Small checkpoints of every family on disk, and seeded ways to break one."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, SiglipVisionConfig

import tokenprune as tp
from tokenprune.adapter import tiny_decoder
from tokenprune.errors import UserError
from tokenprune.models import testbed
from tokenprune.models.testbed.scenes import questions

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


# --- faults ---------------------------------------------------------------------------------------

WEIGHTS = "model.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
VALUES: tuple[Any, ...] = (
    ..., None, "x", "", "1", -1, 0, 1.5, True, 10**12, float("nan"), [], {}, [-1], [[1, 2, 3]],
)  # fmt: skip
"""What a value of a JSON document becomes; `Ellipsis` deletes it."""
TENSORS = ("removed", "added", "renamed", "grown", "nan", "infinite", "integers")
FILES = ("lost", "empty", "cut", "pointer", "bytes")


class FaultError(Exception):
    """A checkpoint ended neither in a `UserError` nor in an answer."""


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        file: Name of the file.
        kind: ``value``, or one of `FILES` or `TENSORS`.
        path: Of a ``value``: where in the document.
        value: Of a ``value``: one of `VALUES`.
        seed: Chooses the bytes or the tensor.
    """

    file: str
    kind: str
    path: tuple[Any, ...] = ()
    value: Any = None
    seed: int = 0


def sample(source: Path, count: int, seed: int) -> list[Case]:
    """Random faults of the checkpoint ``source``: half are values, the rest files and tensors."""
    draw = random.Random(seed)
    files = [file.name for file in sorted(source.iterdir()) if _is_read(file)]
    documents = [name for name in files if name.endswith(".json")]
    found = []
    for _ in range(count):
        name, kind = draw.choice(files), draw.choice(("value", "value", "file", "tensor"))
        if kind == "value":
            name = draw.choice(documents)
            path = draw.choice(list(_places(json.loads((source / name).read_text()))))
            found.append(Case(name, kind, path, draw.choice(VALUES)))
        elif kind == "file":
            found.append(Case(name, draw.choice(FILES), seed=draw.randrange(2**31)))
        else:
            found.append(Case(WEIGHTS, draw.choice(TENSORS), seed=draw.randrange(2**31)))
    return found


def _is_read(file: Path) -> bool:
    return file.suffix in (".json", ".safetensors", ".jinja") and file.name != "training.json"


def _places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of the values of a JSON document."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from _places(value, (*path, key))


def apply(case: Case, folder: Path) -> None:
    """Break the checkpoint in ``folder``."""
    file, draw = folder / case.file, random.Random(case.seed)
    if case.kind == "value":
        document = json.loads(file.read_text(encoding="utf-8"))
        place = document
        for key in case.path[:-1]:
            place = place[key]
        if case.value is ...:
            del place[case.path[-1]]
        else:
            place[case.path[-1]] = case.value
        file.write_text(json.dumps(document), encoding="utf-8")
    elif case.kind in TENSORS:
        state = load_file(file)
        save_file(spoilt(state, case.kind, draw.choice(sorted(state))), file, {"format": "pt"})
    elif case.kind == "lost":
        file.unlink()
    else:
        whole = file.read_bytes()
        place = draw.randrange(len(whole))
        changed = {"empty": b"", "cut": whole[:place], "pointer": POINTER}
        noise = whole[:place] + draw.randbytes(4) + whole[place + 4 :]
        file.write_bytes(changed.get(case.kind, noise))


def spoilt(state: dict[str, Tensor], kind: str, name: str) -> dict[str, Tensor]:
    """Weights with one tensor replaced by a fault of `TENSORS`."""
    rest = {key: value for key, value in state.items() if key != name}
    value = state[name].clone()
    if kind == "removed":
        return rest
    if kind in ("added", "renamed"):
        return {**(state if kind == "added" else rest), f"{name}_2": value}
    if kind in ("nan", "infinite"):
        value.view(-1)[-1] = float("nan") if kind == "nan" else float("inf")
    changed = {"grown": lambda: torch.cat([value, value]), "integers": lambda: value.long()}
    return {**rest, name: changed.get(kind, lambda: value)()}


def outcome_of(case: Case, source: Path, folder: Path) -> str:
    """``refused`` or ``ran``, of a copy of ``source`` in ``folder`` with a fault.

    Raises:
        FaultError: It ended otherwise, or ran with bad tensors.
    """
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    apply(case, folder)
    try:
        pipe = tp.load(str(folder))
        item = questions(1, seed=5)[0]
        with torch.no_grad():
            pipe.model.generate(
                **pipe.prepare([item.image], [item.question]), max_new_tokens=2, do_sample=False
            )
    except UserError:
        return "refused"
    except Exception as error:
        raise FaultError(f"{case}: {type(error).__name__}: {error}") from error
    if case.kind in TENSORS:
        raise FaultError(f"{case}: weights with a fault ran.")
    return "ran"
