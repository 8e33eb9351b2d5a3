"""Plug in, run and compare visual-token compression methods for vision-language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tokenprune import deprecated

__version__ = "0.1.0.dev0"

_HOME = {
    "Adapter": "adapter",
    "Card": "registry",
    "Chain": "compressor",
    "Compressor": "compressor",
    "ContractError": "errors",
    "EncoderCompressor": "encoder",
    "Kind": "layout",
    "Ledger": "cost.ledger",
    "ScoringCompressor": "compressor",
    "Selection": "compressor",
    "SelectionRecord": "engine.trace",
    "Signal": "signals",
    "Stage": "compressor",
    "TokenLayout": "layout",
    "Trace": "engine.trace",
    "UserError": "errors",
    "VisualTokens": "tokens",
    "compress": "engine.session",
    "create": "spec",
    "list_methods": "catalogue",
    "list_models": "catalogue",
    "load": "models.loading",
    "parse": "spec",
    "register": "registry",
    "register_adapter": "registry",
}
"""Public names and their modules.  Imported on first use, so that ``import tokenprune`` is fast."""

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter
    from tokenprune.catalogue import list_methods, list_models
    from tokenprune.compressor import Chain, Compressor, ScoringCompressor, Selection, Stage
    from tokenprune.cost.ledger import Ledger
    from tokenprune.encoder import EncoderCompressor
    from tokenprune.engine.session import compress
    from tokenprune.engine.trace import SelectionRecord, Trace
    from tokenprune.errors import ContractError, UserError
    from tokenprune.layout import Kind, TokenLayout
    from tokenprune.models.loading import load
    from tokenprune.registry import Card, register, register_adapter
    from tokenprune.signals import Signal
    from tokenprune.spec import create, parse
    from tokenprune.tokens import VisualTokens

__all__ = [
    "Adapter",
    "Card",
    "Chain",
    "Compressor",
    "ContractError",
    "EncoderCompressor",
    "Kind",
    "Ledger",
    "ScoringCompressor",
    "Selection",
    "SelectionRecord",
    "Signal",
    "Stage",
    "TokenLayout",
    "Trace",
    "UserError",
    "VisualTokens",
    "compress",
    "create",
    "list_methods",
    "list_models",
    "load",
    "parse",
    "register",
    "register_adapter",
]

deprecated.install()


def available() -> list[str]:
    """Names of all methods.  The name is now `list_methods`."""
    deprecated.warn("tokenprune.available()", "tokenprune.list_methods()")
    from tokenprune.catalogue import list_methods

    return list_methods()


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"tokenprune.{_HOME[name]}"), name)
    raise AttributeError(f"module 'tokenprune' has no attribute {name!r}")
