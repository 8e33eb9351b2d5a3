"""Questions and token dropping in training."""

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tokenprune.experiments.training.geometry import THINGS, Geometry
from tokenprune.experiments.training.model import PER_VIEW, SIDE, WIDTH, build_processor
from tokenprune.experiments.training.optim import Meter
from tokenprune.models.testbed import scenes
from tokenprune.models.testbed.scenes import KINDS, Scene


@dataclass(frozen=True)
class Dropout:
    """How visual tokens are dropped in training.

    Attributes:
        shares: Probability of each scheme of `SCHEMES`.
        retentions: Ranges of the retention ratio of random tokens and blocks; one of them is
            drawn, then a ratio in it.
    """

    shares: tuple[float, ...]
    retentions: tuple[tuple[float, float], ...]


SCHEMES = ("none", "random", "thumbnail", "crops", "views", "blocks", "content")

# The model first learns to look up answers that are visible, later to answer with fewer tokens.
GENTLE = Dropout((0.40, 0.15, 0.15, 0.05, 0.05, 0.05, 0.15), ((0.5, 0.9),))


HARSH = Dropout((0.25, 0.15, 0.07, 0.07, 0.06, 0.10, 0.30), ((0.05, 0.3), (0.05, 0.9)))


@dataclass(frozen=True)
class Kept:
    """The kept visual tokens of a batch.

    Attributes:
        index: (b, K) sorted indices into the packed sequence, then zeros.
        valid: (b, K) bool, whether an index counts.
        intact: Whether nothing was dropped.
    """

    index: Tensor
    valid: Tensor
    intact: bool

    @classmethod
    def of(cls, mask: NDArray[np.bool_]) -> "Kept":
        """From a mask (b, N) of the kept tokens."""
        order = np.argsort(~mask, axis=1, kind="stable")[:, : int(mask.sum(1).max())]
        valid = np.take_along_axis(mask, order, axis=1)
        index = np.where(valid, order, 0)
        return cls(torch.from_numpy(index), torch.from_numpy(valid), bool(mask.all()))

    def to(self, device: torch.device) -> "Kept":
        return Kept(self.index.to(device), self.valid.to(device), self.intact)


def drop_tokens(geo: Geometry, shown: Tensor, rng: np.random.Generator, dropout: Dropout) -> Kept:
    """Draw which visual tokens are kept.  The batch shares one scheme, each scene draws its own.

    With the scheme ``content``, the kept share of the tokens that show an object, a sign or a
    digit, and the kept share of the others, are drawn independently of each other and of the
    number of objects: from the true scene, not by any method's score.  Separators are kept, as in
    the official code of most methods, or dropped (20 %).

    Args:
        geo: Geometry of the scenes.
        shown: (b, N) bool, whether a token shows something.
        rng: Source of all randomness.
        dropout: Probabilities of the schemes.
    """
    order = geo.order.numpy()
    patch, view = order >= 0, order // PER_VIEW
    scheme = SCHEMES[rng.choice(len(SCHEMES), p=dropout.shares)]
    b = len(shown)
    noise = rng.random((b, len(order)))
    low, high = dropout.retentions[rng.integers(len(dropout.retentions))]
    ratio = rng.uniform(low, high, size=(b, 1))
    keep = np.ones_like(noise, dtype=bool)
    if scheme == "random":
        keep = noise < ratio
    elif scheme == "thumbnail":
        keep &= view == 0
    elif scheme == "crops":
        keep &= view != 0
    elif scheme == "views":
        chosen = rng.permutation(geo.views)[: rng.integers(1, geo.views + 1)]
        keep &= np.isin(view, chosen)
    elif scheme == "blocks":
        side = int(rng.integers(2, 5))
        place = order % PER_VIEW
        blocks = SIDE // side + 1
        cell = view * blocks**2 + place // SIDE // side * blocks + place % SIDE // side
        keep = rng.random((b, geo.views * blocks**2))[:, np.maximum(cell, 0)] < ratio
    elif scheme == "content":
        front = np.where(rng.random((b, 1)) < 0.4, 1.0, rng.random((b, 1)))
        back = rng.random((b, 1)) * np.where(rng.random((b, 1)) < 0.6, 0.3, 1.0)
        keep = noise < np.where(shown.numpy(), front, back)
    fewest = np.where(patch, noise, 2).argsort(axis=1)[:, :4]
    np.put_along_axis(keep, fewest, True, axis=1)
    if scheme == "none" or rng.random() < 0.8:
        keep |= ~patch
    else:
        keep &= patch
    return Kept.of(keep)


