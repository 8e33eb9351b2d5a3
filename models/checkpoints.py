"""Reading checkpoints from folders and the Hub.  Broken or incomplete ones are refused.

An error that a library raises over the files of a checkpoint becomes one `UserError`.  Weights are
compared with the model that they are for.  Code that comes with a checkpoint is executed only if
the caller trusts it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenprune.errors import UserError, unknown
from tokenprune.models.published import KNOWN, hub_id
from tokenprune.models.weights import (
    FILES,
    bad_values,
    check_shards,
    json_object,
    refuse_faults,
    weight_files,
)
from tokenprune.texts import first_line

__all__ = [
    "Source",
    "device_of",
    "dtype_of",
    "read_config",
    "read_model",
    "read_processor",
    "reading",
    "source_of",
    "unreachable_hub",
]


_POINTER = b"version https://git-lfs"


_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Options of ``from_pretrained`` that locate files; they apply to config, weights and processor."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: The name that the user gave.
        where: The argument of ``from_pretrained``.
        folder: Its folder, or None if it is on the Hub.
        embedded: Whether it is a testbed.
        unreachable: Why the Hub, which it is on, cannot be reached; empty if it can.
        trusted: Whether code that comes with it may be executed.
    """

    name: str
    where: str
    folder: Path | None
    embedded: bool = False
    trusted: bool = False
    unreachable: str = ""


def source_of(name: str, *, trusted: bool = False) -> Source:
    """Where ``name`` is: an embedded testbed, a local folder or a Hub id (`published.hub_id`).

    Args:
        name: As for `tokenprune.load`.
        trusted: Whether code that comes with it may be executed.

    Raises:
        UserError: ``name`` is none of these.
    """
    from tokenprune.models import testbed

    if name in testbed.names():
        folder = testbed.path(name)
        return Source(name, str(folder), folder, embedded=True, trusted=trusted)
    try:
        is_folder = name != "" and Path(name).is_dir()
    except (OSError, ValueError):  # too long for a path, or with a NUL
        is_folder = False
    if is_folder:
        return Source(name, name, Path(name), trusted=trusted)
    if os.path.isfile(name):
        raise UserError(
            f"cannot load {name!r}: it is a file; give the folder that holds config.json."
        )
    name = hub_id(name) or name
    if "/" not in name:
        raise unknown("model", name, [*testbed.names(), *KNOWN])
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise UserError(
            f"cannot load {name!r}: there is no such folder, and a Hub id is written owner/name."
        )
    return Source(name, name, None, trusted=trusted, unreachable=unreachable_hub())


def unreachable_hub() -> str:
    """Why the Hub cannot be reached; empty if it can, or if the environment says not to try.

    One attempt of at most five seconds.  Downloads would try six times and take half a minute.
    """
    from huggingface_hub import constants, get_session, is_offline_mode

    if is_offline_mode():
        return ""
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # the classes of the HTTP library differ between its versions
        return f"{constants.ENDPOINT}: {first_line(str(error)) or type(error).__name__}"
    return ""


@contextmanager
def reading(name: str, what: str = "") -> Iterator[None]:
    """Turn any exception over the files of the checkpoint ``name`` into one `UserError`.

    Args:
        name: The name that the user gave.
        what: The part that is read; the message names it before the reason.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # parsers and model classes raise anything
        if "trust_remote_code" in str(error):
            raise UserError(
                f"cannot load {name!r}: it comes with code, which is not executed unless "
                "you trust it; read the code, then give --trust-remote-code "
                "(trust_remote_code=True)."
            ) from error
        reason = first_line(str(error))
        if not reason or not isinstance(error, OSError | ValueError):
            reason = f"{type(error).__name__}: {reason}".removesuffix(": ")
        raise UserError(f"cannot load {name!r}: {what}{reason}.") from error


# --- config and processor -------------------------------------------------------------------------


def read_config(name: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """The ``transformers`` config of a testbed, a Hub id or a local folder.

    Args:
        name: As for `tokenprune.load`.
        trust_remote_code: Whether a config class that comes with it may be executed.
        **options: Where to look: ``revision``, ``token``, ``local_files_only``, ...

    Raises:
        UserError: There is no config, it cannot be read, or it needs code that is not trusted.
    """
    return config_of(source_of(name, trusted=trust_remote_code), options)


def config_of(source: Source, options: Mapping[str, Any]) -> Any:
    """As `read_config`."""
    import transformers

    from tokenprune.models import testbed

    if source.folder is not None:
        _check_files(source.name, source.folder / options.get("subfolder", ""))
    try:
        with reading(source.name):
            return transformers.AutoConfig.from_pretrained(
                source.where, trust_remote_code=source.trusted, **_places(source, options)
            )
    except UserError as error:
        if source.unreachable:
            raise UserError(
                f"cannot load {source.name!r}: there is no such folder and no copy of it in the "
                f"cache, and the Hub cannot be reached ({source.unreachable}); check the path or "
                "the network."
            ) from error
        raise UserError(
            f"{error} Give an embedded testbed ({', '.join(testbed.names())}), a local folder or "
            "a Hub id."
        ) from error


def _places(source: Source, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that locate files; without the Hub, only the cache is read."""
    places = {name: options[name] for name in _HUB if name in options}
    return places | ({"local_files_only": True} if source.unreachable else {})


