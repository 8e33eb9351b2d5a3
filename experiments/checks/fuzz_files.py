"""Fuzz areas: data files and images."""

from __future__ import annotations

import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokenprune.experiments.checks.cases import Area, FuzzCase, Wrong
from tokenprune.experiments.common.questions import Picture, Question
from tokenprune.experiments.common.summary import OVERALL
from tokenprune.experiments.datasets.files import read_data

__all__ = ["DataFiles", "ImageFiles", "damaged"]

WORDS = (
    "What?",
    "How many?",
    "é ü ß",
    "数字は?",
    "a <b> & 'c'",
    "$x$",
    "NA",
    "None",
    "nan",
    "=1+1",
)
NO_TEXT: tuple[Any, ...] = (None, True, [], {}, "", "  ", ["x"], {"a": 1})
NO_PLACE = ("x", [0.5], [0.5, 2], [-1, 0], [0, 0, 0], {"x": 0}, ["0", "0"], 5, [None, 0])


def damaged(content: bytes, rng: random.Random) -> bytes:
    """``content`` with bytes changed, removed or inserted at random places."""
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        place = rng.randrange(len(content) + 1)
        new = rng.choice(
            [b"", rng.randbytes(1), rng.randbytes(4), b"\0", b"\xff", b"9", b'"', b"["]
        )
        content = content[:place] + new + content[place + rng.choice([0, 1, 1, 4]) :]
    return content


class DataFiles(Area):
    """Valid lines are read unchanged; an invalid one is refused."""

    name = "data"
    share = 10

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for name in ("a.png", "b.png", "c.png", "sub/d.png"):
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (8, 6), (len(name), 90, 200)).save(path)
        (folder / "text.png").write_text("no image")
        (folder / "half.png").write_bytes((folder / "a.png").read_bytes()[:40])
        (folder / "empty.png").touch()
        os.mkfifo(folder / "pipe.png")
        self.path = folder / "data.jsonl"

    def draw(self, rng: random.Random) -> FuzzCase:
        lines = [self._line(rng, number) for number in range(1, rng.randint(2, 5))]
        make: Callable[[list[dict[str, Any]], random.Random], FuzzCase] = rng.choices(
            [self._right, self._wrong_field, self._wrong_text, self._damaged],
            weights=[30, 40, 15, 15],
        )[0]
        return make(lines, rng)

    def _line(self, rng: random.Random, number: int) -> dict[str, Any]:
        files = ["a.png", "b.png", "./c.png", "sub/d.png"]
        shown: dict[str, Any] = rng.choice(
            [
                {"image": rng.choice(files)},
                {"image": rng.choice(files)},
                {"images": rng.sample(files, 2)},
                {"video": rng.choices(files, k=3)},
            ]
        )
        more: dict[str, Any] = {
            "id": f"question {number}",
            "kind": rng.choice(WORDS),
            "place": [rng.random(), 1],
            "other": {"deep": [1, None]},
        }
        chosen = {name: more[name] for name in rng.sample(sorted(more), rng.randint(0, 4))}
        answer = rng.choice(["yes", 5, 0.25, -3, "None", "数"])
        return {**shown, "question": rng.choice(WORDS), "answer": answer, **chosen}

    def _case(
        self, content: bytes, expected: Any, check: Callable[[list[Question]], None], **asked: Any
    ) -> FuzzCase:
        def run() -> None:
            self.path.write_bytes(content)
            check(read_data(self.path, **asked))

        return FuzzCase(f"{content!r} {asked or ''}", expected, run)

    def _right(self, lines: list[dict[str, Any]], rng: random.Random) -> FuzzCase:
        spelled = [json.dumps(line, ensure_ascii=rng.random() < 0.5) for line in lines]
        mark, end = rng.choice(["", "\ufeff"]), rng.choice(["\n", "\r\n", "\n\n"])
        content = (mark + end.join(spelled) + rng.choice(["", end])).encode()

        def check(found: list[Question]) -> None:
            if len(found) != len(lines):
                raise Wrong(f"{len(found)} questions of {len(lines)}")
            for line, item in zip(lines, found, strict=True):
                wanted = (line["question"], str(line["answer"]), line.get("kind", "other"))
                if (item.question, item.answer, item.kind) != wanted:
                    raise Wrong(f"{item} is not {wanted}")
                if item.video != ("video" in line) or item.id != line.get("id", item.id):
                    raise Wrong(f"{item} is not what {line} says")
                if (None if item.place is None else list(item.place)) != line.get("place"):
                    raise Wrong(f"the place is {item.place}")

        return self._case(content, "accepted", check)

    def _wrong_field(self, lines: list[dict[str, Any]], rng: random.Random) -> FuzzCase:
        line = rng.choice(lines)
        shown = next(name for name in ("image", "images", "video") if name in line)
        field = rng.choice(
            ["question", "answer", "kind", "id", "place", "files", "missing", "twice"]
        )
        if field in ("question", "answer", "kind", "id"):
            line[field] = rng.choice([*NO_TEXT, *([OVERALL] if field == "kind" else [])])
        elif field == "place":
            line[field] = rng.choice(NO_PLACE)
        elif field == "missing":
            del line[rng.choice(["question", "answer", shown])]
        elif field == "twice":
            line["images" if shown != "images" else "image"] = ["a.png", "b.png"]
        else:
            none = ["no.png", "text.png", "half.png", "empty.png", "pipe.png", "sub", "", "a.png\0"]
            none += [
                "/dev/null",
                "/dev/zero",
                "x" * 5000,
                "a.png/b.png",
                "../" * 2000,
                "\ud800.png",
                "https://example.com/a.png",
                "ftp://example.com/a.png",
            ]
            broken = rng.choice(none)
            line[shown] = broken if shown == "image" else ["a.png", broken]
            if rng.random() < 0.3:
                line[shown] = rng.choice([None, 5, [], {}, [5], [[]], {"a": "a.png"}, True])
        content = "\n".join(map(json.dumps, lines)).encode()
        return self._case(content, "refused", lambda _: None)

    def _wrong_text(self, lines: list[dict[str, Any]], rng: random.Random) -> FuzzCase:
        right = json.dumps(lines[0])
        head = '{"image": "a.png", "question": "q", "answer": '
        deep = 100_000
        content = rng.choice(
            [
                b"", b"\n\n", b"null", b"5", b'"x"', b"[]", b"{}", b"[" * deep, b'{"a":' * deep,
                b"[" * deep + b"]" * deep, b"\xff\xfe", right.encode("utf-16"), b"\0" * 100,
                right.encode()[: rng.randrange(1, len(right))], right.encode() + b"x",
                right.encode() + right.encode(), b"[" + right.encode() + b"]",
                json.dumps(lines, indent=2).encode(), b"nope\n" * rng.randint(2, 500),
                *(f"{head}{value}}}".encode() for value in
                  ("NaN", "Infinity", "-Infinity", "1e400", "9" * 5000, "yes", "01", "'a'")),
                (head + "[" * deep + "]" * deep + "}").encode(),
                f'{head}"a", "x": {"[" * deep}{"]" * deep}}}'.encode(),
                f'{head}"a", "place": [NaN, 0]}}'.encode(),
                f'{head}"a", "place": [0, 1e400]}}'.encode(),
            ]
        )  # fmt: skip
        if rng.random() < 0.2:
            asked: dict[str, Any] = rng.choice(
                [{"count": 10**20}, {"count": 50}, {"modality": "sound"}]
            )
            return self._case(right.encode(), "refused", lambda _: None, **asked)
        return self._case(content, "refused", lambda _: None)

    def _damaged(self, lines: list[dict[str, Any]], rng: random.Random) -> FuzzCase:
        content = damaged("\n".join(map(json.dumps, lines)).encode(), rng)
        return self._case(content, "either", lambda _: None)