def visible(geo: Geometry, patches: Tensor) -> Tensor:
    """(b, N) bool: whether a packed token shows an object, a sign or a digit.

    `patches` are the true labels (b, v, 144, skills).
    """
    shown = (patches[..., 0] > 0) | (patches[..., 2] > 0)
    return F.pad(shown.flatten(1), (0, 1))[:, geo.order]


def openers(geo: Geometry, patches: Tensor, kept: Kept) -> Tensor:
    """(b, K) bool: whether a kept token is the first of its object.

    There are as many as objects are left, however many tokens show each of them.

    Args:
        geo: Geometry of the scenes.
        patches: (b, v, 144, skills) true labels.
        kept: The kept visual tokens.
    """
    shape, colour = patches[..., 0], patches[..., 1]
    thing = (shape - 1) % len(THINGS)
    named = (shape > 0) & (thing < len(scenes.SHAPES))  # no sign
    name = torch.where(named, thing * len(scenes.COLOURS) + colour, -1)
    packed = F.pad(name.flatten(1), (0, 1), value=-1)[:, geo.order]
    left = packed.gather(1, kept.index).where(kept.valid, torch.tensor(-1))
    is_one = left[:, None] == torch.arange(len(NAMES))[:, None]  # (b, names, K)
    return (is_one & (is_one.cumsum(2) == 1)).any(1)


def brief(shown: Tensor, rng: np.random.Generator) -> Kept:
    """The tokens that show something, and one in ten of the others.

    Looking up is learnt from short sequences first.
    """
    return Kept.of(shown.numpy() | (rng.random(shown.shape) < 0.1))


@dataclass(frozen=True)
class Quiz:
    """Questions about a batch of scenes.

    Attributes:
        ids: (b, Q, L) tokens of question, cue, answer, eos and padding.
        target: (b, Q, L) the next token where it is learnt, else -100.
        kind: (b, Q) index into `KINDS`.
        noun: (b, Q) index of the word that names a shape or the sign, -1 without one.
        facts: (b, Q, facts) classes of `FACTS` about what is named; -100 where undefined.
    """

    ids: Tensor
    target: Tensor
    kind: Tensor
    noun: Tensor
    facts: Tensor

    def to(self, device: torch.device) -> "Quiz":
        return Quiz(*(getattr(self, field.name).to(device) for field in fields(self)))


# Number of questions of each kind that are packed after one scene.
PORTIONS = {
    "existence": 2,
    "colour": 1,
    "count": 1,
    "position": 2,
    "digit": 2,
    "compare": 2,
    "relation": 3,
    "number": 1,
}


# Of each scene in a step that is about counting and reading a number.
DRILL = {"count": 1, "number": 1}


def make_quiz(
    batch: list[Scene],
    rng: np.random.Generator,
    device: torch.device,
    portions: dict[str, int] = PORTIONS,
) -> Quiz:
    """Random questions about scenes, with the same number of each kind for every scene."""
    kinds = [kind for kind, number in portions.items() for _ in range(number)]
    asked = [[scenes.ask(scene, kind, rng) for kind in kinds] for scene in batch]
    facts = [[look(s, q) for q, _ in some] for s, some in zip(batch, asked, strict=True)]
    index = [KINDS.index(kind) for kind in kinds]
    return to_quiz(asked, index, facts, build_processor().tokenizer).to(device)


def to_quiz(
    asked: list[list[tuple[str, str]]],
    kinds: list[int],
    facts: list[list[tuple[int, ...]]],
    tokenizer: PreTrainedTokenizerFast,
) -> Quiz:
    """Questions and answers as tensors.

    Args:
        asked: (b, Q) question and answer.
        kinds: (Q,) index of each question's kind.
        facts: (b, Q) of `Quiz.facts`.
        tokenizer: Of the model.
    """
    texts = [f"{question}<assistant>{answer}</s>" for some in asked for question, answer in some]
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids, length = encoded["input_ids"], encoded["attention_mask"].sum(1)
    at = torch.arange(ids.shape[1])
    # Both the answer, of one or more words, and the closing token are learnt.
    cue = (ids == tokenizer.convert_tokens_to_ids("<assistant>")).int().argmax(1)
    learnt = (at >= cue[:, None]) & (at < length[:, None] - 1)
    target = torch.where(learnt, ids.roll(-1, dims=1), -100)
    nouns = torch.tensor(tokenizer.convert_tokens_to_ids(list(THINGS)))
    named = torch.isin(ids, nouns)
    noun = torch.where(named.any(1), named.int().argmax(1), -1)
    kind = torch.tensor(kinds).repeat(len(asked))
    parts = (ids, target, kind, noun, torch.tensor(facts).flatten(0, 1))
    return Quiz(*(part.unflatten(0, (len(asked), -1)) for part in parts))