def _check_files(name: str, folder: Path) -> None:
    """Raise `UserError` if ``folder`` has no config.json, or has a Git LFS pointer or broken JSON.

    Transformers ignores some of these files if it cannot read them.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"cannot load {name!r}: there is no config.json in it.")
    weights = [file for kind in ("*.safetensors", "*.bin") for file in sorted(folder.glob(kind))]
    for file in [*(folder / name for name in FILES), *weights]:
        if not file.is_file():
            continue
        with reading(name, f"{file.name}: "), file.open("rb") as opened:
            start = opened.read(len(_POINTER))
        if start == _POINTER:
            raise UserError(
                f"cannot load {name!r}: {file.name} is a Git LFS pointer in place of the file; "
                "run git lfs pull there."
            )
        if file.suffix == ".json":
            json_object(name, file)


def read_processor(source: Source, options: Mapping[str, Any]) -> Any:
    """The processor that belongs to a model.

    Args:
        source: Where the model comes from.
        options: For ``from_pretrained``; only those that locate files are used.

    Raises:
        UserError: A part of it is missing or broken, or needs code that is not trusted.
    """
    import transformers

    with reading(source.name, "its processor: "):
        processor = transformers.AutoProcessor.from_pretrained(
            source.where, trust_remote_code=source.trusted, **_places(source, options)
        )
        folder = _folder(source, options)
    for files in (
        ("tokenizer_config.json",),
        ("processor_config.json", "preprocessor_config.json"),
    ):
        if not any((folder / file).is_file() for file in files):
            raise UserError(
                f"cannot load {source.name!r}: there is no {' or '.join(files)} in it, so it is "
                "not known how to prepare prompts and images."
            )
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            raise UserError(
                f"cannot load {source.name!r}: its processor, a {type(processor).__name__}, has no "
                f"{part.replace('_', ' ')}."
            )
    return processor


def _folder(source: Source, options: Mapping[str, Any]) -> Path:
    """The folder with the files of a model on this machine."""
    from transformers.utils.hub import cached_file

    if source.folder is not None:
        return source.folder / str(options.get("subfolder", ""))
    return Path(str(cached_file(source.where, "config.json", **_places(source, options)))).parent


# --- weights --------------------------------------------------------------------------------------


def read_model(
    kind: str, config: Any, source: Source, dtype: str | torch.dtype, options: Mapping[str, Any]
) -> Any:
    """The model with its weights, after checking all of them.

    Args:
        kind: Name of the model class.
        config: Config of the model.
        source: Where it comes from.
        dtype: As for `tokenprune.load`.
        options: For ``from_pretrained``.

    Raises:
        UserError: Tensors are missing, unexpected, of another shape, integers, NaN or infinite;
            files are missing or broken; or the class comes with the checkpoint, which is not
            trusted.
    """
    cls = _model_class(kind, config, source, options)
    places = _places(source, options)
    settings = {**options, **places, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with reading(source.name, "its weights: "):
        if source.folder is not None:
            check_shards(source.name, source.folder / options.get("subfolder", ""))
        with _without_bar() if source.embedded else nullcontext():
            model, report = cls.from_pretrained(
                source.where, dtype=dtype, trust_remote_code=source.trusted, **settings
            )
        faults = {
            "missing": report["missing_keys"],
            "not of this model": report["unexpected_keys"],
            "of another shape than the model's": [
                f"{key}: {tuple(found)} for {tuple(wanted)}"
                for key, found, wanted in report["mismatched_keys"]
            ],
            **bad_values(model, weight_files(_folder(source, options), options.get("variant"))),
        }
    refuse_faults(source.name, faults)
    return model.eval()


@contextmanager
def _without_bar() -> Iterator[None]:
    """While open, transformers shows no progress bar, which a small model does not need."""
    from transformers import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _model_class(kind: str, config: Any, source: Source, options: Mapping[str, Any]) -> Any:
    """The class ``kind`` from transformers or, if it is trusted, from the checkpoint."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    found = getattr(transformers, kind, None)
    if found is not None:
        if not isinstance(config, found.config_class):
            raise UserError(
                f"cannot load {source.name!r}: its config.json names the model class {kind} and "
                f"the model type {config.model_type!r}, which do not belong together."
            )
        return found
    brought = [str(place) for place in (getattr(config, "auto_map", None) or {}).values()]
    place = next((place for place in brought if place.endswith(f".{kind}")), None)
    with reading(source.name, "its model class: "):
        if place is None:
            raise UserError(
                f"cannot load {source.name!r}: neither transformers {transformers.__version__} nor "
                f"the checkpoint has the model class {kind}."
            )
        if not source.trusted:
            raise ValueError("trust_remote_code")
        return get_class_from_dynamic_module(place, source.where, **_places(source, options))


# --- dtype and device -----------------------------------------------------------------------------


def dtype_of(dtype: str | torch.dtype) -> str | torch.dtype:
    """The dtype called ``dtype``, or ``auto``.  Raises `UnknownNameError`."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    floats = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in floats:
        raise unknown("dtype", dtype, [*floats, "auto"])
    return floats[dtype]


def device_of(device: str | torch.device) -> torch.device:
    """The device called ``device``, after checking that this machine has it.

    Raises:
        UserError: There is no device of that name, or this machine does not have it.
    """
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        raise unknown("device", str(device), ["cpu", "cuda", "cuda:0", "mps"]) from None
    try:
        backend = torch.get_device_module(wanted)
        count = backend.device_count() if backend.is_available() else 0
    except (AttributeError, RuntimeError):  # PyTorch knows the name, but was built without it
        count = 0
    if (wanted.index or 0) < count:
        return wanted
    kind = {"cuda": "CUDA", "meta": "computing"}.get(wanted.type, wanted.type)
    there = f"{count} {kind} device{'s' if count > 1 else ''}" if count else f"no {kind} device"
    raise UserError(
        f"device {str(device)!r} was asked for, but this machine has {there} that PyTorch can see; "
        "use --device cpu."
    )
