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
    """(row, image) to its last selection, in the order of images.

    After several cuts, or a chain, it holds what all of them kept.  Indices refer to the full
    packed sequence.
    """
    last = {(chosen.row, chosen.image): chosen for chosen in selections}
    return dict(sorted(last.items()))


def packed_rows(selections: Iterable[SelectionRecord], rows: int) -> list[list[str]]:
    """For each of ``rows`` prompts, the packed final selections of its images; may be empty."""
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
    """(entries,) bool, kept entries; None if the text belongs to another length."""
    try:
        data = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    except (binascii.Error, ValueError, TypeError):
        return None
    if len(data) != -(-entries // 8):
        return None
    return np.unpackbits(data)[:entries].astype(bool)