NAMES = tuple(f"{colour} {shape}" for colour in scenes.COLOURS for shape in scenes.SHAPES)
# Classes of each fact: about an object, about a sign, and which neighbour a question asks for.
FACTS = {
    "present": 2,
    "right": 2,
    "bottom": 2,
    "its digit": 10,
    **dict.fromkeys(scenes.DIRECTIONS, len(NAMES)),
    **dict.fromkeys(("first of sign", "second of sign"), 10),
    "asked": len(NAMES),
}
UNKNOWN = -100  # of a fact that is undefined


def look(scene: Scene, question: str) -> tuple[int, ...]:
    """`Quiz.facts` of one question, about the object that it names first or about the sign."""
    facts = dict.fromkeys(FACTS, UNKNOWN)
    named = [item for item in scene.items if item.name in question]
    if named:
        item = min(named, key=lambda item: question.index(item.name))
        height, width = scene.size
        beside = {way: other.name for one, way, other in scenes.relations(scene) if one is item}
        facts |= {way: NAMES.index(name) for way, name in beside.items()}
        asked = [facts[way] for way in scenes.DIRECTIONS if f" {way} " in question]
        facts |= {
            "present": 1,
            "right": int(item.x > width / 2),
            "bottom": int(item.y > height / 2),
            "its digit": item.digit,
            "asked": asked[0] if asked else UNKNOWN,
        }
    elif "sign" in question and scene.sign is not None:
        first, second = scene.sign.digits
        facts |= {"first of sign": first, "second of sign": second}
    else:
        facts["present"] = 0
    return tuple(facts.values())


def block_mask(prefix: int, blocks: int, length: int, device: torch.device) -> Tensor:
    """(1, 1, S, S) bool: causal; a question attends to the prefix and to itself only."""
    block = torch.cat(
        [torch.full((prefix,), -1), torch.arange(blocks).repeat_interleave(length)]
    ).to(device)
    causal = torch.ones(len(block), len(block), dtype=torch.bool, device=device).tril()
    return (causal & ((block == block[:, None]) | (block == -1)))[None, None]


def answer_logits(
    model: PreTrainedModel,
    visual: Tensor,
    kept: Kept,
    quiz: Quiz,
    *,
    compact: bool,
    early: list[Tensor] | None = None,
) -> Tensor:
    """Logits (b, Q, L, vocabulary) of questions that share their scene's visual tokens.

    Args:
        visual: (b, N, d) packed sequence.
        kept: The kept visual tokens.
        quiz: Questions about the scenes.
        compact: Whether kept tokens are renumbered without gaps or keep their position ids.
        early: Receives the states (b, Q, L, d) of the questions after the layers `EARLY`, and
            those of the embeddings in front of them, (b, P, d), after layer `MARKED`.
    """
    b, questions, length = quiz.ids.shape
    device = visual.device
    head = build_processor().tokenizer("<s><user>", return_tensors="pt").input_ids.to(device)
    chosen = visual.gather(1, repeat(kept.index, "b k -> b k d", d=visual.shape[-1]))

    start = head.shape[1]
    if compact:
        seen, after = kept.valid.cumsum(1) - 1, start + kept.valid.sum(1, keepdim=True)
    else:
        seen, after = kept.index, torch.full((b, 1), start + visual.shape[1], device=device)
    positions = torch.cat(
        [
            torch.arange(start, device=device).expand(b, -1),
            start + seen.clamp(min=0),
            after + torch.arange(length, device=device).repeat(questions),
        ],
        dim=1,
    )
    opening = model.model.language_model.embed_tokens(head).expand(b, -1, -1)
    valid = F.pad(kept.valid, (start, 0), value=True)
    sequence = torch.cat([opening, chosen], dim=1)
    return packed_logits(model, sequence, valid, quiz, positions, early)


