"""Accuracy of a testbed under reference selections."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

from tokenprune.experiments.training.geometry import Geometry, geometry, to_labels
from tokenprune.experiments.training.model import PER_VIEW
from tokenprune.experiments.training.quiz import visible
from tokenprune.models.testbed import scenes
from tokenprune.models.testbed.scenes import KINDS, SceneQuestion

# --- figures --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What a rule may look at.

    Attributes:
        geo: Geometry of the image.
        attention: (N,) CLS attention to the packed tokens.
        shown: (N,) bool, whether a token truly shows an object, the sign or a digit.
        rng: Source of all randomness.
    """

    geo: Geometry
    attention: Tensor
    shown: Tensor
    rng: np.random.Generator

    @property
    def patches(self) -> Tensor:
        """(N,) bool, whether a token is a patch and no separator."""
        return self.geo.order >= 0


Chooser = Callable[[Seen], Tensor]
"""Maps an image to the indices (K,) of the tokens that are kept."""


def per_view(seen: Seen, retention: float) -> Tensor:
    """The patches of each view with the highest CLS attention, and all separators."""
    keep = ~seen.patches
    for view in range(seen.geo.views):
        mine = (seen.geo.order // PER_VIEW == view) & seen.patches
        scores = seen.attention.masked_fill(~mine, -math.inf)
        keep[scores.topk(max(1, round(retention * int(mine.sum())))).indices] = True
    return keep.nonzero().squeeze(1)


def at_random(seen: Seen, retention: float) -> Tensor:
    """Random patches, and all separators."""
    return first_of(seen, torch.zeros(len(seen.shown)), retention)


def first_of(seen: Seen, scores: Tensor, retention: float) -> Tensor:
    """The patches with the highest scores, ties at random, and all separators."""
    noise = torch.from_numpy(seen.rng.random(len(scores))).float()
    scores = (scores + noise / 2).masked_fill(~seen.patches, -math.inf)
    best = scores.topk(round(retention * int(seen.patches.sum()))).indices
    return torch.cat([best, (~seen.patches).nonzero().squeeze(1)]).sort().values


CONDITIONS: dict[str, Chooser] = {
    "full": lambda seen: torch.arange(len(seen.shown)),
    "thumbnail only": lambda seen: torch.arange(PER_VIEW),
    "crops only": lambda seen: torch.arange(PER_VIEW, len(seen.shown)),
    "image-free": lambda seen: torch.arange(0),
    "random @ 0.25": lambda seen: at_random(seen, 0.25),
    "random @ 0.10": lambda seen: at_random(seen, 0.10),
    "objects first @ 0.25": lambda seen: first_of(seen, seen.shown.float(), 0.25),
    "background first @ 0.50": lambda seen: first_of(seen, -seen.shown.float(), 0.50),
    "CLS top-k @ 0.25": lambda seen: per_view(seen, 0.25),
    "CLS top-k @ 0.10": lambda seen: per_view(seen, 0.10),
}
"""``objects first`` is the oracle: at R = 25 % it drops nothing but background."""


def cls_attention(model: LlavaNextForConditionalGeneration, pixels: Tensor) -> Tensor:
    """CLS attention to the patches in the last vision layer, averaged over heads: (v, 144)."""
    tower = model.model.vision_tower
    layer = tower.encoder.layers[-1]
    x = layer.layer_norm1(tower(pixels, output_hidden_states=True).hidden_states[-2])
    heads = layer.self_attn.num_heads
    query = rearrange(layer.self_attn.q_proj(x[:, :1]), "v n (h d) -> v h n d", h=heads)
    key = rearrange(layer.self_attn.k_proj(x), "v n (h d) -> v h n d", h=heads)
    weights: Tensor = (query @ key.mT / math.sqrt(key.shape[-1])).softmax(-1)
    return weights[:, :, 0, 1:].mean(1)


def chat(processor: LlavaNextProcessor, question: str) -> str:
    content: Any = [{"type": "image"}, {"type": "text", "text": question}]
    prompt: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return prompt


@torch.inference_mode()
def evaluate(folder: Path, count: int, seed: int, device: str) -> dict[str, dict[str, float]]:
    """Accuracy by condition and kind, on `count` held-out questions of each kind.

    Uses the saved processor and model, and answers with `generate`; the model must stop after its
    answer.  Where tokens are dropped, position ids are compact.
    """
    model = LlavaNextForConditionalGeneration.from_pretrained(
        folder, trust_remote_code=False
    ).eval()
    nn.Module.to(model, device)
    processor = LlavaNextProcessor.from_pretrained(folder, trust_remote_code=False)
    asked = scenes.questions(count * len(KINDS), seed=seed)
    right: dict[str, dict[str, list[bool]]] = {
        condition: {kind: [] for kind in KINDS} for condition in CONDITIONS
    }
    for start in range(0, len(asked), len(KINDS)):
        group: list[SceneQuestion] = asked[start : start + len(KINDS)]
        image = group[0].image
        inputs = processor(
            images=[image] * len(group),
            text=[chat(processor, question.question) for question in group],
            padding=True,
            return_tensors="pt",
        ).to(device)
        ids = model.generate(**inputs)[:, inputs.input_ids.shape[1] :]
        pixels, sizes = inputs.pixel_values[:1], inputs.image_sizes[:1]
        features = model.get_image_features(pixels, sizes).pooler_output[0]
        geo = geometry((image.height, image.width))
        pictured, _ = scenes.quiz(start // len(KINDS), seed=seed)
        labels = to_labels(list(pictured), geo, torch.device("cpu"))
        shown = visible(geo, labels.patches)[0]
        attention = cls_attention(model, pixels[0]).flatten().cpu()[geo.order.clamp(min=0)]
        seen = Seen(geo, attention, shown, np.random.default_rng([seed, start]))
        for condition, choose in CONDITIONS.items():
            if condition != "full":
                keep = choose(seen).to(device)
                ids = answer_ids(model, inputs.input_ids, inputs.attention_mask, features, keep)
            answers = processor.batch_decode(ids, skip_special_tokens=True)
            for question, answer in zip(group, answers, strict=True):
                right[condition][question.kind].append(answer.strip() == question.answer)
    return {c: {k: float(np.mean(r)) for k, r in kinds.items()} for c, kinds in right.items()}


def answer_ids(
    model: LlavaNextForConditionalGeneration,
    input_ids: Tensor,
    attention_mask: Tensor,
    features: Tensor,
    keep: Tensor,
) -> Tensor:
    """Generated tokens (b, S') after prompts (b, S) on one image.

    The prompts keep only the entries `keep` (K,) of the packed `features` (N, d), with compact
    position ids.
    """
    visual = input_ids == model.config.image_token_id  # (b, S), N of them in each row
    stay = ~visual
    rank = visual.cumsum(1) - 1
    stay |= visual & torch.isin(rank, keep)
    embeds = model.get_input_embeddings()(input_ids)
    embeds[visual] = features.repeat(len(embeds), 1)
    mask = rearrange(attention_mask[stay], "(b s) -> b s", b=len(embeds))
    ids: Tensor = model.generate(
        inputs_embeds=rearrange(embeds[stay], "(b s) d -> b s d", b=len(embeds)),
        attention_mask=mask,
    )
    return ids


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share of `count` trials (Wilson)."""
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / count / 2) ** 2)
    return middle - half, middle + half


def table(figures: dict[str, dict[str, float]], count: int) -> str:
    """Figures as a Markdown table, with 95 % confidence intervals."""
    lines = [f"| accuracy | mean | {' | '.join(KINDS)} |", "|---|" + "---|" * (len(KINDS) + 1)]
    for condition, by_kind in figures.items():
        cells = [f"{sum(by_kind.values()) / len(by_kind):.3f}"]
        for kind in KINDS:
            low, high = wilson(by_kind[kind], count)
            cells.append(f"{by_kind[kind]:.3f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {condition} | {' | '.join(cells)} |")
    return "\n".join(lines)
