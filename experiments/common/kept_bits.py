"""The final selection of every image, packed into few bytes for the journal."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from tokenprune.engine.trace import SelectionRecord

__all__ = [
    "final",
    "pack",
    "packed_rows",
    "unpack",
]


def final(selections: Iterable[SelectionRecord]) -> dict[tuple[int, int], SelectionRecord]:
    """(row, image) to the last selection made of it, in the order of images.

    After several cuts, or a chain, that is what all of them kept: indices are into the full packed
    sequence.
    """
    last = {(chosen.row, chosen.image): chosen for chosen in selections}
    return dict(sorted(last.items()))


def packed_rows(selections: Iterable[SelectionRecord], rows: int) -> list[list[str]]:
    """For each of ``rows`` prompts its images' final selections, packed; empty where none was."""
    found: list[list[str]] = [[] for _ in range(rows)]
    for (row, _), chosen in final(selections).items():
        found[row].append(pack(chosen))
    return found


def pack(chosen: SelectionRecord) -> str:
    """A bit for every entry of the packed sequence, the first one highest, as base64."""
    kept = np.zeros(len(chosen.layout), dtype=bool)
    kept[chosen.keep.cpu().numpy()] = True
    return base64.b64encode(np.packbits(kept).tobytes()).decode("ascii")


def unpack(text: str, entries: int) -> NDArray[np.bool_] | None:
    """(entries,) which are kept; None if the text is not of a sequence that long."""
    try:
        data = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    except (binascii.Error, ValueError, TypeError):
        return None
    if len(data) != -(-entries // 8):
        return None
    return np.unpackbits(data)[:entries].astype(bool)
