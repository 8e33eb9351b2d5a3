"""Which methods can prune inside a server, which reserves the place of an image in advance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenprune.compatibility import lacking, other_options
from tokenprune.compressor import Compressor
from tokenprune.errors import UserError
from tokenprune.registry import strategies
from tokenprune.serving.specs import check_served, refused
from tokenprune.spec import create, parse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenprune.adapter import Adapter
    from tokenprune.layout import TokenLayout

__all__ = ["check_counted"]


def check_counted(adapter: Adapter, compressor: Compressor) -> None:
    """Raise `UserError` unless the size of an image alone decides how many of its tokens stay.

    Images of one view and of several, of square, wide and tall ones are tried (`Compressor.count`).

    Args:
        adapter: The model.
        compressor: The method.

    Raises:
        UserError: As stated, or as `check_served`.
    """
    check_served(adapter, compressor)
    layouts = _layouts(adapter)
    if _counts(compressor, layouts):
        return
    others = [
        parse(label, retention=part.retention)
        for part in compressor.parts()
        for label in other_options(adapter.facts, part)
    ]
    methods = [create(name, retention=compressor.retention) for name in strategies.names()]
    works = [
        one.label
        for one in [*others, *methods]
        if not lacking(adapter.facts, one) and not refused(one) and _counts(one, layouts)
    ]
    raise UserError(
        f"the content of an image decides how many tokens {compressor.label} keeps, but a server "
        "reserves their place before it sees the image; compress in front of the server with "
        "tokenprune.serving.image_embeds, or serve a method whose number follows from the size: "
        f"{', '.join(dict.fromkeys(works))}."
    )


def _layouts(adapter: Adapter) -> list[TokenLayout]:
    """Layouts of images of usual and of extreme shapes."""
    facts = adapter.facts.vision
    side = facts.view_shape[0] * facts.patch_size[0]
    sizes = ((side, side), (2 * side, 2 * side), (side, 3 * side), (3 * side, side))
    return [adapter.layout(size) for size in sizes]


def _counts(compressor: Compressor, layouts: Sequence[TokenLayout]) -> bool:
    return all(compressor.count(layout) is not None for layout in layouts)
