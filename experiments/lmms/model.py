"""The models of lmms-eval that run a method of tokenprune.

Each family has a simple class, which receives a text and images, and a chat class, which receives
messages.  Both make the same prompt of the same task.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

import tokenprune as tp
from tokenprune.compatibility import check_compatible
from tokenprune.errors import UserError
from tokenprune.experiments.common.limits import check_number
from tokenprune.experiments.lmms.answering import (
    BASELINE,
    Answer,
    Answerer,
    Likelihood,
    Message,
    Talk,
    batches,
    compressor_of,
    generation,
    messages_of,
    talk_of,
)
from tokenprune.pipeline import Pipeline
from tokenprune.plugins import import_plugins

__all__ = [
    "InternVLHf",
    "InternVLHfChat",
    "LlavaHf",
    "LlavaHfChat",
    "LlavaOnevision",
    "LlavaOnevisionChat",
    "Qwen3VL",
    "Qwen3VLChat",
    "Qwen25VL",
    "Qwen25VLChat",
]


@dataclass
class Counts(TokenCounts):
    """Token counts of one answer with its record, which lmms-eval writes to its log of samples."""

    record: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "tokenprune": self.record}


class _Model(lmms):
    """A checkpoint with a method.

    Args:
        pretrained: Hub id, local folder or testbed.
        method: ``none`` or a spec.  A spec with commas needs quotes, or its options are given as
            further arguments: ``method=globalcom2,tau=5``.
        retention: Retention ratio of the method.
        batch_size: Prompts per batch.
        device: None for CUDA if there is a GPU, otherwise the CPU.
        dtype, revision, device_map, trust_remote_code: As for `tokenprune.load`.
        attn, attn_implementation: Attention kernel: ``sdpa``, ``eager``, ``flash_attention_2``.
        max_frames_num: Number of frames that are read of a video.
        save_images: Folder that receives every image once, for the masks of ``tokenprune report``.
        plugin: Module that registers methods.
        **options: Options of the method.

    Raises:
        UserError: As `tokenprune.load` and `compressor_of`, the checkpoint is of another family
            than the model id, or it lacks what the method needs.
    """

    families: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        pretrained: str,
        method: str = BASELINE,
        retention: float | None = None,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # of lmms-eval; it has no effect
        device: str | None = None,
        dtype: str = "auto",
        attn: str | None = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        device_map: str | None = None,
        trust_remote_code: bool = False,
        max_frames_num: int = 32,
        save_images: str | None = None,
        plugin: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        size = int(batch_size) if str(batch_size).isdecimal() else batch_size
        check_number("batch_size", size)  # type: ignore[arg-type]  # a text such as auto is refused
        import_plugins([plugin] if plugin else None)
        compressor = compressor_of(str(method), retention, options)
        self.accelerator = Accelerator()
        self._rank = self.accelerator.local_process_index
        self._world_size = self.accelerator.num_processes
        place = _place(device, device_map, self.accelerator)
        given = {
            "device_map": device_map,
            "attn_implementation": attn or attn_implementation,
            "revision": revision,
        }
        pipe = tp.load(
            pretrained,
            device=place,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            **{name: value for name, value in given.items() if value is not None},
        )
        if pipe.adapter.name not in self.families:
            raise UserError(
                f"{pretrained!r} is of the family {pipe.adapter.name}, but this model id takes "
                f"{' and '.join(self.families)}; choose the id of its family."
            )
        if compressor is not None:
            check_compatible(pipe.adapter.facts, compressor)
        self.batch_size, self.frames = int(size), int(max_frames_num)
        folder = Path(save_images) if save_images else None
        about = _about(pretrained, pipe)
        self.answerer: Answerer | None = Answerer(pipe, compressor, about, folder)
        self._device = pipe.device

    @property
    def device(self) -> torch.device:
        """The device of the inputs, on which lmms-eval gathers counts of several processes."""
        return self._device

    @property
    def loaded(self) -> Answerer:
        """The model; lmms-eval has not released it yet."""
        assert self.answerer is not None
        return self.answerer

    def clean(self) -> None:
        """Release the model, as lmms-eval asks before it scores the answers."""
        self.answerer = None
        super().clean()

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """The answers to requests of tasks with ``output_type: generate_until``."""
        found: dict[int, Answer] = {}
        settings = [self._arguments(request) for request in requests]
        lengths = [len(request.args[0]) for request in requests]
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar:
            for rows in batches(settings, lengths, self.batch_size):
                options, ends = generation(settings[rows[0]])
                talks = [self._talk(requests[row]) for row in rows]
                answers = self.loaded.answer(talks, options, ends)
                found.update(zip(rows, answers, strict=True))
                bar.update(len(rows))
        for row, request in enumerate(requests):
            key = request.args[0], settings[row]
            self.cache_hook.add_partial("generate_until", key, found[row].text)
        return [_result(found[row].text, found[row]) for row in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """(mean loss, whether greedy) of given answers; lmms-eval takes the least loss as best."""
        found = []
        for request in tqdm(requests, disable=self.rank != 0, desc="Model Responding"):
            context, target, visuals, number, task, split = request.args
            doc = self.task_dict[task][split][number]
            said = target if isinstance(target, str) else target(doc)
            talk = self._shown(messages_of(context, map(self._opened, visuals(doc) or ())))
            one = self.loaded.likelihood(talk, said)
            # lmms-eval 0.7.3 turns a bare pair into text, which its own scoring cannot read.
            found.append(_result((one.loss, one.greedy), one))
        return found

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported.  Raises `UserError`."""
        raise UserError(
            "tokenprune answers tasks of one round; the output type generate_until_multi_round is "
            "not supported."
        )

    def _arguments(self, request: Any) -> dict[str, Any]:
        """The generation arguments of a request."""
        raise NotImplementedError

    def _talk(self, request: Any) -> Talk:
        """The prompt of a request."""
        raise NotImplementedError

    def _shown(self, messages: Sequence[Message]) -> Talk:
        return talk_of(self.loaded.pipe, messages)

    def _opened(self, visual: Any) -> Any:
        """An image as it is, a video as its frames (frames, height, width, 3)."""
        if isinstance(visual, str):
            from lmms_eval.models.model_utils.load_video import read_video

            return read_video(visual, num_frm=self.frames)
        return visual


