"""The Python lines and the command that reproduce what the page shows."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenprune.compressor import Compressor
from tokenprune.experiments.demo.answers import GENERATION
from tokenprune.experiments.demo.source import SCENES, Clip, Source
from tokenprune.spec import format

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """What is shown, for `python` and `command`.

    Attributes:
        model: Name of the model.
        loading: Arguments of `tokenprune.load` that differ from its defaults.
        source, clip: The pictures.
        question: The question.
        compressors: The methods.
        max_new_tokens: Maximum length of an answer.
    """

    model: str
    source: Source
    clip: Clip
    question: str
    compressors: Sequence[Compressor]
    max_new_tokens: int
    loading: dict[str, Any] = field(default_factory=dict)

    @property
    def python(self) -> str:
        """A program that prints the answers and costs, and saves the masks."""
        kind = "videos" if self.clip.video else "images"
        loading = "".join(f", {name}={value!r}" for name, value in self.loading.items())
        options = {"max_new_tokens": self.max_new_tokens, **GENERATION}
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        drawing = [
            "        for index, image in enumerate(pictures):",
            '            trace.show(image, index=index).save(f"kept-{number}-{index}.png")',
        ]
        if self.clip.video:
            drawing = ['        trace.show(pictures).save(f"kept-{number}.png")']
        lines = [
            *self._imports(),
            "",
            f"pipe = tp.load({self.model!r}{loading})",
            f"pictures = {self._pictures()}",
            f"asked = dict({kind}=pictures, text={self.question!r})",
            f"options = dict({given})",
            "specs = [",
            *(f"    {format(one)!r}," for one in self.compressors),
            "]",
            'print("uncompressed:", pipe(**asked, **options))',
            "for number, spec in enumerate(specs):",
            "    with tp.compress(pipe.model, spec) as trace:",
            '        print(f"{spec}:", pipe(**asked, **options))',
            "    print(trace.ledger)",
            "    if trace.selections:",
            *drawing,
        ]
        return "\n".join(lines)

    @property
    def command(self) -> str:
        """Lines for a shell that draw the same masks with the same answers."""
        words = ["tokenprune", "masks"]
        options = ["--model", self.model, "--methods", *map(format, self.compressors)]
        modules = self._modules()
        if modules:
            options += ["--plugin", *modules]
        for name, value in self.loading.items():
            flag = f"--{name.replace('_', '-')}"
            options += [flag] if value is True else [flag, str(value)]
        options += ["--max-new-tokens", str(self.max_new_tokens)]
        if self.clip.video:
            options += ["--video"]
        names = [path.name for path in self.source.files]
        lines = []
        if not names:
            names = [f"scene-{index}.png" for index in range(len(self.clip.pictures))]
            lines = [shlex.join(["python", "-c", self._saving()])]
        lines.append(shlex.join([*words, *options, f"--prompt={self.question}", "--", *names]))
        return "\n".join(lines)

    def _imports(self) -> list[str]:
        lines = ["import tokenprune as tp"]
        if not self.source.files:
            lines.append("from tokenprune.models.testbed import scenes")
        if self.clip.sampled:
            lines.append("from tokenprune.pictures import frames")
        return [*(f"import {module}" for module in self._modules()), *lines]

    def _modules(self) -> list[str]:
        """Modules of methods that are not part of tokenprune."""
        parts = [part for one in self.compressors for part in one.parts()]
        names = dict.fromkeys(type(part).__module__ for part in parts)
        return [name for name in names if not name.startswith("tokenprune.")]

    def _pictures(self) -> str:
        """The expression for the images, or for the video."""
        names = [path.name for path in self.source.files]
        if not names:
            return f"list({self._scene()}.images)"
        if not self.clip.video:
            return repr(names)
        film = repr(names[0] if len(names) == 1 else names)
        return f"frames({film})[{list(self.clip.sampled)}]" if self.clip.sampled else film

    def _scene(self) -> str:
        modality, index = SCENES[self.source.number]
        return f'scenes.questions({index + 1}, seed=0, modality="{modality}")[{index}]'

    def _saving(self) -> str:
        """A program that saves the pictures of the scene."""
        return (
            "from tokenprune.models.testbed import scenes; "
            f'[image.save(f"scene-{{i}}.png") for i, image in enumerate({self._scene()}.images)]'
        )