def packed_logits(
    model: PreTrainedModel,
    start: Tensor,
    valid: Tensor,
    quiz: Quiz,
    positions: Tensor,
    early: list[Tensor] | None = None,
) -> Tensor:
    """Logits (b, Q, L, vocabulary) of questions that follow the same embeddings.

    Args:
        start: (b, P, d) embeddings in front of the questions.
        valid: (b, P) bool, whether an embedding is seen.
        quiz: The questions; each attends to `start` and to itself.
        positions: (b, S) or (3, b, S) position ids of `start` and of all questions.
        early: Receives the states (b, Q, L, d) of the questions after the layers `EARLY`, and
            those of the embeddings in front of them, (b, P, d), after layer `MARKED`.
    """
    _, questions, length = quiz.ids.shape
    prefix, device = start.shape[1], start.device
    text = model.model.language_model.embed_tokens(rearrange(quiz.ids, "b q l -> b (q l)"))
    inputs = torch.cat([start, text], dim=1)
    seen = F.pad(valid, (0, questions * length), value=True)[:, None, None]
    out = model.model.language_model(
        inputs_embeds=inputs,
        attention_mask=block_mask(prefix, questions, length, device) & seen,
        position_ids=positions,
        use_cache=False,
        output_hidden_states=early is not None,
    )

    def group(hidden: Tensor) -> Tensor:
        return rearrange(hidden[:, prefix:], "b (q l) d -> b q l d", q=questions)

    if early is not None:
        early += [group(out.hidden_states[layer]) for layer in EARLY]
        early.append(out.hidden_states[MARKED][:, :prefix])
    logits: Tensor = model.lm_head(group(out.last_hidden_state))
    return logits


EARLY = (4, 5)
"""Layers after which the states tell facts: what an object is like, then what is asked of it."""


MARKED = 3
"""The layer after which the states of visual tokens tell `openers`."""


def build_fact_head() -> nn.ModuleList:
    """Heads that map the states (..., d) after the layers `EARLY` to the logits of facts."""
    *facts, asked = FACTS.values()
    return nn.ModuleList(
        nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, classes))
        for classes in (sum(facts), asked)
    )


def fact_loss(early: list[Tensor], heads: nn.Module, quiz: Quiz, meter: Meter) -> Tensor:
    """Cross-entropy of the facts that `heads` tell at the word that names an object's shape."""
    named = quiz.noun >= 0
    at = repeat(quiz.noun.clamp(min=0), "b q -> b q 1 d", d=early[0].shape[-1])
    first, last = (
        head(states.gather(2, at)[:, :, 0][named])
        for head, states in zip(heads.children(), early, strict=False)
    )
    *facts, _ = FACTS.values()
    loss: Tensor = first.new_zeros(())
    guesses = (*first.split(facts, dim=-1), last)
    for name, guess, truth in zip(FACTS, guesses, quiz.facts[named].T, strict=True):
        if (truth >= 0).any():
            loss = loss + F.cross_entropy(guess, truth)
        meter.add(name, (guess.argmax(-1) == truth)[truth >= 0])
    return loss


def build_marker() -> nn.Module:
    """A head that maps states (..., d) to the logit of being one of the `openers`."""
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1))


def marker_loss(
    early: list[Tensor], marker: nn.Module, first: Tensor, valid: Tensor, meter: Meter
) -> Tensor:
    """Cross-entropy of the `openers` ``first`` (b, K) among the ``valid`` (b, K) visual tokens.

    Objects that are marked once can be counted, whatever share of the tokens shows them.
    """
    logits = marker(early[-1][:, -first.shape[1] :])[..., 0]
    losses = F.binary_cross_entropy_with_logits(logits, first.float(), reduction="none")
    meter.add("opener", logits[first & valid] > 0)
    meter.add("no opener", logits[~first & valid] <= 0)
    # Per opener, so that one wrong mark among hundreds of tokens weighs as much as a missing one.
    return losses[valid].sum() / (first & valid).sum().clamp(min=1)


def quiz_loss(
    logits: Tensor, quiz: Quiz, meter: Meter, *, intact: bool, weights: dict[str, float]
) -> Tensor:
    """Weighted cross-entropy of answers; the meter gets the accuracies of intact inputs.

    `weights` maps the kinds, in the order of `Quiz.kind`, to their weights.
    """
    losses = F.cross_entropy(logits.flatten(0, 2), quiz.target.flatten(), reduction="none")
    losses = losses.view_as(quiz.target).sum(-1)
    weight = losses.new_tensor(list(weights.values()))[quiz.kind]
    if intact:
        right = ((logits.argmax(-1) == quiz.target) | (quiz.target < 0)).all(-1)
        for index, kind in enumerate(weights):
            meter.add(kind, right[quiz.kind == index])
    meter.add("loss", losses)
    return (weight * losses).sum() / weight.sum()


def image_weights(count: float) -> dict[str, float]:
    """Weights of kinds: `count` for counting, 2 for relations and numbers, 0.5 for colour."""
    weights = {"colour": 0.5, "count": count, "relation": 2.0, "number": 2.0}
    return {kind: weights.get(kind, 1.0) for kind in KINDS}
