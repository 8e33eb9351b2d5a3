"""Captions of views, and the contrastive loss that teaches them to the [CLS] token.

The loss is that of CLIP (Radford et al., 2021): each caption of a batch must find its image among
all others, and each image its caption.  Equal captions count as one.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenprune.experiments.training.geometry import Labels
from tokenprune.experiments.training.model import WIDTH
from tokenprune.models.testbed import scenes
from tokenprune.models.testbed.scenes import Scene

WORDS = (
    "",
    "a",
    "an",
    "and",
    "on",
    "background",
    "sign",
    "nothing",
    *scenes.SHAPES,
    *scenes.COLOURS,
    *scenes.TINTS,
)
LENGTH = 40


def captions(batch: list[Scene], labels: Labels, rng: np.random.Generator) -> list[str]:
    """A sentence about each view, the views of one scene after the other.

    It names the objects and the sign that the view shows, in random order, and in half of the
    cases the background.
    """
    sentences = []
    for scene, shown in zip(batch, labels.shown.cpu().numpy(), strict=True):
        names = [f"a {item.name}" for item in scene.items]
        if scene.sign is not None:
            names.append("a sign")
        for view in shown:
            seen = [name for name, there in zip(names, view, strict=False) if there]
            text = " and ".join(rng.permutation(seen)) if seen else "nothing"
            if rng.random() < 0.5:
                article = "an" if scene.tint[0] in "aeiou" else "a"
                text += f" on {article} {scene.tint} background"
            sentences.append(text)
    return sentences


class CaptionLoss(nn.Module):
    """A small text encoder and the contrastive loss between captions and [CLS] tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), WIDTH, padding_idx=0)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.layers = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(
                WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
            ),
            2,
            enable_nested_tensor=False,
        )
        self.text = nn.Linear(WIDTH, WIDTH, bias=False)
        self.image = nn.Linear(WIDTH, WIDTH, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, pooled: Tensor, sentences: list[str]) -> tuple[Tensor, Tensor]:
        """Loss, a scalar, and whether each image finds its caption, (V,).

        Args:
            pooled: (V, d) pooled [CLS] tokens.
            sentences: V captions.
        """
        device = pooled.device
        known = {word: index for index, word in enumerate(WORDS)}
        ids = torch.zeros(len(sentences), LENGTH, dtype=torch.long)
        for row, sentence in zip(ids, sentences, strict=True):
            words = [known[word] for word in sentence.split()]
            row[: len(words)] = torch.tensor(words)
        ids = ids[:, : int((ids > 0).sum(1).max())].to(device)
        states = self.words(ids) + self.places[: ids.shape[1]]
        states = self.layers(states, src_key_padding_mask=ids == 0)
        states = states.masked_fill((ids == 0)[..., None], 0).sum(1) / (ids > 0).sum(1)[:, None]
        texts = F.normalize(self.text(states), dim=-1)
        images = F.normalize(self.image(pooled), dim=-1)
        logits = self.scale.clamp(max=4.6).exp() * images @ texts.T
        same = torch.tensor(
            [[one == other for other in sentences] for one in sentences], device=device
        ).float()
        target = same / same.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        found = same.gather(1, logits.argmax(1, keepdim=True))[:, 0] > 0
        return loss, found
