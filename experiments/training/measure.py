"""Accuracy of a testbed by modality, through its adapter, under reference selections."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenprune.experiments.training.evaluate import wilson
from tokenprune.models.testbed import scenes
from tokenprune.models.testbed.scenes import MODALITIES, Modality


def conditions(modality: Modality) -> dict[str, Callable[[Any, np.random.Generator], Tensor]]:
    """Rules by name; each maps a layout and a generator to the sorted indices of kept tokens."""
    named: dict[str, Callable[[Any, np.random.Generator], Tensor]] = {
        "full": lambda layout, rng: torch.arange(len(layout)),
        "image-free": lambda layout, rng: torch.arange(0),
        "random @ 0.25": lambda layout, rng: at_random(layout, rng, 0.25),
        "random @ 0.10": lambda layout, rng: at_random(layout, rng, 0.10),
    }
    if modality == "image":
        named["thumbnail only"] = lambda layout, rng: (layout.view == 0).nonzero().squeeze(1)
        named["crops only"] = lambda layout, rng: (layout.view != 0).nonzero().squeeze(1)
    if modality == "video":
        named["first frame only"] = lambda layout, rng: (layout.view == 0).nonzero().squeeze(1)
        named["last frame only"] = lambda layout, rng: (
            (layout.view == layout.views - 1).nonzero().squeeze(1)
        )
        named["every other frame"] = lambda layout, rng: (layout.view % 2 == 0).nonzero().squeeze(1)
    return named


def at_random(layout: Any, rng: np.random.Generator, retention: float) -> Tensor:
    """Indices of random patch tokens, and of all separators."""
    patches = layout.patches
    chosen = torch.from_numpy(rng.permutation(len(patches))[: round(retention * len(patches))])
    return torch.cat([patches[chosen], layout.is_separator.nonzero().squeeze(1)]).sort().values


@torch.inference_mode()
def evaluate(
    folder: Path, count: int, seed: int, device: str
) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy by modality, condition and kind, on `count` held-out questions of each kind.

    Uses the saved processor and model.  Visual tokens are encoded once; each condition drops some
    of them and answers with `generate`.
    """
    import tokenprune as tp
    from tokenprune.tokens import VisualTokens

    pipe = tp.load(str(folder), device=device, dtype="float32")
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for modality, kinds in MODALITIES.items():
        named = conditions(modality)
        right: dict[str, dict[str, list[bool]]] = {c: {k: [] for k in kinds} for c in named}
        asked = scenes.questions(count * len(kinds), seed=seed, modality=modality)
        for start in range(0, len(asked), len(kinds)):
            group = asked[start : start + len(kinds)]
            images = list(group[0].images)
            if modality == "video":
                whole = pipe.encode_videos([images])
            else:
                whole = pipe.encode(images, same_prompt=len(images) > 1)
            rng = np.random.default_rng([seed, start])
            for condition, choose in named.items():
                cut: list[VisualTokens] = [t.take(choose(t.layout, rng)) for t in whole]
                cut = [tokens for tokens in cut if len(tokens)] or []
                prompts = [question.question for question in group]
                inputs = pipe.assemble([cut] * len(group), prompts)
                with tp.compress(pipe.model, None):
                    ids = pipe.model.generate(**inputs)
                for question, answer in zip(group, pipe.decode(ids, inputs), strict=True):
                    right[condition][question.kind].append(answer == question.answer)
        figures[modality] = {
            condition: {kind: float(np.mean(hits)) for kind, hits in by_kind.items()}
            for condition, by_kind in right.items()
        }
        print(table(figures[modality], count), flush=True)
    return figures


SPECS = ("full", "image-free", "random@0.25", "random@0.1")


@torch.inference_mode()
def evaluate_images(
    folder: Path, count: int, seed: int, device: str
) -> dict[str, dict[str, float]]:
    """Accuracy by condition and kind, on `count` held-out questions of each kind about one image.

    Uses the saved processor and model, and answers with `generate`.  The conditions are `SPECS`.
    """
    import tokenprune as tp

    pipe = tp.load(str(folder), device=device, dtype="float32")
    kinds = MODALITIES["image"]
    right: dict[str, dict[str, list[bool]]] = {c: {k: [] for k in kinds} for c in SPECS}
    asked = scenes.questions(count * len(kinds), seed=seed)
    for start in range(0, len(asked), 8 * len(kinds)):
        group = asked[start : start + 8 * len(kinds)]
        texts = [question.question for question in group]
        for spec in SPECS:
            images = None if spec == "image-free" else [question.image for question in group]
            inputs = pipe.prepare(images, texts)
            with tp.compress(pipe.model, spec if "@" in spec else None):
                ids = pipe.model.generate(**inputs)
            for question, answer in zip(group, pipe.decode(ids, inputs), strict=True):
                right[spec][question.kind].append(answer == question.answer)
    return {c: {k: float(np.mean(r)) for k, r in by.items()} for c, by in right.items()}


def table(figures: dict[str, dict[str, float]], count: int) -> str:
    """Figures of one modality as a Markdown table, with 95 % confidence intervals."""
    kinds = list(next(iter(figures.values())))
    lines = [f"| accuracy | mean | {' | '.join(kinds)} |", "|---|" + "---|" * (len(kinds) + 1)]
    for condition, by_kind in figures.items():
        cells = [f"{sum(by_kind.values()) / len(by_kind):.3f}"]
        for kind in kinds:
            low, high = wilson(by_kind[kind], count)
            cells.append(f"{by_kind[kind]:.3f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {condition} | {' | '.join(cells)} |")
    return "\n".join(lines)
