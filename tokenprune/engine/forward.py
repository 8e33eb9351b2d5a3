"""The state of one forward of the language model."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, fields
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from tokenprune.cost.account import Account, Attended, Images
from tokenprune.cost.ledger import Ledger
from tokenprune.engine.arguments import Kwargs
from tokenprune.engine.cache import CACHE, PrunedLayer, adopt, is_pruned
from tokenprune.engine.guard import bypassed
from tokenprune.engine.trace import Prefill, SelectionRecord
from tokenprune.layout import TokenLayout, moved
from tokenprune.tokens import VisualTokens

__all__ = [
    "Given",
    "Pass",
    "Prompts",
    "Span",
]


@dataclass(frozen=True, eq=False)
class Given:
    """Arguments of the caller in one forward of the model.

    Attributes:
        ids: (B, S) input ids, or None.
        labels: (B, S) targets of the columns, -100 for no target, or None.
        scored: Number of last columns that are scored, in teacher forcing or to verify draft
            tokens.  The prompt ends with the first of them.  1 if all columns are prompt.
        placeholders: Modality to (B, S) bool, the columns that stand for a visual token.
    """

    ids: Tensor | None = None
    labels: Tensor | None = None
    scored: int = 1
    placeholders: Mapping[str, Tensor] = field(default_factory=dict)

    def labels_of(self, width: int) -> Tensor | None:
        """(B, width) `labels`, padded if the caller passed those of the last columns only."""
        if self.labels is None or self.labels.shape[-1] >= width:
            return self.labels
        return F.pad(self.labels, (width - self.labels.shape[-1], 0), value=-100)


@dataclass(eq=False)
class Span:
    """The remaining visual tokens of one image.

    Attributes:
        row: Row of the batch.
        first, last: Columns of the image's first and last token in the prompt.
        columns: (M,) columns of the remaining tokens, on the CPU.
        index: (M,) their indices in the image's full packed sequence, on the CPU.
        tokens: Their layout, features and signals.
        layout: Geometry of the full packed sequence, on the CPU.
        carrier: The encoder's feature tensor, the same object for all beams and reruns.
        record: The encoder's record of the image, the same object for all its uses.
        placed: (N,) columns of the full packed sequence, on the CPU.
        runs: (N,) index of the run of neighbouring columns that each one belongs to.
        deep: (M,) rows of the remaining tokens in `Pass.levels`.
        there: (M,) indices of the tokens that the attention mask does not hide.
        entered: (M,) indices of the tokens that enter the language model.
        image: Number of images and videos in front of it in the row.
        asks: Column of the query token, whose attention ranks this image (`Pass.ask`).
        group: Index of the entry of `Pass.queries` with that column.
    """

    row: int
    first: int
    last: int
    columns: Tensor
    index: Tensor
    tokens: VisualTokens
    layout: TokenLayout
    carrier: Tensor
    placed: Tensor
    runs: Tensor
    deep: Tensor
    there: Tensor
    entered: Tensor
    record: VisualTokens
    image: int = 0
    asks: int = -1
    group: int = 0

    @property
    def is_untouched(self) -> bool:
        """Whether `tokens` are exactly those of the encoder's `record`."""
        return all(
            getattr(self.tokens, item.name) is getattr(self.record, item.name)
            for item in fields(VisualTokens)
            if item.name not in ("features", "layout", "levels")
        )


@dataclass(eq=False)
class Prompts:
    """Facts about the prompts of a forward with images, on the CPU, row by row (`Pass.look`).

    Attributes:
        left: Number of slots that are not padding.
        text: Columns of the text.
        ends: Column of the last prompt token.
        answers: Columns that have a label; empty without labels.
    """

    left: list[int] = field(default_factory=list)
    text: list[Tensor] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    answers: list[Tensor] = field(default_factory=list)


class Tapped(dict[int, tuple[Tensor, tuple[Tensor, Tensor]]]):
    """Layer to the input and rotary embedding of its attention module."""

    def __missing__(self, layer: int) -> NoReturn:
        raise bypassed(f"the attention of decoder layer {layer}")


class Projected(dict[int, Tensor]):
    """Layer to the queries (B, M, heads * head_dim) that it projected, not rotated."""

    def __missing__(self, layer: int) -> NoReturn:
        raise bypassed(f"the query projection of decoder layer {layer}")


