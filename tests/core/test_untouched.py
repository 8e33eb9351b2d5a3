"""A method that writes to its input, keeps too much, or ranks by NaN is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import tokenprune as tp
from tokenprune.allocators import Proportional, ThumbnailCommand
from tokenprune.compressor import Compressor, ScoringCompressor, Selection
from tokenprune.encoder import EncoderCompressor, EncoderTokens, Reduction
from tokenprune.errors import ContractError
from tokenprune.layout import Kind, TokenLayout
from tokenprune.signals import Signal
from tokenprune.synthetic import sample_tokens
from tokenprune.testing.host import Host
from tokenprune.tokens import VisualTokens
from tokenprune.untouched import digest, shown

KEYS = Signal("keys")
LAYOUT = TokenLayout.anyres((2, 2), (4, 4), (1, 7, 0, 8))
Act = Callable[[VisualTokens], object]


@dataclass(frozen=True, kw_only=True)
class Acting(Compressor):
    """Changes its input in a given way and keeps the first token."""

    act: Act

    @property
    def needs(self) -> frozenset[Signal]:
        return frozenset({KEYS})

    def select(self, tokens: VisualTokens) -> Selection:
        self.act(tokens)
        return Selection(tokens.layout.host.patches[:1])


def out_of(tokens: VisualTokens) -> Tensor:
    return torch.nn.functional.normalize(tokens.features, out=tokens.features)


WRITES: dict[str, Act] = {
    "features": lambda t: t.features.div_(2),
    "a view of features": lambda t: t.features[3].zero_(),
    "features by index": lambda t: t.features.index_fill_(0, torch.tensor([1]), 0),
    "features as output": out_of,
    "detached features": lambda t: t.features.detach().mul_(2),
    "a signal": lambda t: t[KEYS].nan_to_num_(),
    "another signal in its place": lambda t: t.signals.update({KEYS: t[KEYS] * 2}),  # type: ignore[attr-defined]
    "one more signal": lambda t: t.signals.update({Signal("keys", 0): t[KEYS]}),  # type: ignore[attr-defined]
    "other features in their place": lambda t: object.__setattr__(t, "features", t.features * 2),
    "text": lambda t: t.inputs and t.inputs[1].mul_(2),
    "the layout": lambda t: t.layout.canvas_row.add_(1),
    "what the layout works out": lambda t: t.layout.patches.add_(1),
    "places of the layout": lambda t: t.layout.places[Kind.CROP].add_(1),
    "the fingerprint": lambda t: t.fingerprint.zero_(),  # type: ignore[union-attr]
}


@pytest.mark.parametrize("what", WRITES)
def test_writing_to_the_input_is_refused(what: str) -> None:
    tokens = sample_tokens(frozenset({KEYS}), LAYOUT)
    with pytest.raises(ContractError, match=r"^Acting wrote to .*which other methods"):
        Acting(retention=0.5, act=WRITES[what])(tokens)


def test_inside_inference_mode_numbers_are_compared() -> None:
    with torch.inference_mode():
        tokens = sample_tokens(frozenset({KEYS}), LAYOUT)
        assert tokens.features.is_inference()
        Acting(retention=0.5, act=lambda t: t.features * 2)(tokens)
        with pytest.raises(ContractError, match="wrote to features"):
            Acting(retention=0.5, act=lambda t: t.features.mul_(2))(tokens)


def test_reading_the_input_is_allowed() -> None:
    """Also where it is the first to ask a layout for something, and where a layout was copied."""

    def reads(tokens: VisualTokens) -> None:
        assert tokens.layout.modality == "image"
        tokens.features.clone().mul_(2)
        tokens.layout.patches + 1
        copy.deepcopy(tokens.layout).canvas_row.add_(1)
        replace(tokens, features=tokens.features * 2)

    tokens = sample_tokens(frozenset({KEYS}), LAYOUT)
    before = {name: value.clone() for name, value in shown(tokens).items()}
    assert Acting(retention=0.5, act=reads)(tokens).keep[0] == 0
    for name, value in before.items():
        assert torch.equal(shown(tokens)[name].nan_to_num(), value.nan_to_num()), name


NUMBERS = {
    "float32": torch.randn(6, 8),
    "bfloat16, rows of no whole word": torch.randn(6, 3).bfloat16(),
    "a vector": torch.randn(6),
    "three axes": torch.randn(6, 2, 4),
    "int64": torch.randint(0, 9, (6, 5)),
    "turned": torch.randn(8, 6).T,
    "bool": torch.tensor([[True, False]] * 6),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_digest_changes_with_any_number(kind: str) -> None:
    values = NUMBERS[kind]
    before = digest(values)
    assert before.shape == (6,)
    assert torch.equal(digest(values.clone()), before)
    flat = values.clone()
    flat[4] = ~flat[4] if values.dtype == torch.bool else -flat[4] - 1
    assert (digest(flat) != before).nonzero().squeeze(1).tolist() == [4]
    negated = values.clone()
    negated = ~negated if values.dtype == torch.bool else -negated - 1
    assert not torch.equal(digest(negated), before)


@dataclass(frozen=True, kw_only=True)
class First(Compressor):
    """Keeps the first ``count`` patch tokens."""

    count: int

    def select(self, tokens: VisualTokens) -> Selection:
        return Selection(tokens.layout.patches[: self.count])


@pytest.mark.parametrize(
    "layout", [LAYOUT, TokenLayout.single((4, 5)), TokenLayout.video(3, (2, 3))]
)
def test_a_selection_over_budget_is_refused(layout: TokenLayout) -> None:
    """By hand: R * P, rounded up once for every view."""
    tokens = sample_tokens(frozenset(), layout)
    views = sum(size > 0 for size in layout.view_sizes)
    due = 0.3 * len(layout.patches)
    most = -(-due // 1) if views == 1 else due // 1 + views
    assert len(First(retention=0.3, count=int(most))(tokens).keep) >= most
    with pytest.raises(ContractError, match=r"First keeps \d+ of \d+ patch tokens, at most"):
        First(retention=0.3, count=int(most) + 1)(tokens)


class Declared(First):
    """States the limit of all tokens."""

    def limit(self, tokens: VisualTokens) -> int:
        return len(tokens)


def test_a_stated_limit_may_exceed_the_budget() -> None:
    tokens = sample_tokens(frozenset(), LAYOUT)
    assert len(Declared(retention=0.1, count=30)(tokens).keep) >= 30


def test_crops_of_unlike_size_may_share_unevenly_but_not_without_end() -> None:
    """Thumbnail 16, crops of 8, 8, 4 and 4 at R = 0.5: at most 20 + 0.5 * (8 - 6) + 5 roundings."""
    layout = TokenLayout.anyres((2, 2), (4, 4), (2, 7, 0, 8))
    assert sorted(layout.view_sizes) == [8, 8, 12, 12, 16]
    assert Proportional().limit(layout, 0.5) == 28 + 5
    assert ThumbnailCommand().limit(layout, 0.5) == 28 + 5 + 1  # half of 12 - 10


@dataclass(frozen=True, kw_only=True)
class Scored(ScoringCompressor):
    """Gives one token a given score, all others 1."""

    value: str  # a field that is a number may not be NaN
    at: int = 5  # type: ignore[assignment]

    def score(self, tokens: VisualTokens) -> Tensor:
        scores = torch.ones(len(tokens))
        scores[self.at] = float(self.value)
        return scores


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("allocator", ["proportional", "topk"])
def test_scores_that_are_not_finite_are_refused(value: str, allocator: str) -> None:
    tokens = sample_tokens(frozenset(), LAYOUT)
    with pytest.raises(ContractError, match=r"Scored ranks by scores of which 1 of \d+ are NaN or"):
        Scored(retention=0.5, value=value, allocator=allocator)(tokens)  # type: ignore[arg-type]


def test_scores_at_separators_have_no_meaning() -> None:
    tokens = sample_tokens(frozenset(), LAYOUT)
    nowhere = int(LAYOUT.separators[0])
    assert len(Scored(retention=0.5, value="nan", at=nowhere)(tokens).keep)


@dataclass(frozen=True, kw_only=True)
class TowerWriter(EncoderCompressor):
    """Writes to one of the tensors of the vision encoder."""

    what: str

    def reduce(self, tokens: EncoderTokens) -> Reduction | None:
        getattr(tokens, self.what).mul_(2)
        return None


@pytest.mark.parametrize("what", ["states", "keys", "size"])
def test_writing_inside_the_vision_encoder_is_refused(what: str) -> None:
    host = Host.tiny("LLaVA-NeXT")
    with (
        pytest.raises(ContractError, match=f"TowerWriter wrote to {what}"),
        tp.compress(host.model, TowerWriter(retention=0.5, what=what)),
    ):
        host.logits(host.inputs([0]))


def test_the_message_names_the_image() -> None:
    host = Host.tiny("LLaVA-NeXT")

    def only_the_second(tokens: VisualTokens) -> None:
        if seen and tokens.features is not seen[0]:
            tokens.features.zero_()
        seen.append(tokens.features)

    seen: list[Tensor] = []
    method = Acting(retention=0.5, act=only_the_second)
    with (
        pytest.raises(ContractError, match=r"image 1 of prompt 0, both counted from 0"),
        tp.compress(host.model, method),
    ):
        host.logits(host.inputs([2]))
