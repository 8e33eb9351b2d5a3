"""Contrast: what differs from the rest of the image is worth a token."""

from dataclasses import dataclass

from torch import Tensor

from tokenprune.compressor import ScoringCompressor
from tokenprune.experiments.common.questions import Question
from tokenprune.experiments.metrics import Metric
from tokenprune.registry import Card
from tokenprune.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class Contrast(ScoringCompressor):
    """Keep the tokens that are farthest from the mean of the image.

    Args:
        power: Norm of the distance.
    """

    power: float = 2.0

    card = Card(paper="Distance from the mean (baseline)")

    def score(self, tokens: VisualTokens) -> Tensor:
        mean = tokens.features[tokens.layout.patches].mean(0)
        return (tokens.features - mean).float().norm(p=self.power, dim=-1)


class FirstLetter(Metric):
    """1 if the answer begins with the first letter of the true one."""

    def score(self, prediction: str, question: Question) -> float:
        return float(prediction[:1] == question.answer[:1])
