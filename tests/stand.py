"""A runner with synthetic answers, for tests of the loop of a comparison."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from tokenprune.compressor import Compressor
from tokenprune.encoder import EncoderCompressor
from tokenprune.errors import RetentionWarning
from tokenprune.experiments.common.grid import cells
from tokenprune.experiments.common.questions import Picture, Question
from tokenprune.signals import Signal

CELLS = cells(["uniform", "fastv:layer=3", "globalcom2"], [1.0, 0.5, 0.1])


def questions(count: int = 12, per_image: int = 3) -> list[Question]:
    pictures = [
        Picture(f"p{i}", Image.new("RGB", (1, 1), (i, 0, 0))) for i in range(count // per_image + 1)
    ]
    # Questions about one image are not adjacent.
    images = -(-count // per_image)
    return [
        Question(f"q{i}", (pictures[i % images],), f"question {i}?", "yes", "kind")
        for i in range(count)
    ]


@dataclass
class Stand:
    """Answers from the content of images.  Raises, warns or stops as its fields say."""

    encoded: Counter[int] = field(default_factory=Counter)
    asked: Counter[tuple[str, str]] = field(default_factory=Counter)
    signals: set[frozenset[Signal]] = field(default_factory=set)
    stop_after: int | None = None
    failing: dict[str, Exception] = field(default_factory=dict)
    fails_to_encode: int | None = None
    warns: str = ""
    batches: list[int] = field(default_factory=list)
    towers: Counter[tuple[str, float]] = field(default_factory=Counter)

    def encode(
        self,
        questions: Sequence[Question],
        signals: frozenset[Signal],
        encoder: EncoderCompressor | None,
    ) -> Sequence[Sequence[int]]:
        images = [item.images[0].open() for item in questions]
        codes = [image.getpixel((0, 0))[0] for image in images]  # type: ignore[index]
        if self.fails_to_encode in codes:
            raise MemoryError("the picture is too large")
        self.encoded.update(codes)
        self.signals.add(signals)
        if encoder is not None:
            self.towers[encoder.label, encoder.retention] += len(codes)
            codes = [1000 * encoder.retention + code for code in codes]
        return [[code] for code in codes]

    def answer(
        self, compressor: Compressor | None, images: Sequence[Sequence[int]], prompts: Sequence[str]
    ) -> Sequence[dict[str, Any]]:
        label = (
            "uncompressed" if compressor is None else f"{compressor.label}@{compressor.retention}"
        )
        if label in self.failing:
            raise self.failing[label]
        if self.stop_after is not None and len(self.batches) >= self.stop_after:
            raise KeyboardInterrupt
        if self.warns:
            warnings.warn(f"{label}: {len(self.batches)} views", RetentionWarning, stacklevel=1)
        self.batches.append(len(prompts))
        self.asked.update((label, prompt) for prompt in prompts)
        return [
            {"answer": f"{label} {codes[0]} {prompt}"}
            for codes, prompt in zip(images, prompts, strict=True)
        ]
