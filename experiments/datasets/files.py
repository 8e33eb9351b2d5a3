"""The records of data files: JSON lines, CSV, TSV, Parquet, folders, and `datasets` on disk."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from tokenprune.errors import UserError
from tokenprune.experiments.common.questions import Question
from tokenprune.experiments.datasets.packed import (
    DatasetImage,
    ParquetImage,
    holds_images,
    open_dataset,
)
from tokenprune.experiments.datasets.records import FIELDS, Asked, Fields, Records, questions_of

__all__ = ["read_data", "records_of"]


_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


_IMAGES = ("image", "images", "video")


_LISTS = ("images", "video", "answers", "choices", "place")


def read_data(path: Path, *, split: str | None = None, **asked: Any) -> list[Question]:
    """The questions of a data file or folder.

    Every record has ``image`` (a path), ``images`` (a list of paths) or ``video`` (the paths of its
    frames), ``question``, and ``answer`` or ``answers`` (a list).  It may have ``choices`` (a
    list), ``metric``, ``max_new_tokens``, ``kind``, ``id`` and ``place`` ([x, y] of the spot in the
    image that shows the answer, as shares of width and height).  Paths are relative to the file.
    Other fields, and empty ones outside JSON, are ignored.  Every image is decoded once, to check
    that it is intact and that the frames of a video have one size.

    Args:
        path: As of `records_of`.
        split: As of `records_of`.
        **asked: Which questions are wanted, as in `records.Asked`; by default all.

    Raises:
        UserError: As `records_of` and `records.questions_of`.
    """
    return questions_of(records_of(path, split), Asked(**asked))


def records_of(path: Path, split: str | None = None) -> Records:
    """The records of a file or folder; its form is known from its name and content.

    Args:
        path: JSON lines, ``.csv``, ``.tsv`` or ``.parquet``; or a folder: a data set that
            ``datasets`` wrote (``save_to_disk``), Parquet files, ``metadata.jsonl`` or
            ``metadata.csv`` beside images (``file_name`` is the image), or images, whose answers
            are the names of their subfolders.
        split: The split of a data set that ``datasets`` wrote with several.

    Raises:
        UserError: It cannot be read, or is none of these.
    """
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError):  # too long for a path, or with a null byte
        is_folder = False
    if is_folder:
        return _folder(path, split)
    if split is not None:
        raise UserError(f"--split is for data sets in a folder; {str(path)!r} is none.")
    readers: dict[str, Callable[[Path], Records]] = {
        ".csv": partial(_table, separator=","),
        ".tsv": partial(_table, separator="\t"),
        ".parquet": lambda file: _parquet([file]),
    }
    return readers.get(path.suffix.lower(), _json_lines)(path)


def _folder(path: Path, split: str | None) -> Records:
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _dataset(path, split)
    if shards := sorted(path.rglob("*.parquet")):
        shards = shards if (path / _METADATA[-1]) not in shards else [path / _METADATA[-1]]
        return _parquet(_of_split(path, shards, split), path)
    if split is not None:
        raise UserError(
            f"--split is for Parquet files and what `datasets` wrote; {str(path)!r} is neither."
        )
    for name in _METADATA:
        if (path / name).is_file():
            return records_of(path / name)
    return _images(path)


# --- text files -----------------------------------------------------------------------------------


def _json_lines(path: Path) -> Records:
    content = _read(path).removeprefix(b"\xef\xbb\xbf")
    if content.lstrip().startswith(b"["):
        raise UserError(
            f"{path} begins with '[', as a JSON array does; write one object per line instead, "
            f"without brackets and commas between them: jq -c '.[]' {shlex.quote(str(path))}"
        )
    lines = enumerate(content.splitlines(), 1)
    entries = ((number, _object(line)) for number, line in lines if line.strip())
    return Records(path, path.parent, entries)


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise OSError(None, "It is a pipe or a device, which can be read only once")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        said = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"cannot read the data file {str(path)!r}: {said}. Expected JSON lines; each line is "
            f"an object {FIELDS}; or a file that ends with .csv, .tsv or .parquet."
        ) from error


def _object(line: bytes) -> Fields | UserError:
    """The JSON object of a line, or why it is none."""
    each = f"each line is an object {FIELDS}"
    try:
        fields = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        return UserError("this is not UTF-8; save the file as UTF-8.")
    except json.JSONDecodeError as error:
        return UserError(f"this is not JSON ({error.msg} at column {error.colno}); {each}.")
    except UserError as error:
        return error
    except ValueError:
        return UserError(f"a number has more digits than can be read; {each}.")
    except RecursionError:
        return UserError(f"lists or objects are nested too deeply; {each}.")
    if not isinstance(fields, dict):
        return UserError(f"expected an object, got {type(fields).__name__}; {each}.")
    return _renamed(fields)


def _no_constant(name: str) -> NoReturn:
    raise UserError(f"{name} is no JSON; write a text or a finite number.")


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    """``fields`` with ``image`` for ``file_name``, as `datasets` calls it beside images."""
    if "file_name" in fields and not {"image", "images", "video"} & fields.keys():
        return {**fields, "image": fields["file_name"]}
    return fields


def _table(path: Path, separator: str) -> Records:
    """The rows of a CSV or TSV file; lists are written as in JSON."""
    import pandas as pd

    _read(path)  # explains why it cannot be read
    try:
        table = pd.read_csv(
            path,
            sep=separator,
            dtype=str,
            keep_default_na=False,
            index_col=False,
            encoding="utf-8-sig",
        )
    except (ValueError, UnicodeError, pd.errors.ParserError) as error:
        raise UserError(
            f"cannot read the data file {str(path)!r}: {str(error).strip()}. Expected UTF-8 with a "
            "header line that names the columns, such as image, question and answer."
        ) from error
    rows = enumerate(table.to_dict("records"), 1)
    return Records(path, path.parent, ((number, _cells(row)) for number, row in rows), "row")


def _cells(row: Mapping[Any, str]) -> Fields | UserError:
    """The fields of a row of texts; empty cells are left out."""
    fields: dict[str, Any] = {str(name): text for name, text in row.items() if text.strip()}
    for name in {*_LISTS, "max_new_tokens"} & fields.keys():
        try:
            fields[name] = json.loads(fields[name])
        except (ValueError, RecursionError):
            wanted = 'a list as in JSON, such as ["a", "b"]' if name in _LISTS else "a number"
            return UserError(f"{name!r} must be {wanted}, got {fields[name][:60]!r}.")
    return _renamed(fields)


# --- Parquet and `datasets` -----------------------------------------------------------------------


def _parquet(files: Sequence[Path], path: Path | None = None) -> Records:
    """The rows of Parquet files; images may be paths or stored in them, as `datasets` does."""
    return Records(path or files[0], path or files[0].parent, _rows(files), "row")


def _of_split(path: Path, files: Sequence[Path], split: str | None) -> list[Path]:
    """Those of ``files`` whose name begins with ``split``, as in ``test-00000-of-00004.parquet``.

    Raises:
        UserError: They have several splits and none is chosen, or there is no such split.
    """
    named = {file: re.sub(r"-\d+-of-\d+.*", "", file.stem) for file in files}
    splits = sorted({name for file, name in named.items() if name != file.stem})
    if split is None and len(splits) < 2:
        return list(files)
    if split not in splits:
        raise UserError(
            f"the folder {str(path)!r} has the splits {', '.join(splits) or '(none)'}; choose one "
            "with --split, or leave it out if there are none."
        )
    return [file for file, name in named.items() if name == split]


def _rows(files: Sequence[Path]) -> Iterator[tuple[int, Fields]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    for file in files:
        try:
            opened = pq.ParquetFile(file)
            kinds = {column.name: column.type for column in opened.schema_arrow}
            packed = [name for name, kind in kinds.items() if _holds_images(kind)]
            plain = [name for name in kinds if name not in packed]
            for group in range(opened.num_row_groups):
                rows = opened.read_row_group(group, columns=plain)
                for place in range(opened.metadata.row_group(group).num_rows):
                    number += 1
                    where = partial(ParquetImage, str(file), group, row=place)
                    images = {name: where(column=name) for name in packed if name in _IMAGES}
                    row = {name: rows[name][place].as_py() for name in plain}
                    yield number, _stored(row, images)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"cannot read the data file {str(file)!r}: {error}.") from error


def _holds_images(kind: Any) -> bool:
    """Whether a column of this Arrow type holds encoded images, or lists of them."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _holds_images(kind.value_type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _stored(row: Mapping[str, Any], images: Mapping[str, ParquetImage | DatasetImage]) -> Fields:
    """The fields of a row, without those that are empty.

    Args:
        row: Its other fields.
        images: The place of the image, or of the list of images, in each column of images.
    """
    empty = (None, "")
    fields = {  # a missing number is NaN, which does not equal itself
        name: value for name, value in row.items() if value not in empty and value == value
    }
    for name, image in images.items():
        if name == "image":
            fields[name] = image
        elif count := image.count():
            fields[name] = [replace(image, index=index) for index in range(count)]
    return _renamed(fields)


