"""Tiny random models of every family, in which the checks run."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenprune.adapter import adapter_of
from tokenprune.compatibility import check_compatible, other_options
from tokenprune.compressor import Compressor
from tokenprune.errors import UserError
from tokenprune.layout import TokenLayout
from tokenprune.registry import adapters
from tokenprune.spec import create, parse

__all__ = [
    "DECODERS",
    "RETENTION",
    "ROWS",
    "Host",
    "Row",
    "every_host",
    "example",
    "hosts",
    "refusal",
    "tiny_host",
]


Inputs = dict[str, Any]


DECODERS = ("llama", "mistral", "qwen2")


RETENTION = 0.4


# -- tiny models ---------------------------------------------------------------------------------


class Row(NamedTuple):
    """One prompt of the ragged batch.

    Attributes:
        sizes: (height, width) of its images.
        text: Number of ids after the images and videos.
        frames: Views of each of its videos, which follow the images if the model takes videos.
    """

    sizes: tuple[tuple[int, int], ...]
    text: int
    frames: tuple[int, ...] = ()


ROWS = (Row(((20, 30),), 3), Row((), 5), Row(((10, 30), (24, 24)), 4, frames=(3,)))


@dataclass(frozen=True, eq=False)
class Host:
    """A tiny random model and its inputs.

    Attributes:
        adapter: Adapter of the model.
        name: Registered name of the adapter.
        decoder: ``model_type`` of the decoder.
    """

    adapter: Any
    name: str = ""
    decoder: str = ""

    @classmethod
    def tiny(cls, name: str, decoder: str = "llama", seed: int = 0) -> Host:
        """The tiny model of the adapter registered as ``name``."""
        family: Any = adapters.get(name)
        return cls(adapter_of(family.tiny(decoder, seed)), name, decoder)

    def like(
        self,
        *,
        attention: str | None = None,
        dtype: torch.dtype | None = None,
        window: int | None = None,
    ) -> Host:
        """A copy of this model with another attention kernel, dtype or sliding window."""
        model = copy.deepcopy(self.model)
        if attention is not None:
            model.set_attn_implementation(attention)
        if window is not None:
            _slide(adapter_of(model).language_model, window)
        return Host(adapter_of(model.to(dtype)), self.name, self.decoder)

    @property
    def model(self) -> Any:
        """The Hugging Face model."""
        return self.adapter.model

    @property
    def placeholders(self) -> list[int]:
        """Ids that stand for visual tokens."""
        return [*self.adapter.facts.placeholders.values()]

    @property
    def multimodal(self) -> bool:
        """Whether position ids have a time, a row and a column."""
        return bool(self.adapter.facts.decoder.position_scheme == "multimodal-rotary")

    def keeps_positions(self, part: Compressor) -> bool:
        """Whether tokens that ``part`` keeps keep their position ids in this model."""
        if self.multimodal:
            return part.position_ids != "compact"
        return part.keeps_positions

    def layouts(self, row: int) -> list[TokenLayout]:
        """Layouts of the images of a prompt, then of its videos."""
        sizes, _, frames = ROWS[row]
        images = [self.adapter.layout(size, same_prompt=len(sizes) > 1) for size in sizes]
        if "video" not in self.adapter.modalities:
            return images
        return images + [self.adapter.video_layout(count) for count in frames]

    def prompt(self, row: int) -> list[int]:
        """Ids of one prompt: BOS, some text in front of each image, and the question."""
        draw = random.Random(row)
        ids = [1]
        for layout in self.layouts(row):
            placeholder = self.adapter.facts.placeholders[self.adapter.stream(layout.modality)]
            for length in self.adapter.runs(layout):
                ids += [draw.randrange(5, 60), draw.randrange(5, 60)]
                ids += [int(placeholder)] * length
        return ids + [draw.randrange(5, 60) for _ in range(ROWS[row].text)]

    def media(self, row: int) -> dict[str, Inputs]:
        """Encoder to its inputs for a prompt, with notes; the same in every batch."""
        sizes, _, frames = ROWS[row]
        found: dict[str, list[Inputs]] = {}
        if sizes:
            images = self.adapter.dummy_images(sizes, row, same_prompt=len(sizes) > 1)
            found["image"] = [images]
        if frames and "video" in self.adapter.modalities:
            videos = _batched([self.adapter.dummy_video(count, row) for count in frames])
            found.setdefault(self.adapter.stream("video"), []).append(videos)
        return {name: _batched(parts) for name, parts in found.items()}

    def inputs(
        self,
        rows: Sequence[int] = (0, 1, 2),
        side: str = "left",
        answer: Sequence[int] = (),
    ) -> Inputs:
        """The batch of ``rows``, each followed by ``answer``, padded on ``side``.

        Ids and images of a row are the same in every batch.
        """
        prompts = [[*self.prompt(row), *answer] for row in rows]
        width = max(map(len, prompts))
        ids, mask = [], []
        for prompt in prompts:
            pad = [0] * (width - len(prompt))
            ids.append(pad + prompt if side == "left" else prompt + pad)
            real = [1] * len(prompt)
            mask.append(pad + real if side == "left" else real + pad)
        dtype = self.model.dtype
        result = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        result |= self.adapter.prompt_arguments(result["input_ids"])
        media = [self.media(row) for row in rows]
        for modality in self.adapter.encoders:
            some = [found[modality] for found in media if modality in found]
            together = _batched(some)
            for name in together.keys() - self.adapter.notes:
                values = together[name]
                result[name] = values.to(dtype if values.is_floating_point() else None)
            if "frames" in together:
                self.adapter.annotate(result, together["frames"].tolist())
        return result

    def generate(self, inputs: Inputs, **options: Any) -> Tensor:
        """(B, new) ids of ``model.generate``: four new tokens without placeholders."""
        ids: Tensor = self._generate(inputs, **options)
        return ids[:, inputs["input_ids"].shape[1] :]

    def generate_with_logits(self, inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
        """(B, new) ids and the (B, new, vocabulary) logits that they are drawn from."""
        out = self._generate(inputs, return_dict_in_generate=True, output_logits=True, **options)
        ids = out.sequences[:, inputs["input_ids"].shape[1] :]
        return ids, torch.stack(out.logits, dim=1)

    def _generate(self, inputs: Inputs, **options: Any) -> Any:
        options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, **options}
        return self.model.generate(**inputs, suppress_tokens=self.placeholders, **options)

    @torch.no_grad()
    def logits(self, inputs: Inputs, **options: Any) -> Tensor:
        """(B, S, vocabulary) logits of one forward."""
        out: Tensor = self.model(**inputs, **options).logits
        return out


def _slide(language: Any, window: int) -> None:
    """Let the last half of the layers of a decoder that can slide attend within ``window``."""
    config = language.config
    if hasattr(config, "max_window_layers"):
        half = config.num_hidden_layers // 2
        config.layer_types = ["full_attention"] * half + ["sliding_attention"] * half
        language.has_sliding_layers = True
    if hasattr(config, "sliding_window"):
        config.sliding_window = window


def _batched(parts: Sequence[Inputs]) -> Inputs:
    """Encoder inputs as one batch; images with fewer views are padded with zeros."""
    if not parts:
        return {}
    views = max(part["pixel_values"].shape[1] if "pixel_values" in part else 0 for part in parts)

    def filled(values: Tensor) -> Tensor:
        if values.ndim < 5 or not views:
            return values
        return nn.functional.pad(values, (0, 0) * 3 + (0, views - values.shape[1]))

    return {name: torch.cat([filled(part[name]) for part in parts]) for name in parts[0]}


@functools.cache
def tiny_host(name: str, decoder: str, seed: int = 0) -> Host:
    """`Host.tiny`, made once for the same arguments."""
    return Host.tiny(name, decoder, seed)


def hosts(decoders: Sequence[str] = DECODERS) -> list[Host]:
    """A tiny model for every registered family, and every decoder that the family can have.

    Families whose decoder has a type of its own are in `every_host` only.
    """
    return [
        tiny_host(name, decoder)
        for name in _families()
        for decoder in decoders
        if decoder in adapters.get(name).decoders
    ]


def every_host() -> list[Host]:
    """One tiny model for every registered family with a language model."""
    return [tiny_host(name, adapters.get(name).decoders[0]) for name in _families()]


def _families() -> list[str]:
    return [name for name in adapters.names() if adapters.get(name).has_language_model]


def refusal(host: Host, compressor: Compressor) -> str:
    """The reason why the model cannot run the method; empty if it can."""
    try:
        check_compatible(host.adapter.facts, compressor)
    except UserError as error:
        return str(error)
    return ""


def example(name: str, retention: float = RETENTION) -> Compressor:
    """The registered method with its defaults, or with options that a tiny model can run.

    If no tiny model has what the defaults need, the first other option value that one of them can
    run is used, such as a substitute for a text encoder.
    """
    method, tried = create(name, retention=retention), hosts(DECODERS[:1])
    if all(refusal(host, method) for host in tried):
        for spec in (spec for host in tried for spec in other_options(host.adapter.facts, method)):
            return parse(spec, retention=retention)
    return method
