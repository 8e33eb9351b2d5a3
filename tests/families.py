"""Families in which the tests run every combination, and those in which they sample."""

from __future__ import annotations

from collections.abc import Sequence

from tokenprune.testing.host import DECODERS, Host, hosts

FULL = ("LLaVA-NeXT", "LLaVA-OneVision")
"""Between them: CLS token or not, separators, videos, resampled canvases, images without crops."""


def full_hosts(decoders: Sequence[str] = DECODERS) -> list[Host]:
    """The tiny models of the families in `FULL`; `test_families.py` samples the others."""
    return [host for host in hosts(decoders) if host.name in FULL]
