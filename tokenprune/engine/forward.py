"""What is known of one forward of the language model while it is compressed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from tokenprune.compressor import Compressor, Selection
from tokenprune.cost.account import Picked
from tokenprune.cost.measuring import Work
from tokenprune.engine.cache import PrunedLayer
from tokenprune.engine.guard import bypassed
from tokenprune.engine.trace import SelectionRecord
from tokenprune.layout import TokenLayout, moved
from tokenprune.tokens import VisualTokens

__all__ = [
    "Pass",
    "Span",
]


@dataclass(eq=False)
class Span:
    """The visual tokens of one image that are still there.

    Attributes:
        first, last: Columns of the image's first and last token in the prompt.
        columns: (M,) columns of what is left, on the CPU.
        index: (M,) their indices in the image's full packed sequence, on the CPU.
        tokens: What is known of them.
        layout: Geometry of the full packed sequence, on the CPU.
        carrier: The encoder's own feature tensor, the same object for all beams and reruns.
        record: What the encoder told of it, the same object wherever the image is used.
        there: (N,) indices of the tokens that the attention mask does not hide.
        entered: (M,) indices of those that enter the language model.
        image: How many images and videos come before in the row.
        asks: Column of the token that asks for this image (`Pass.ask`).
        group: Which of `Pass.queries` has that column.
    """

    row: int
    first: int
    last: int
    columns: Tensor
    index: Tensor
    tokens: VisualTokens
    layout: TokenLayout
    carrier: Tensor
    there: Tensor
    entered: Tensor
    record: VisualTokens
    image: int = 0
    asks: int = -1
    group: int = 0

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was taken from or added to what the encoder told of the image."""
        return all(
            getattr(self.tokens, item.name) is getattr(self.record, item.name)
            for item in fields(VisualTokens)
            if item.name not in ("features", "layout")
        )


class Tapped(dict[int, tuple[Tensor, tuple[Tensor, Tensor]]]):
    """Layer to the input and rotary embedding of its attention module."""

    def __missing__(self, layer: int) -> NoReturn:
        raise bypassed(f"the attention of decoder layer {layer}")