# --- images ---------------------------------------------------------------------------------------

_EXACT = ("PNG", "BMP", "TIFF", "PPM", "WEBP", "TGA")  # formats that keep every pixel
_RARE = ("GIF", "PCX", "ICO", "DDS", "SGI", "JPEG2000", "AVIF", "ICNS", "IM", "MSP", "XBM", "MPO")
_ORIENTATION = 0x0112


class ImageFiles(Area):
    """Valid images give the pixels that were saved; broken ones are refused."""

    name = "images"
    share = 10

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        os.mkfifo(folder / "pipe.png")
        (folder / "folder.png").mkdir()
        (folder / "text.png").write_text("no image")
        (folder / "loop.png").symlink_to("loop.png")

    def draw(self, rng: random.Random) -> FuzzCase:
        make: Callable[[random.Random], FuzzCase] = rng.choices(
            [self._right, self._upright, self._torn, self._no_image, self._damaged],
            weights=[30, 15, 15, 15, 25],
        )[0]
        return make(rng)

    def _case(
        self, content: bytes, said: str, expected: Any, wanted: NDArray[np.uint8] | None = None
    ) -> FuzzCase:
        path = self.folder / "image"

        def run() -> None:
            path.write_bytes(content)
            found = Picture("image", path).open()
            if found.mode != "RGB":
                raise Wrong(f"the mode is {found.mode}")
            if wanted is not None and not np.array_equal(np.asarray(found), wanted):
                raise Wrong("the pixels differ from the saved ones")

        return FuzzCase(said, expected, run)

    def _right(self, rng: random.Random) -> FuzzCase:
        kind = rng.choice(_EXACT)
        mode = rng.choice(["RGB", "L"] if kind in ("PPM", "WEBP") else ["RGB", "L", "P", "RGBA"])
        mode = rng.choice(["RGB", "L", "1"]) if kind == "BMP" else mode
        image, wanted = _image(mode, rng)
        options = {"lossless": True} if kind == "WEBP" else {}
        return self._case(_saved(image, kind, **options), f"{kind} {mode} {image.size}",
                          "accepted", wanted)  # fmt: skip

    def _upright(self, rng: random.Random) -> FuzzCase:
        image, wanted = _image("RGB", rng)
        turn = rng.randint(1, 8)
        exif = Image.Exif()
        exif[_ORIENTATION] = turn
        # The transformations that make the stored image upright, from the EXIF standard.
        ways: list[Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = [
            lambda a: a, np.fliplr, lambda a: np.rot90(a, 2), np.flipud,
            lambda a: a.transpose(1, 0, 2), lambda a: np.rot90(a, -1),
            lambda a: np.rot90(a, 2).transpose(1, 0, 2), np.rot90,
        ]  # fmt: skip
        content = _saved(image, "PNG", exif=exif.tobytes())
        said = f"PNG {image.size} with orientation {turn}"
        return self._case(content, said, "accepted", ways[turn - 1](wanted))

    def _torn(self, rng: random.Random) -> FuzzCase:
        kind = rng.choice(["PNG", "JPEG", "BMP", "WEBP", "PPM"])
        content = _saved(_image("RGB", rng, least=24)[0], kind)
        end = int(len(content) * rng.uniform(0, 0.7))
        return self._case(content[:end], f"{kind}, {end} of {len(content)} bytes", "refused")

    def _no_image(self, rng: random.Random) -> FuzzCase:
        nothing = [
            b"",
            b"\0" * 5000,
            b"<svg/>",
            b"%PDF-1.4",
            b"GIF89a",
            b"\x89PNG\r\n\x1a\n",
            b"BM",
        ]
        nothing += [_bomb(rng.choice([10_000, 65_000, 2**31 - 1])), b"\xff\xd8\xff", b"P6 9 9 255 "]
        nothing += [rng.randbytes(300), b"RIFF\x10\0\0\0WEBPVP8 ", b"II*\0\x08\0\0\0", b"P6 " * 99]
        if rng.random() < 0.5:
            content = rng.choice(nothing)
            return self._case(content, repr(content[:60]), "refused")
        names = ["no.png", "pipe.png", "folder.png", "text.png", "loop.png", "", ".", "a\0b.png"]
        names += ["/dev/null", "/dev/zero", "/dev/random", "/proc/self/mem", "x" * 5000, "\udcff"]
        path = self.folder / rng.choice(names)
        return FuzzCase(f"the file {path}", "refused", lambda: Picture("image", path).open())

    def _damaged(self, rng: random.Random) -> FuzzCase:
        kind = rng.choice([*_EXACT, "JPEG", *_RARE])
        mode = {"MSP": "1", "XBM": "1", "PCX": "L", "GIF": "P"}.get(kind, "RGB")
        try:
            content = _saved(_image(mode, rng)[0], kind)
        except (KeyError, OSError, ValueError):  # this version of Pillow does not write it
            content = _saved(_image("RGB", rng)[0], "PNG")
        return self._case(damaged(content, rng), f"damaged {kind}", "either")


def _image(mode: str, rng: random.Random, least: int = 1) -> tuple[Image.Image, NDArray[np.uint8]]:
    """A random image, and its pixels (H, W, 3)."""
    height, width = rng.randint(least, 40), rng.randint(least, 40)
    draw = np.random.default_rng(rng.randrange(2**32))
    pixels: NDArray[np.uint8] = draw.integers(256, size=(height, width, 3), dtype=np.uint8)
    if mode == "RGB":
        return Image.fromarray(pixels), pixels
    if mode == "RGBA":  # opaque, so that the background does not matter
        return Image.fromarray(np.dstack([pixels, np.full_like(pixels[..., :1], 255)])), pixels
    grey = pixels[..., 0]
    if mode == "1":
        grey = np.where(grey > 127, 255, 0).astype(np.uint8)
        return Image.fromarray(grey > 0), np.stack([grey] * 3, -1)
    if mode == "L":
        return Image.fromarray(grey), np.stack([grey] * 3, -1)
    palette = draw.integers(256, size=(256, 3), dtype=np.uint8)
    image = Image.fromarray(grey).convert("P")
    image.putdata(grey.flatten().tolist())
    image.putpalette(palette.flatten().tolist())
    return image, palette[grey]


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _bomb(side: int) -> bytes:
    """A PNG whose header claims ``side`` x ``side`` pixels, almost without data."""
    import struct
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = [
        struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one))
        for one in (header, data, b"IEND")
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