@dataclass(eq=False)
class Pass:
    """One forward of the language model: B rows, S columns of the prompt in M slots.

    Attributes:
        given: Arguments of the caller.
        width: S.
        columns: (B, M) column in each slot, -1 for padding; ascending along a packed row.
        positions: (B, M) position ids of the slots, or (3, B, M) or (4, B, M) of a model with
            multimodal positions (`tokenprune.engine.numbering`).
        numbered: The same of all columns, in front of the first cut.
        closed: (B, 1) number of positions that ``compact`` has removed, on the CPU.
        order: (B, M) slot from which the latest packing moved each slot's content.
        packed: Whether any column was dropped.
        sizes: (B, M) how often attention counts each slot; None if it counts all of them once.
        hidden: (B, S) number of position ids, in front of each column, that belong to columns
            hidden by the attention mask between two others.  A cut that renumbers sets it to 0.
            None without such columns.

        prompts: Facts about the prompts, on the CPU.
        spans: The images.
        queries: Columns of the query tokens, (B,) each.  One tensor unless labels divide the images
            of a row into several turns.

        past: Number of tokens in the KV cache before this forward.
        continued: Whether the KV cache holds a compressed prompt.
        cache: The KV cache, if this forward changes it.
        layers: Its layers, or none.
        held: For every layer, (B,) entries of the KV cache before this forward; empty without any.
        inherited: For every layer, the amount that earlier prefills subtract from its position ids.

        levels: Features (V, D) that the model adds to the V visual tokens of the batch after each
            of its first decoder layers, or none.

        taps: Decoder layers whose attention input is kept.
        tapped: That input, and the rotary embedding.
        projected: Queries of the layers where many of them rank.
        cuts: Number of selections inside the language model that dropped tokens.
        rotary: cos and sin after the latest cut.
        masks: Masks after cuts, by the number of cuts.
        ran: For every decoder layer that ran, (B, M) columns that it processed; None before the
            first column was dropped.

        selections: The selections, in order.
        accounts: For every row its cost account, if the trace reports this forward.
        attended: Attention rows and keys that were computed for selections.
        entered: (B,) tokens that the first decoder layer processes.
    """

    given: Given
    width: int
    columns: Tensor
    positions: Tensor
    numbered: Tensor
    order: Tensor
    closed: Tensor
    past: int = 0
    continued: bool = False
    taps: Set[int] = frozenset()
    packed: bool = False
    sizes: Tensor | None = None
    hidden: Tensor | None = None
    prompts: Prompts = field(default_factory=Prompts)
    spans: list[Span] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    cache: Cache | None = None
    layers: list[PrunedLayer] = field(default_factory=list)
    held: list[Tensor] = field(default_factory=list)
    inherited: list[Tensor | None] = field(default_factory=list)
    levels: list[Tensor] = field(default_factory=list)
    tapped: Tapped = field(default_factory=Tapped)
    projected: Projected = field(default_factory=Projected)
    cuts: int = 0
    rotary: tuple[Tensor, Tensor] | None = None
    masks: dict[int, Any] = field(default_factory=dict)
    ran: list[Tensor | None] = field(default_factory=list)
    selections: list[SelectionRecord] = field(default_factory=list)
    accounts: list[Account] = field(default_factory=list)
    attended: list[Attended] = field(default_factory=list)
    entered: Tensor | None = None

    @classmethod
    def start(cls, given: Given, embeds: Tensor, kwargs: Kwargs, taps: Set[int]) -> Pass:
        """A forward that begins with ``embeds`` (B, S, D) and other arguments ``kwargs``."""
        (rows, width), device = embeds.shape[:2], embeds.device
        mask, cache = kwargs.get("attention_mask"), kwargs.get(CACHE)
        past = cache.get_seq_length() if cache is not None else 0
        column = torch.arange(width, device=device).expand(rows, -1)
        columns = column
        if isinstance(mask, Tensor) and mask.ndim == 2:
            columns = torch.where(mask[:, -width:].to(device).bool(), column, -1)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = column + past
        positions = positions.to(device)[..., -width:].expand(*positions.shape[:-2], rows, -1)
        return cls(
            given=given,
            width=width,
            columns=columns,
            positions=positions,
            numbered=positions,
            order=column,
            closed=torch.zeros(rows, 1, dtype=torch.long, device="cpu"),
            levels=[*(kwargs.get("deepstack_visual_embeds") or ())],
            past=past,
            continued=is_pruned(cache),
            taps=taps,
        )

    def join(self, cache: Cache, kwargs: Kwargs, depth: int) -> None:
        """Announce the new entries to ``cache``, and continue a compressed prompt if it holds one.

        Args:
            cache: The KV cache.
            kwargs: Arguments of the forward; mask and position ids of a compressed prompt change.
            depth: Number of decoder layers.
        """
        mask = kwargs.get("attention_mask")
        past = self.real.new_ones(len(self.columns), self.past)
        if mask is not None and not self.continued:
            past = mask[:, : self.past].to(past.device).bool()
        self.cache = cache
        self.layers = adopt(cache, past, depth)
        if self.past:
            self.held = [layer.valid[:, : layer.held].sum(1) for layer in self.layers]
        for layer in self.layers:
            layer.expect(self.real)
        if self.continued:
            first = self.layers[0]
            self.inherited = [layer.extra for layer in self.layers]
            self.positions = self.positions - first.shift.to(self.positions.device)
            self.numbered = self.positions
            kwargs.update(attention_mask=first.mask().long(), position_ids=self.positions)

    # -- slots and columns -----------------------------------------------------------------------

    @property
    def real(self) -> Tensor:
        """(B, M) bool, the slots that are not padding."""
        return self.columns >= 0

    @property
    def is_whole(self) -> bool:
        """Whether no row has padding and the KV cache was empty before."""
        left = self.prompts.left
        return bool(left) and len(set(left)) == 1 and not self.held

    def slots(self, row: int, columns: Tensor) -> Tensor:
        """(M,) current slots of ``columns`` (M,) of a row."""
        columns = moved(columns, self.columns.device)
        if not self.packed:
            return columns
        return torch.searchsorted(self.columns[row].contiguous(), columns)

    def text_slots(self, span: Span) -> Tensor:
        """(T,) slots of the prompt's text after an image, up to its query token."""
        text = self.prompts.text[span.row]
        return self.slots(span.row, text[(text > span.last) & (text <= span.asks)])

    def repack(self, states: Tensor) -> Tensor:
        """(B, M, ...) ``states`` in the order of the latest packing."""
        order = self.order.to(states.device)
        first = torch.arange(len(states), device=order.device)[:, None] * states.shape[1]
        # On the CPU `gather` would copy half-precision numbers to float32.
        taken = states.flatten(0, 1).index_select(0, (first + order).flatten())
        return taken.reshape(*order.shape, -1)

    def spread(self, states: Tensor, columns: Tensor) -> Tensor:
        """(B, S, D) packed ``states`` (B, M, D) in the columns of the prompt.

        A dropped column repeats the last kept column before it, from which the model predicts the
        token after the dropped one.

        Args:
            states: States of the slots.
            columns: (B, M) column in each slot at the time of ``states``.
        """
        every = torch.arange(self.width, device=columns.device)
        every = every.expand(len(columns), -1).contiguous()
        slot = torch.searchsorted(columns.contiguous(), every, right=True) - 1
        slot = slot.clamp(min=0).to(states.device)[..., None]
        return states.gather(1, slot.expand(-1, -1, states.shape[-1]))

    # -- prompts ---------------------------------------------------------------------------------

    @property
    def prompt_ids(self) -> Tensor | None:
        """(B, S) ids of prompts that `generate` may run again without a KV cache, else None."""
        is_scored = self.given.labels is not None or self.given.scored > 1
        return None if self.cache is not None or is_scored else self.given.ids

    def look(self) -> tuple[dict[str, Tensor], Tensor]:
        """Copy the facts about the prompts to the CPU (`prompts`).

        This takes the only synchronisation of a forward, for any number of images.

        Returns:
            (B, S) placeholders by modality, and (B, S) columns that the attention mask does not
            hide.
        """
        placeholders, labels = self.given.placeholders, self.given.labels_of(self.width)
        device = self.columns.device
        bits = [self.real, *(mask.to(device) for mask in placeholders.values())]
        if labels is not None:
            bits.append(labels.to(device) != -100)
        real, *masks = torch.stack(bits).cpu()
        visual = dict(zip(placeholders, masks, strict=False))
        text = real.clone()
        for mask in visual.values():
            text &= ~mask
        prompt = real[:, : self.width - self.given.scored + 1]
        inside = real.cumsum(1).bool() & real.flip(1).cumsum(1).flip(1).bool()
        if bool((inside & ~real).any()) and self.positions.ndim == 2:
            self.hidden = self.hidden_positions()
        self.prompts = Prompts(
            left=real.sum(1).tolist(),
            text=[row.nonzero().squeeze(1) for row in text],
            ends=[_last(row.nonzero(), -1) for row in prompt],
            answers=[] if labels is None else [row.nonzero().squeeze(1) for row in masks[-1]],
        )
        return visual, real

    def hidden_positions(self) -> Tensor:
        """(B, S) `hidden` of this prompt.

        Position ids count hidden columns in a plain forward, and do not in `generate`.
        Multimodal position ids never count them.
        """
        column = torch.arange(self.width, device=self.columns.device)
        latest = torch.where(self.real, column, -1).cummax(1).values
        before = F.pad(latest[:, :-1], (1, 0), value=-1)  # the column before that is not hidden
        step = self.positions - self.positions.gather(1, before.clamp(min=0)) - 1
        skipped = torch.minimum(step, column - before - 1).clamp(min=0)
        return (skipped * (self.real & (before >= 0))).cumsum(1)

    def ask(self) -> None:
        """Find the query token of each image, whose attention ranks it, and fill `queries`.

        It is the last text token between the image and the first label after it: the end of the
        question of that turn.  Without such a label or such text, it is the last prompt token.
        """
        prompts = self.prompts
        asked: list[list[int]] = [[] for _ in prompts.ends]
        for span in self.spans:
            mine, text = asked[span.row], prompts.text[span.row]
            last = end = prompts.ends[span.row]
            if prompts.answers:
                later = prompts.answers[span.row]
                end = _first(later[later > span.last], end + 1) - 1
            span.asks = _last(text[(text > span.last) & (text <= end)], last)
            if span.asks not in mine:
                mine.append(span.asks)
            span.group = mine.index(span.asks)
        groups = max(map(len, asked))
        columns = [
            [*mine, *[end] * (groups - len(mine))]
            for mine, end in zip(asked, prompts.ends, strict=True)
        ]
        self.queries = list(torch.tensor(columns, device="cpu").T)

    def asking(self, device: torch.device, group: int) -> tuple[Tensor, Tensor]:
        """(B,) slot of the query token, and (B, M) bool, the slots that it attends to."""
        columns, query = self.columns.to(device), moved(self.queries[group], device)
        visible = (columns >= 0) & (columns <= query[:, None])
        slot = torch.arange(columns.shape[1], device=device)
        return torch.where(visible, slot, 0).amax(1), visible

    # -- cost accounts ---------------------------------------------------------------------------

    def by_row(self) -> list[list[Span]]:
        """The images of every row."""
        rows: list[list[Span]] = [[] for _ in self.columns]
        for span in self.spans:
            rows[span.row].append(span)
        return rows

    def enter_encoding(self, size: int) -> None:
        """Enter the run of the vision encoder, at ``size`` bytes a number."""
        for account, spans in zip(self.accounts, self.by_row(), strict=True):
            account.encode([(one.layout, one.tokens.encoding) for one in spans], size)

    def enter_count(self, layer: int) -> None:
        """Enter the number of visual tokens that the decoder layers from ``layer`` on process."""
        for account, spans in zip(self.accounts, self.by_row(), strict=True):
            account.count(layer, sum(len(span.columns) for span in spans))

    def begin_selections(self) -> None:
        """Enter the tokens in front of the selections of one stage or cut."""
        for account, spans in zip(self.accounts, self.by_row(), strict=True):
            account.begin([span.tokens for span in spans])

    def prefill(self, size: int) -> Prefill:
        """The report on this forward, whose KV cache has ``size`` bytes a number.

        Ledgers are computed when they are read, so that the forward needs no synchronisation for
        them.  The report holds counts and indices only, so that a trace does not keep features or a
        KV cache alive.
        """
        images = [
            [(one.layout, one.there, one.entered, one.index) for one in spans]
            for spans in self.by_row()
        ]
        accounts, entered = self.accounts, self.entered
        attended, held = self.attended, self.held

        def ledgers() -> list[Ledger]:
            made = []
            totals = [] if entered is None else entered.tolist()
            for row, (account, total) in enumerate(zip(accounts, totals, strict=True)):
                mine = images[row]
                layouts = Images(
                    before=[layout.take(index) for layout, index, _, _ in mine],
                    entered=[layout.take(index) for layout, _, index, _ in mine],
                    after=[layout.take(index) for layout, _, _, index in mine],
                )
                made.append(
                    account.ledger(
                        layouts,
                        [one for one in attended if mine and one.row in (None, row)],
                        text=total - account.visual[0],
                        size=size,
                        kv_before=[int(layer[row]) for layer in held],
                    )
                )
            return made

        return Prefill(self.selections, bool(self.spans), ledgers)


def _first(places: Tensor, default: int) -> int:
    return int(places[0]) if len(places) else default


def _last(places: Tensor, default: int) -> int:
    return int(places[-1]) if len(places) else default