@dataclass(eq=False)
class Pass:
    """One forward of the language model: B rows, S columns of the prompt in M slots.

    Attributes:
        columns: (B, M) column in each slot, -1 for padding; rising along a row once packed.
        positions: (B, M) position ids of the slots.
        hidden: (B, S) how many position ids in front of each column are spent on columns that the
            attention mask hides between two others, until a cut has freed them; None without any.
        scored: How many of the last columns are scored, as in teacher forcing or when draft tokens
            are verified: the prompt ends with the first of them.  1 where all is prompt.
        labels: (B, S) targets of the columns, -100 where there is none, or None.
        left: How many slots of each row are not padding.  This and what follows is what the host
            knows where there are images (`look`).
        text: For every row the columns of its text.
        ends: For every row the column of the last prompt token.
        answers: For every row the columns that have a label.
        queries: (B,) each, columns of the tokens that ask.  One tensor unless labels make the
            images of a row belong to several turns.
        ids: (B, S) input ids, where known.
        layers: The layers of the KV cache, or none without one.
        spans: The images.
        tally: For every row, the visual tokens each decoder layer processes.
        entered: (B,) tokens that the first decoder layer processes.
        spent: (B,) FLOPs of the signals of the vision tower, per row.
        most: (B,) bytes that choosing took at one moment, per row.
        picked: What selections took.
        selections: What was chosen, in the order made.
        ran: For every decoder layer that ran, (B, M) the columns it processed, or None before any
            was dropped.
        taps: Layers whose states this session wants, whatever others tapped.
        order: (B, M) slot in which each slot's content was before the latest packing.
        sizes: (B, M) how often attention counts each slot, or None for once.
        rotary: cos and sin behind the latest cut.
        inherited: How much further positions move back from each layer on, by earlier prefills.
        masks: Masks behind cuts, by the number of cuts in front.
        tapped: Input and rotary embedding of the attention modules whose rows are wanted.
        read: Layers whose rows were computed, and whether the keys had to be computed again.
        held: For every layer, (B,) entries that the KV cache held before; empty without any.
        asked: Of text that asked in a layer: row, layer, number of queries, and again the keys.
        projected: Layers as many of whose slots were made into keys ahead of the next one.
    """

    columns: Tensor
    positions: Tensor
    scored: int
    labels: Tensor | None
    ids: Tensor | None
    cache: Cache | None
    layers: list[PrunedLayer]
    spans: list[Span]
    tally: list[list[int]]
    spent: list[float]
    most: list[int]
    taps: set[int]
    width: int
    order: Tensor
    entered: Tensor
    left: list[int] = field(default_factory=list)
    text: list[Tensor] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    answers: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    hidden: Tensor | None = None
    selections: list[SelectionRecord] = field(default_factory=list)
    ran: list[Tensor | None] = field(default_factory=list)
    packed: bool = False
    cuts: int = 0
    sizes: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    inherited: list[Tensor | None] = field(default_factory=list)
    masks: dict[int, Any] = field(default_factory=dict)
    picked: list[Picked] = field(default_factory=list)
    tapped: Tapped = field(default_factory=Tapped)
    held: list[Tensor] = field(default_factory=list)
    read: list[tuple[int, bool]] = field(default_factory=list)
    asked: list[tuple[int, int, int, bool]] = field(default_factory=list)
    projected: list[int] = field(default_factory=list)

    @property
    def real(self) -> Tensor:
        """(B, M) which slots are not padding."""
        return self.columns >= 0

    @property
    def prompt_ids(self) -> Tensor | None:
        """(B, S) ids of prompts that `generate` may run again, longer, as there is no KV cache."""
        is_scored = self.labels is not None or self.scored > 1
        return None if self.cache is not None or is_scored else self.ids

    def asking(self, device: torch.device, group: int) -> tuple[Tensor, Tensor]:
        """(B,) slot of the token that asks, and (B, M) which slots it may look at."""
        columns, query = self.columns.to(device), moved(self.queries[group], device)
        visible = (columns >= 0) & (columns <= query[:, None])
        slot = torch.arange(columns.shape[1], device=device)
        return torch.where(visible, slot, 0).amax(1), visible

    def charge(
        self, span: Span, part: Compressor, tokens: VisualTokens, shown: int, chosen: Selection
    ) -> None:
        """Record one selection; ``shown`` bytes are held besides the strategy's own."""
        row = span.row
        visual = self.tally[row][-1]
        if not visual:  # nothing is counted yet in front of layer 0
            visual = sum(len(one.there) for one in self.spans if one.row == row)
        self.picked.append(
            Picked(
                row=row,
                work=Work.of(part, tokens, span.layout),
                shown=shown,
                tapped=tuple(sorted(self.taps.intersection(self.tapped))),
                visual=visual,
                merged=0 if chosen.features is None else len(chosen.keep),
            )
        )

    def look(self, placeholders: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Bring what is known of the prompts to the host.

        The one wait for the device that a forward with images takes, however many there are.

        Returns:
            (B, S) placeholders by modality, and (B, S) what the attention mask does not hide.
        """
        names = list(placeholders)
        bits = [self.real, *(placeholders[name].to(self.columns.device) for name in names)]
        if self.labels is not None:
            bits.append(self.labels.to(self.columns.device) != -100)
        real, *masks = torch.stack(bits).cpu()
        visual = dict(zip(names, masks, strict=False))
        text = real.clone()
        for mask in visual.values():
            text &= ~mask
        self.left = real.sum(1).tolist()
        self.text = [row.nonzero().squeeze(1) for row in text]
        if self.labels is not None:
            self.answers = [row.nonzero().squeeze(1) for row in masks[-1]]
        prompt = real[:, : self.width - self.scored + 1]
        inside = real.cumsum(1).bool() & real.flip(1).cumsum(1).flip(1).bool()
        if bool((inside & ~real).any()):
            self.hidden = self._spent_on_hidden()
        self.ends = [_last(row.nonzero(), -1) for row in prompt]
        return visual, real

    def _spent_on_hidden(self) -> Tensor:
        """(B, S) `hidden` of this prompt.

        The position ids of a plain forward count what the mask hides, those of `generate` do not.
        """
        column = torch.arange(self.width, device=self.columns.device)
        latest = torch.where(self.real, column, -1).cummax(1).values
        before = F.pad(latest[:, :-1], (1, 0), value=-1)  # the column before that is there
        step = self.positions - self.positions.gather(1, before.clamp(min=0)) - 1
        spent = torch.minimum(step, column - before - 1).clamp(min=0)
        return (spent * (self.real & (before >= 0))).cumsum(1)

    def ask(self) -> None:
        """Say of every image which token asks for it, and list these tokens in `queries`.

        It is the last text token behind the image in front of the first label behind the image,
        the end of that turn's question.  Where no label lies behind the image, or no text between,
        it is the last prompt token.
        """
        asked: list[list[int]] = [[] for _ in self.ends]
        for span in self.spans:
            mine, text = asked[span.row], self.text[span.row]
            last = end = self.ends[span.row]
            if self.answers:
                later = self.answers[span.row]
                end = _first(later[later > span.last], end + 1) - 1
            span.asks = _last(text[(text > span.last) & (text <= end)], last)
            if span.asks not in mine:
                mine.append(span.asks)
            span.group = mine.index(span.asks)
        groups = max(map(len, asked))
        columns = [
            [*mine, *[end] * (groups - len(mine))]
            for mine, end in zip(asked, self.ends, strict=True)
        ]
        self.queries = list(torch.tensor(columns, device="cpu").T)

    def slots(self, row: int, columns: Tensor) -> Tensor:
        """(M,) where these columns (M,) of a row lie now."""
        columns = moved(columns, self.columns.device)
        if not self.packed:
            return columns
        return torch.searchsorted(self.columns[row].contiguous(), columns)

    @property
    def is_whole(self) -> bool:
        """Whether no row has padding, nor the KV cache anything from before."""
        return bool(self.left) and len(set(self.left)) == 1 and not self.held

    def repack(self, states: Tensor) -> Tensor:
        """(B, M, ...) ``states`` in the order of the latest packing."""
        order = self.order.to(states.device)
        first = torch.arange(len(states), device=order.device)[:, None] * states.shape[1]
        # On the CPU `gather` would make a float32 copy of half-precision numbers.
        taken = states.flatten(0, 1).index_select(0, (first + order).flatten())
        return taken.reshape(*order.shape, -1)

    def text_slots(self, span: Span) -> Tensor:
        """(T,) slots of the prompt's text behind an image, up to the token that asks."""
        text = self.text[span.row]
        return self.slots(span.row, text[(text > span.last) & (text <= span.asks)])

    def spread(self, states: Tensor, columns: Tensor) -> Tensor:
        """(B, S, D) packed ``states`` (B, M, D) in the columns of the prompt.

        A dropped column shows what the last kept column before it shows, as its successor would be
        predicted from there.

        Args:
            columns: (B, M) the column in each slot when ``states`` were made.
        """
        every = torch.arange(self.width, device=columns.device)
        every = every.expand(len(columns), -1).contiguous()
        slot = torch.searchsorted(columns.contiguous(), every, right=True) - 1
        slot = slot.clamp(min=0).to(states.device)[..., None]
        return states.gather(1, slot.expand(-1, -1, states.shape[-1]))


def _first(places: Tensor, default: int) -> int:
    return int(places[0]) if len(places) else default


def _last(places: Tensor, default: int) -> int:
    return int(places[-1]) if len(places) else default
