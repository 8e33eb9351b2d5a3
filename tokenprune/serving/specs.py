"""Which methods can be served, and how a server's configuration names one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenprune.compatibility import check_compatible
from tokenprune.compressor import Compressor, Stage
from tokenprune.errors import UserError, shown
from tokenprune.grammar import LONGEST, parts
from tokenprune.registry import strategies
from tokenprune.spec import create, parse

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter

__all__ = ["check_served", "refused", "served"]


def served(spec: str, **fields: Any) -> Compressor:
    """The compressor that a server's configuration names.

    A server calls it once, when it starts, and never with text from a request.  The text names
    registered methods only (`tokenprune.grammar`).  Nothing is imported because of it.

    Args:
        spec: A spec with its retention, such as ``fastervlm@0.25``.
        **fields: Options and retention of a single method, as in `tokenprune.spec.parse`.

    Raises:
        UserError: As `parse`; the text is a class of a module; or the method cannot be served
            (`check_served`).
    """
    if not isinstance(spec, str):
        raise UserError(f"a spec is a text such as 'fastervlm@0.25', got {shown(spec):.60}.")
    for piece in parts(spec[:LONGEST]):
        _refuse_class(piece)
    compressor = parse(spec, **fields)
    _check_parts(compressor)
    return compressor


def check_served(adapter: Adapter, compressor: Compressor) -> None:
    """Raise `UserError` unless the model can be served under ``compressor``.

    A server receives features and numbers them one after another.  So the method must act in front
    of the language model, without its signals, and the position ids must be those of a shorter
    prompt.

    Args:
        adapter: The model.
        compressor: The method.
    """
    _check_parts(compressor)
    facts = adapter.facts
    if facts.decoder.position_scheme == "multimodal-rotary":
        raise UserError(
            f"{facts.family} models keep the row and column of every token in its position ids, "
            "which a server derives from the size of the whole image; serve a model with plain "
            "position ids, such as LLaVA-OneVision, or run this one with tokenprune.compress."
        )
    check_compatible(facts, compressor)


def _refuse_class(piece: str) -> None:
    """Raise `UserError` if a part of a spec is ``module:Class``."""
    head = piece.partition("@")[0]
    name, colon, written = head.partition(":")
    if colon and "=" not in written.split(",")[0] and name.strip() not in strategies.names():
        raise UserError(
            f"{head!r} names a class of a module, which a server does not import; install the "
            "method as a package with the entry point tokenprune.strategies, and give its "
            "registered name."
        )


def _check_parts(compressor: Compressor) -> None:
    """Raise `UserError` unless every part of ``compressor`` can be served."""
    for part in compressor.parts():
        reason = refused(part)
        if reason:
            works = [name for name in strategies.names() if not refused(create(name, retention=1))]
            raise UserError(f"{part.label} {reason}. Methods that can: {', '.join(works)}.")


def refused(part: Compressor) -> str:
    """The reason why ``part`` cannot be served; empty if it can."""
    if part.stage is Stage.LLM:
        return (
            "drops tokens between decoder layers, whose KV cache the server manages, so it cannot "
            "be served"
        )
    asking = [one.name for one in part.needs if one.in_llm or one.info.found_in == "text"]
    if asking:
        return (
            f"needs signals of the prompt ({', '.join(sorted(asking))}), but a server stores the "
            "features of an image for any prompt, so it cannot be served"
        )
    if part.keeps_positions:
        return (
            "keeps the position ids of the full prompt, but a server numbers the tokens one after "
            "another, so it cannot be served; leave out position_ids=original"
        )
    return ""
