"""The compressors of one `compress` context, by stage and decoder layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenprune.compressor import Compressor, Stage, placed
from tokenprune.cost.account import Account, Sizes
from tokenprune.encoder import encoder_part
from tokenprune.engine.decoder import queried_layers, tapped_layers
from tokenprune.errors import UserError
from tokenprune.signals import Signal

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter

__all__ = ["Plan", "check_rows"]


class Plan:
    """The parts of the compressors of one context, by stage and decoder layer.

    Attributes:
        adapter: The model.
        compressors: One for all rows of a batch, or one for each row.
        needs: For each compressor, the signals that the model computes for it.
        signals: The signals of all compressors.
        encoder: The part that acts inside the vision encoder, or None.
        before: For each compressor, the parts that select in front of the language model, in order.
        inside: Index of a decoder layer to the part that selects in front of it.
        drops: Whether any token may be dropped.
        taps: Decoder layers whose attention input is kept.
        sizes: Sizes of the model, for the cost accounts.
    """

    def __init__(
        self,
        adapter: Adapter,
        compressors: Sequence[Compressor | None],
        extra_signals: frozenset[Signal] = frozenset(),
    ) -> None:
        """Sort the parts of ``compressors``; the caller provides ``extra_signals``."""
        self.adapter, self.compressors = adapter, compressors
        self.needs = [
            one.needs - extra_signals if one else frozenset[Signal]() for one in compressors
        ]
        self.signals = frozenset[Signal]().union(*self.needs)
        self.encoder = encoder_part(compressors[0])
        depth = len(adapter.decoder_layers)
        self.before = [placed(one, depth)[0] for one in compressors]
        self.inside = placed(compressors[0], depth)[1]
        parts = [part for one in compressors if one is not None for part in one.parts()]
        self.drops = any(part.retention < 1 or part.separators != "all" for part in parts)
        self.taps = tapped_layers(self.signals, self.inside)
        self.queried = queried_layers(self.inside)
        self.sizes = Sizes.of(adapter)

    def keeps_positions(self, part: Compressor) -> bool:
        """Whether kept tokens keep the position ids of the full prompt.

        With multimodal positions they do by default, also in front of the language model: a token's
        row and column are its place in the image, which does not change when others are dropped.
        """
        places = self.sizes.facts.decoder.position_scheme == "multimodal-rotary"
        return part.keeps_positions or (places and part.position_ids == "auto")

    @property
    def selects(self) -> bool:
        """Whether any part selects in front of the language model or inside it."""
        return any(self.before) or bool(self.inside)

    def index(self, row: int, rows: int) -> int:
        """Index of the compressor of ``row`` in ``rows``; the beams of a prompt are adjacent."""
        return row * len(self.compressors) // rows

    def accounts(self, rows: int) -> list[Account]:
        """A new account for every row of a batch."""
        which = [self.index(row, rows) for row in range(rows)]
        return [
            Account(self.sizes, self.compressors[one], self.inside, self.needs[one])
            for one in which
        ]


def check_rows(plan: Plan) -> None:
    """Raise `UserError` unless the compressors can act in the rows of one batch."""
    parts = [part for one in plan.compressors if one is not None for part in one.parts()]
    for part in parts:
        if part.stage is not Stage.PRE_LLM:
            raise UserError(
                f"{part.label} does not act in front of the language model, so it cannot share a "
                "batch with other compressors; run it in a separate context."
            )
    if len({plan.keeps_positions(part) for part in parts}) > 1:
        raise UserError(
            "some of these compressors keep the positions of the full prompt and some do not; run "
            "them in separate contexts."
        )
