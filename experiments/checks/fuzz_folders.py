"""Fuzz areas: checkpoints and run folders."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tokenprune as tp
from tokenprune.experiments.checks.cases import Area, FuzzCase, Wrong, command, small_run
from tokenprune.experiments.checks.fuzz_files import damaged
from tokenprune.models import testbed

__all__ = ["Checkpoints", "RunFolders"]

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"
NO_JSON = (b"", b"{", b"null", b"[]", b'"x"', b"5", b"\xff\xfe", b"[" * 100_000, b"NaN")
WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    10**20,
    0.5,
    "x",
    "",
    [],
    {},
    [1],
    {"a": 1},
    float("nan"),
)


class Checkpoints(Area):
    """Intact checkpoints load, broken ones are refused, and code in them never runs."""

    name = "checkpoints"
    share = 2

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.weights: dict[str, dict[str, Tensor]] = {
            name: load_file(testbed.path(name) / "model.safetensors") for name in testbed.names()
        }

    def draw(self, rng: random.Random) -> FuzzCase:
        source = rng.choice(testbed.names())
        make: Callable[[str, random.Random], tuple[str, Any, Callable[[Path], None]]] = rng.choices(
            [self._tensors, self._file, self._config, self._code, self._whole],
            weights=[40, 20, 25, 5, 10],
        )[0]
        said, expected, change = make(source, rng)
        ran = self.folder / "ran"

        def run() -> None:
            folder = self.folder / "checkpoint"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(testbed.path(source), folder)
            change(folder)
            try:
                tp.load(str(folder))
            finally:
                if ran.exists():
                    ran.unlink()
                    raise Wrong("code of the checkpoint was run")

        return FuzzCase(f"{source}: {said}", expected, run)

    def _tensors(self, source: str, rng: random.Random) -> tuple[str, Any, Callable[[Path], None]]:
        weights = dict(self.weights[source])
        name = rng.choice(sorted(weights))
        value = weights[name]
        how = rng.choice(["missing", "renamed", "shorter", "flat", "nan", "inf", "one more"])
        if how in ("missing", "renamed"):
            del weights[name]
        if how in ("renamed", "one more"):
            weights[f"{name}.old"] = value.clone()
        if how == "shorter":
            weights[name] = torch.cat([value, value])
        if how == "flat":
            weights[name] = value[None]
        if how in ("nan", "inf"):
            spoiled = value.clone()
            spoiled.view(-1)[rng.randrange(value.numel())] = float(how)
            weights[name] = spoiled
        weights = {key: one.contiguous() for key, one in weights.items()}

        def change(folder: Path) -> None:
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

        return f"{name} is {how}", "refused", change

    def _file(self, source: str, rng: random.Random) -> tuple[str, Any, Callable[[Path], None]]:
        needed = ["model.safetensors", "config.json", "tokenizer.json", "processor_config.json"]
        name = rng.choice(needed)
        content = (testbed.path(source) / name).read_bytes()
        how = rng.choice(["missing", "empty", "torn", "pointer", "noise", "a folder"])
        made = {
            "empty": b"",
            "torn": content[: int(len(content) * rng.uniform(0, 0.95))],
            "pointer": POINTER,
            "noise": rng.randbytes(1000),
        }

        def change(folder: Path) -> None:
            (folder / name).unlink()
            if how == "a folder":
                (folder / name).mkdir()
            elif how != "missing":
                (folder / name).write_bytes(made[how])

        return f"{name} is {how}", "refused", change

    def _config(self, source: str, rng: random.Random) -> tuple[str, Any, Callable[[Path], None]]:
        config = json.loads((testbed.path(source) / "config.json").read_text())
        text = config["text_config"]
        changes: list[tuple[str, Callable[[], Any]]] = [
            ("a layer more", lambda: text.update(num_hidden_layers=text["num_hidden_layers"] + 1)),
            ("a layer less", lambda: text.update(num_hidden_layers=text["num_hidden_layers"] - 1)),
            ("wider", lambda: text.update(intermediate_size=text["intermediate_size"] * 2)),
            ("unknown family", lambda: config.update(model_type="nope", architectures=["Nope"])),
            ("another family", lambda: config.update(model_type="bert", architectures=["Bert"])),
        ]
        for section in (config, text, config["vision_config"]):
            for name in ("model_type", "hidden_size", "num_attention_heads", "architectures"):
                if name in section:
                    value = rng.choice([one for one in WRONG if one not in (None, section[name])])
                    changes.append(
                        (f"{name}={value!r}", lambda s=section, n=name, v=value: s.update({n: v}))  # type: ignore[misc]
                    )
        said, edit = rng.choice(changes)
        edit()
        spelled = rng.choice([json.dumps(config).encode()] * 4 + list(NO_JSON))
        if spelled in NO_JSON:
            said = f"{spelled[:20]!r}"

        def change(folder: Path) -> None:
            (folder / "config.json").write_bytes(spelled)

        # Another number of heads or another architecture name may still fit the weights.
        fits = "heads" in said or "architectures" in said
        return f"config.json: {said}", "either" if fits else "refused", change

    def _code(self, source: str, rng: random.Random) -> tuple[str, Any, Callable[[Path], None]]:
        ran = self.folder / "ran"
        line = f"open({str(ran)!r}, 'w').close()\n"
        how = rng.choice(["pickle", "module"])

        def change(folder: Path) -> None:
            if how == "pickle":
                (folder / "model.safetensors").unlink()
                (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil(line)))
            else:
                config = json.loads((folder / "config.json").read_text())
                config["auto_map"] = {
                    "AutoConfig": "evil.Config",
                    "AutoModel": "evil.Model",
                    "AutoProcessor": "evil.Processor",
                }
                config["model_type"] = "evil"
                (folder / "config.json").write_text(json.dumps(config))
                (folder / "evil.py").write_text(line)

        return f"code in a {how}", "refused", change

    def _whole(self, source: str, rng: random.Random) -> tuple[str, Any, Callable[[Path], None]]:
        def change(folder: Path) -> None:
            (folder / "notes.txt").write_text("something else")

        return "as it is", "accepted", change


class _Evil:
    """Runs a line of Python when it is unpickled."""

    def __init__(self, line: str) -> None:
        self.line = line

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (self.line,)


# --- run folders ----------------------------------------------------------------------------------


class RunFolders(Area):
    """Damaged run folders give the right tables or none."""

    name = "folders"
    share = 2

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        # Outputs name the folder, so the damaged copy takes the place of the intact one.
        self.place = folder / "run"
        small_run(self.place)
        shutil.copytree(self.place, folder / "whole")
        self.right = {name: command(name, str(self.place)) for name in ("table", "pairs")}

    def draw(self, rng: random.Random) -> FuzzCase:
        name = rng.choice(
            ["manifest.json", "answers.jsonl", "answers.parquet", "summary.csv", "plots"]
        )
        asked = rng.choices(["table", "pairs", "report", "compare"], weights=[4, 4, 2, 1])[0]
        said, change, same = self._change(name, rng)

        def run() -> None:
            shutil.rmtree(self.place)
            shutil.copytree(self.folder / "whole", self.place)
            change(self.place / name)
            if asked == "compare":
                small_run(self.place)
                if command("table", str(self.place)) != self.right["table"]:
                    raise Wrong("the resumed run gives another table")
                return
            more = ["--questions", "2"] if asked == "report" else []
            found = command(asked, str(self.place), *more)
            if same and asked in self.right and found != self.right[asked]:
                raise Wrong(f"the output differs: {found[:300]!r}")

        return FuzzCase(f"{asked} where {name} is {said}", "either", run)

    def _change(self, name: str, rng: random.Random) -> tuple[str, Callable[[Path], Any], bool]:
        """A description of the change, the change, and whether an accepted result must be right."""
        if name == "plots":
            return "missing", shutil.rmtree, True
        content = (self.folder / "whole" / name).read_bytes()
        if name == "summary.csv" and rng.random() < 0.5:
            other = content.replace(b"0.8", b"0.2").replace(b"1.0", b"0.4")
            return "of other figures", lambda path: path.write_bytes(other), True
        if name == "manifest.json" and rng.random() < 0.7:
            manifest = json.loads(content)
            said = _wrong_type(manifest, rng)
            text = json.dumps(manifest)
            return f"with {said}", lambda path: path.write_text(text), False
        if name == "answers.jsonl" and rng.random() < 0.5:
            lines = [json.loads(line) for line in content.splitlines()]
            said = _wrong_type(rng.choice(lines), rng)
            text = "".join(json.dumps(line) + "\n" for line in lines)
            return f"with {said}", lambda path: path.write_text(text), False
        how = rng.choice(["missing", "torn", "empty", "noise", "damaged", "a folder", "no JSON"])
        made = {
            "torn": content[: rng.randrange(len(content))],
            "empty": b"",
            "noise": rng.randbytes(500),
            "damaged": damaged(content, rng),
            "no JSON": rng.choice(NO_JSON),
        }

        def change(path: Path) -> None:
            path.unlink()
            if how == "a folder":
                path.mkdir()
            elif how != "missing":
                path.write_bytes(made[how])

        return how, change, how != "damaged"


def _wrong_type(tree: Any, rng: random.Random) -> str:
    """Replace a random value in ``tree``, in place; returns a description."""
    places = list(_places(tree))
    holder, key, said = rng.choice(places)
    holder[key] = rng.choice(WRONG)
    return f"{said}={holder[key]!r}"


def _places(tree: Any, said: str = "") -> Iterator[tuple[Any, Any, str]]:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(pairs):
        yield tree, key, f"{said}.{key}"
        if isinstance(value, dict | list):
            yield from _places(value, f"{said}.{key}")
