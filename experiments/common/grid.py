"""The cells of an experiment: methods times retentions."""

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

import tokenprune as tp
from tokenprune.compressor import Compressor
from tokenprune.errors import UserError
from tokenprune.experiments.common.cells import Cell, without_seed
from tokenprune.registry import strategies
from tokenprune.spec import has_retention

__all__ = [
    "ALL",
    "cells",
    "chosen",
    "expanded",
]


def cells(methods: Iterable[str], retention: Iterable[float], seeds: int = 1) -> list[Cell]:
    """The uncompressed model, then every method at every retention, most tokens first.

    Methods with their own retention ratio (``uniform@0.3``, ``globalcom2@0.5 + fastv@0.5``) are one
    cell.  Random methods without a seed become one cell per seed.

    Raises:
        UserError: An unknown method or option, or a retention outside (0, 1].
    """
    wanted = [cell for one in chosen(methods, retention) for cell in _seeded(one, seeds)]
    distinct = {repr(cell.compressor): cell for cell in wanted}
    return [Cell(), *distinct.values()]


def _seeded(compressor: Compressor, seeds: int) -> list[Cell]:
    """The method with the seeds 0, 1, ... if it is random and has no seed."""
    given = {item.name: getattr(compressor, item.name) for item in fields(compressor)}
    if seeds == 1 or "seed" not in given or compressor != without_seed(compressor):
        return [Cell(compressor)]
    changes: list[dict[str, Any]] = [{"seed": seed} for seed in range(seeds)]
    return [Cell(replace(compressor, **change), pooled=True) for change in changes]


ALL = "all"


def chosen(specs: Iterable[str], retention: Iterable[float]) -> list[Compressor]:
    """Every method at every retention, most tokens first; each once.

    Methods with their own retention ratio (``uniform@0.3``, ``fastv:retention=0.3``, chains) are
    included once.
    """
    ratios = sorted(set(retention), reverse=True)
    found: dict[str, Compressor] = {}
    for spec in specs:
        if has_retention(spec):
            methods = [tp.parse(spec)]
        else:
            methods = [tp.parse(spec, retention=ratio) for ratio in ratios]
        for method in methods:
            found.setdefault(repr(method), method)
    return list(found.values())


def expanded(
    specs: Iterable[str], check: Callable[[Compressor], None]
) -> tuple[list[str], dict[str, str]]:
    """The specs with ``all`` replaced by the methods that pass ``check``, and why others fail.

    ``check`` raises `UserError` for a method that does not run, as
    `compatibility.check_compatible` does.
    """
    methods: list[str] = []
    skipped: dict[str, str] = {}
    for spec in specs:
        if spec != ALL:
            methods.append(spec)
            continue
        for name in strategies.names():
            try:
                check(tp.create(name, retention=0.5))
            except UserError as error:
                skipped[name] = str(error)
            else:
                methods.append(name)
    return methods, skipped