def _dataset(path: Path, split: str | None) -> Records:
    """What ``datasets`` wrote with ``save_to_disk``."""
    found = open_dataset(str(path), split)
    packed = [name for name, kind in found.features.items() if holds_images(kind)]
    plain = found.remove_columns(packed)

    def rows() -> Iterator[tuple[int, Fields]]:
        for place in range(len(found)):
            row = plain[place] if plain.column_names else {}
            where = partial(DatasetImage, str(path), split, row=place)
            images = {name: where(column=name) for name in packed if name in _IMAGES}
            yield place + 1, _stored(row, images)

    return Records(path, path, rows(), "row")


# --- folders of images ----------------------------------------------------------------------------


def _images(path: Path) -> Records:
    """The images in a folder; the name of a subfolder is the answer about the images in it."""
    endings = Image.registered_extensions()
    files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in endings]
    if not files:
        raise UserError(
            f"the folder {str(path)!r} holds no data set: neither {', '.join(_METADATA)}, nor "
            "Parquet files, nor images, nor what `datasets` writes with save_to_disk; check the "
            "path, or give the data file itself."
        )

    def rows() -> Iterator[tuple[int, Fields]]:
        for number, file in enumerate(files, 1):
            inside = file.relative_to(path)
            answer = {"answer": inside.parts[0]} if len(inside.parts) > 1 else {}
            yield number, {"id": inside.as_posix(), "image": inside.as_posix(), **answer}

    form = "the question about all images is given with --prompt, and answers are subfolders"
    return Records(path, path, rows(), "image", form)
