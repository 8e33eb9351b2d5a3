"""Plug in, run and compare visual-token compression methods for vision-language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

# Loaded on first use, so that `import tokenprune` and `tokenprune --help` stay quick.
_HOME = {
    "Chain": "compressor",
    "Compressor": "compressor",
    "ScoringCompressor": "compressor",
    "Selection": "compressor",
    "Stage": "compressor",
    "create": "spec",
    "parse": "spec",
    "compress": "engine.session",
    "load": "models.loading",
    "Card": "registry",
    "register": "registry",
    "Signal": "signals",
    "TokenLayout": "layout",
    "VisualTokens": "tokens",
}

if TYPE_CHECKING:
    from tokenprune.compressor import Chain, Compressor, ScoringCompressor, Selection, Stage
    from tokenprune.engine.session import compress
    from tokenprune.layout import TokenLayout
    from tokenprune.models.loading import load
    from tokenprune.registry import Card, register
    from tokenprune.signals import Signal
    from tokenprune.spec import create, parse
    from tokenprune.tokens import VisualTokens

__all__ = [
    "Card",
    "Chain",
    "Compressor",
    "ScoringCompressor",
    "Selection",
    "Signal",
    "Stage",
    "TokenLayout",
    "VisualTokens",
    "available",
    "compress",
    "create",
    "load",
    "parse",
    "register",
]


def available() -> list[str]:
    """Names of all registered strategies."""
    from tokenprune.registry import strategies

    return strategies.names()


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"tokenprune.{_HOME[name]}"), name)
    raise AttributeError(f"module 'tokenprune' has no attribute {name!r}")