def _place(device: str | None, device_map: str | None, accelerator: Accelerator) -> str | None:
    """The device of this process; None if ``device_map`` places the model."""
    if device_map is not None:
        return device
    if accelerator.num_processes > 1:
        return str(accelerator.device)
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def _about(pretrained: str, pipe: Pipeline) -> dict[str, Any]:
    """What the answers depend on besides method and task."""
    config = pipe.model.config
    return {
        "model": pretrained,
        "family": pipe.adapter.name,
        "dtype": str(pipe.model.dtype).removeprefix("torch."),
        "device": pipe.device.type,
        "attn": config._attn_implementation,
        "revision": getattr(config, "_commit_hash", None),
    }


def _result(content: Any, found: Answer | Likelihood) -> GenerationResult:
    counts = Counts(input_tokens=found.read, output_tokens=found.written, record=found.record)
    return GenerationResult(content, counts)


class _Simple(_Model):
    """Receives a text and images."""

    is_simple = True

    def _arguments(self, request: Any) -> dict[str, Any]:
        return dict(request.args[1])

    def _talk(self, request: Any) -> Talk:
        context, _, visuals, number, task, split = request.args
        shown: Callable[[Any], Any] = visuals
        media = map(self._opened, shown(self.task_dict[task][split][number]) or ())
        return self._shown(messages_of(context, media))


class _Chat(_Model):
    """Receives messages."""

    is_simple = False

    def _arguments(self, request: Any) -> dict[str, Any]:
        return dict(request.args[2])

    def _talk(self, request: Any) -> Talk:
        _, messages, _, number, task, split = request.args
        turns = messages(self.task_dict[task][split][number])
        for part in (part for turn in turns for part in turn["content"]):
            if part["type"] == "video":
                part["url"] = self._opened(part["url"])
        return self._shown(turns)


# --- families -------------------------------------------------------------------------------------


class LlavaHf(_Simple):
    """LLaVA-1.5 and LLaVA-NeXT."""

    families = ("LLaVA-1.5", "LLaVA-NeXT")


class LlavaHfChat(_Chat):
    """LLaVA-1.5 and LLaVA-NeXT, with messages."""

    families = LlavaHf.families


class LlavaOnevision(_Simple):
    """LLaVA-OneVision."""

    families = ("LLaVA-OneVision",)


class LlavaOnevisionChat(_Chat):
    """LLaVA-OneVision, with messages."""

    families = LlavaOnevision.families


class Qwen25VL(_Simple):
    """Qwen2.5-VL."""

    families = ("Qwen2.5-VL",)


class Qwen25VLChat(_Chat):
    """Qwen2.5-VL, with messages."""

    families = Qwen25VL.families


class Qwen3VL(_Simple):
    """Qwen3-VL."""

    families = ("Qwen3-VL",)


class Qwen3VLChat(_Chat):
    """Qwen3-VL, with messages."""

    families = Qwen3VL.families


class InternVLHf(_Simple):
    """InternVL3."""

    families = ("InternVL",)


class InternVLHfChat(_Chat):
    """InternVL3, with messages."""

    families = InternVLHf.families
