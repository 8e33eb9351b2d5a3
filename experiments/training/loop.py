"""The steps of a stage: fresh scenes, and a state on disk from which an interrupted run goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import nn

from tokenprune.experiments.training.optim import Optimisers
from tokenprune.models.testbed import scenes
from tokenprune.models.testbed.scenes import Scene

EVERY = 100  # steps between two states on disk


class Run(Protocol):
    """What `steps_of` needs of a training run."""

    out: Path
    device: torch.device
    seed: int
    steps: dict[str, int]
    stages: ClassVar[dict[str, Callable[[Any], None]]]

    def tick(self, step: int, steps: int) -> None: ...


@dataclass(frozen=True)
class Recipe:
    """The scenes of a stage.

    Attributes:
        count: Scenes a step.
        items: Smallest and largest number of objects.
        alike: Share of scenes with few colours and shapes.
        sign: Share of scenes with a sign.
        related: Whether a question about direction must be possible.
    """

    count: int
    items: tuple[int, int] = (scenes.FEWEST, scenes.MOST)
    alike: float = 0.0
    sign: float = 1.0
    related: bool = False

    def draw(self, rng: np.random.Generator) -> list[Scene]:
        """Scenes of one size."""
        sizes, shares = list(scenes.SIZES), list(scenes.SIZES.values())
        size = sizes[rng.choice(len(sizes), p=shares)]

        def one() -> Scene:
            while True:
                scene = scenes.render(
                    rng,
                    size=size,
                    items=self.items,
                    alike=rng.random() < self.alike,
                    sign=rng.random() < self.sign,
                )
                if not self.related or scenes.relations(scene):
                    return scene

        return [one() for _ in range(self.count)]


def steps_of(
    run: Run,
    stage: str,
    modules: dict[str, nn.Module],
    optimisers: Optimisers,
) -> Iterator[np.random.Generator]:
    """The generator of every step that is left, from which its scenes are drawn.

    It depends on the seed, the stage and the number of the step alone.  The state is saved every
    `EVERY` steps, and a run that was interrupted starts from it.

    Args:
        run: The run.
        stage: Name of the stage.
        modules: What it trains, by name.
        optimisers: Their optimisers.
    """
    file = run.out / "stages" / f"{stage}.progress"
    if file.exists():
        saved = torch.load(file, map_location=run.device, weights_only=True)
        optimisers.load_state_dict(saved["optimisers"])
        for name, module in modules.items():
            module.load_state_dict(saved["modules"][name])
    steps = run.steps[stage]
    for step in range(optimisers.done, steps):
        yield np.random.default_rng([run.seed, list(run.stages).index(stage), step])
        run.tick(step, steps)
        if (step + 1) % EVERY == 0:
            state = {name: module.state_dict() for name, module in modules.items()}
            save({"optimisers": optimisers.state_dict(), "modules": state}, file)


def save(state: object, file: Path) -> None:
    """Write a state; a reader sees the old file or the new one, never a part."""
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(file)
