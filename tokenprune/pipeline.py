"""A model with its processor: what `tokenprune.load` returns and users call."""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.adapter import Adapter, adapter_of
from tokenprune.compatibility import check_compatible, check_encoder, check_length, check_signal
from tokenprune.compressor import Compressor, Stage
from tokenprune.deprecated import renamed_arguments
from tokenprune.encoder import encoder_part
from tokenprune.engine import vision
from tokenprune.engine.trace import SelectionRecord
from tokenprune.errors import UserError
from tokenprune.facts import no_language_model
from tokenprune.pictures import frames, picture
from tokenprune.prompts import (
    channels_first,
    chat_prompt,
    clips_by_prompt,
    images_by_prompt,
    listed,
    questions,
)
from tokenprune.signals import Signal
from tokenprune.spec import parse
from tokenprune.tokens import VisualTokens

__all__ = ["Pipeline", "encoder_outputs"]

_RENAMED = {
    "choose": "select",
    "has_cls": "adapter.facts.vision.has_cls",
    "patch_size": "adapter.facts.vision.patch_size",
    "placeholders": "adapter.facts.placeholders",
    "positions": "adapter.facts.decoder.positions",
    "prefix_tokens": "adapter.facts.vision.prefix_tokens",
    "vision_heads": "adapter.facts.vision.heads",
    "vision_tokens": "adapter.facts.vision.tokens",
    "vision_width": "adapter.facts.vision.hidden",
}
"""Former attributes of the object that `tokenprune.load` returned, and their replacements."""


class Pipeline:
    """Model, processor and adapter, ready to answer.

    Call it with images and a question, or use its steps: `prepare` for ``model.generate``;
    `encode`, then `assemble`, to run the vision encoder once for several prompts or methods.
    All of them work inside and outside `tokenprune.compress`.

    Args:
        model: A model, with or without wrappers, or its adapter.
        processor: Its ``transformers`` processor.
        path: Folder or file that the model was loaded from, or None.

    Attributes:
        model, processor, path: As given.
        system: System message in front of every question; None for that of the chat template, or
            none.
        adapter: The description of the model's family.

    Raises:
        UserError: No adapter is registered for the model.
    """

    def __init__(
        self, model: nn.Module | Adapter, processor: Any, path: Path | None = None
    ) -> None:
        self.adapter = adapter_of(model)
        self.model: Any = self.adapter.model if isinstance(model, Adapter) else model
        self.processor = processor
        self.path = path
        self.system: str | None = None
        if processor is not None:
            self.adapter.bind(processor)

    def __repr__(self) -> str:
        return f"Pipeline({type(self.model).__name__}, {self.adapter.name}, {self.device})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "adapter":  # not set yet while it is made or copied
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if name not in _RENAMED and not hasattr(self.adapter, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        new = _RENAMED.get(name, f"adapter.{name}")
        warnings.warn(
            f"tokenprune.load returns a Pipeline now; .{name} is deprecated and will go in the "
            f"next release: use pipe.{new}.",
            DeprecationWarning,
            stacklevel=2,
        )
        return operator.attrgetter(new)(self)

    @property
    def device(self) -> torch.device:
        """The device on which the model takes its inputs."""
        return self.adapter.device

    # -- answers ---------------------------------------------------------------------------------

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        *,
        longer: bool = False,
        max_new_tokens: int = 256,
        **options: Any,
    ) -> Any:
        """Answer one question, or a list of questions in one batch.

        Args:
            images: For one question, an image or a list of images; for a list of questions, one
                such entry per question.  An image is anything that `pictures.picture` takes: a PIL
                image, a path, an open file, an array (H, W, 3), a tensor (3, H, W).
            text: A question or a list of questions, each as in `prompt`.
            videos: As ``images``; a video is anything that `pictures.frames` takes.
            longer: As in `prepare`.
            max_new_tokens: Maximum number of tokens of an answer.
            **options: Other arguments of ``model.generate``.

        Returns:
            The answer, or the list of answers for a list of questions.

        Raises:
            UserError: As `prepare`.
        """
        if text is None:
            raise UserError("there is no question; give text='...', or a list of questions.")
        if isinstance(text, str):
            images = None if images is None else [images]
            videos = None if videos is None else [videos]
        prompts = [text] if isinstance(text, str) else text
        inputs = self.prepare(images, prompts, videos, longer=longer)
        ids = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
        answers = self.decode(ids, inputs)
        return answers[0] if isinstance(text, str) else answers

    def prompt(self, question: str, images: int, videos: int = 0) -> str:
        """``question`` in the model's chat template, with placeholders for images and videos.

        The placeholders stand where the question marks them with ``<image>`` and ``<video>``
        (``<image>\\nWhat is this?``), otherwise in front.  A text that has the template's turn
        markers is returned unchanged.  If the model has no chat template, so is a text with marks.

        Args:
            question: A question or a finished prompt.
            images: Number of images.
            videos: Number of videos.

        Raises:
            UserError: The question marks another number of images or videos, or the chat template
                does not show the `system` message.
        """
        counts = dict(zip(self.adapter.modalities, (images, videos), strict=False))
        return chat_prompt(
            question, self.processor, counts, self.placeholder_texts, system=self.system
        )

    @property
    def placeholder_texts(self) -> dict[str, str]:
        """Modality to the text of its placeholder."""
        self._require_language_model()
        names = self.adapter.modalities
        return {name: str(getattr(self.processor, f"{name}_token")) for name in names}

    def prepare(
        self,
        images: Sequence[Any] | None,
        prompts: Sequence[str],
        videos: Sequence[Any] | None = None,
        *,
        longer: bool = False,
    ) -> Any:
        """Inputs for ``model(**inputs)`` and ``model.generate(**inputs)``.

        Args:
            images: For every prompt an image or a list of images (empty for text only).  An image
                is anything that `pictures.picture` takes.
            prompts: Questions or finished prompts, as in `prompt`.
            videos: For every prompt a video or a list of videos (empty for none).  A video is
                anything that `pictures.frames` takes.  All videos of one call need the same number
                of frames if the model stacks them, as LLaVA-OneVision does.
            longer: Accept prompts that exceed the decoder's positions, for a method that shortens
                them before the decoder reads them.

        Raises:
            UserError: The numbers of prompts, image lists and video lists differ, a question
                marks another number of images, the model takes no videos, an image or video
                cannot be read, or the decoder knows fewer positions than a prompt has tokens.
        """
        self._require_language_model()
        prompts = questions(prompts)
        pictures = images_by_prompt(images, len(prompts))
        clips_of = clips_by_prompt(videos, len(prompts))
        clips = [clip for some in clips_of for clip in some]
        self._check_videos(clips)
        if self.adapter.stacks_videos and len({len(clip) for clip in clips}) > 1:
            raise UserError(
                f"the videos have {sorted({len(clip) for clip in clips})} frames, but the model "
                "stacks the videos of a batch; give all of them the same number of frames, or "
                "encode them with encode_videos and pass them to assemble."
            )
        texts = [
            self.prompt(question, len(some), len(many))
            for question, some, many in zip(prompts, pictures, clips_of, strict=True)
        ]
        media: dict[str, Any] = {}
        if clips:
            media = {"videos": [channels_first(clip) for clip in clips]}
            media |= self.adapter.video_options(self.processor, [*map(len, clips)])
        batch = self.processor(
            images=self.adapter.grouped(pictures) if any(pictures) else None,
            text=texts,
            padding=True,
            return_tensors="pt",
            **media,
        )
        if not longer:
            check_length(self.adapter.facts, batch["input_ids"].shape[1])
        inputs = batch.to(self.device, self.model.dtype)
        self.adapter.annotate(inputs, self._frames(texts, clips))
        return inputs

    def _frames(self, texts: Sequence[str], clips: Sequence[Any]) -> list[int]:
        """Frames of every image and video in the order of the prompts; 0 for an image."""
        lengths = map(len, clips)
        return [next(lengths) if mark == "video" else 0 for mark in self._marks(texts)]

    def _marks(self, texts: Sequence[str]) -> list[str]:
        """The modality of every placeholder, in the order of the texts."""
        names = {token: name for name, token in self.placeholder_texts.items()}
        return [names[mark] for mark in re.findall("|".join(map(re.escape, names)), "".join(texts))]

    def decode(self, ids: Tensor, inputs: Mapping[str, Any]) -> list[str]:
        """The generated text of every row.

        Args:
            ids: (B, S) output of ``model.generate``, prompts included.
            inputs: Its inputs.
        """
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]

    # -- encoding once ---------------------------------------------------------------------------

    @renamed_arguments(together="same_prompt")
    def encode(
        self,
        images: Sequence[Any],
        signals: Iterable[Signal] = (),
        compressor: Compressor | None = None,
        *,
        same_prompt: bool = False,
    ) -> list[VisualTokens]:
        """Run the vision encoder once over ``images``.

        Args:
            images: Any number of images.  An image is anything that `pictures.picture` takes.
            signals: Signals to compute while the vision encoder runs.
            compressor: A method that acts inside the vision encoder, or a chain that begins with
                one.  The other parts of the chain do not run.
            same_prompt: Whether all images belong to one prompt; LLaVA-OneVision then cuts no
                crops.

        Returns:
            The packed features, layout and ``signals`` of every image, ready for `assemble`.

        Raises:
            UserError: An image cannot be read, or the model lacks what the method or a signal
                needs.
        """
        pictures = [picture(image) for image in listed(images, "image")]
        if not pictures:
            return []
        prompts = [pictures] if same_prompt else [[image] for image in pictures]
        batch = self.processor.image_processor(
            self.adapter.grouped(prompts), return_tensors="pt", **self.adapter.image_options
        )
        call = self.adapter.encoder_call("image", batch)
        return self._encode("image", call, signals, compressor)

    def encode_videos(
        self,
        videos: Sequence[Any],
        signals: Iterable[Signal] = (),
        compressor: Compressor | None = None,
    ) -> list[VisualTokens]:
        """Run the vision encoder over each of ``videos``, which may differ in length.

        Args:
            videos: Any number of videos.  A video is anything that `pictures.frames` takes.
            signals, compressor: As in `encode`.

        Returns:
            As `encode`, for every video.

        Raises:
            UserError: As `encode`, or the model takes no videos.
        """
        videos = listed(videos, "video")
        self._check_videos(videos)
        found = []
        for video in videos:
            clip = channels_first(frames(video))
            options = self.adapter.video_options(self.processor, [len(clip)])
            batch = self.processor.video_processor([clip], return_tensors="pt", **options)
            call = self.adapter.encoder_call("video", batch)
            found += self._encode("video", call, signals, compressor)
        return found

    def _encode(
        self,
        modality: str,
        call: Mapping[str, Any],
        signals: Iterable[Signal],
        compressor: Compressor | None,
    ) -> list[VisualTokens]:
        facts, signals, part = self.adapter.facts, frozenset(signals), encoder_part(compressor)
        if part is not None:
            check_encoder(facts, part)
        for signal in signals:
            if not signal.in_llm:
                check_signal(facts, signal, signal.name)
        return vision.encode(self.adapter, self.adapter.stream(modality), call, signals, part)

    def select(
        self, compressor: Compressor | str, images: Sequence[Any], **fields: Any
    ) -> list[SelectionRecord]:
        """Run a method that acts before the language model, and return what it keeps of each image.

        The language model does not run.

        Args:
            compressor: A `Compressor` or a spec such as ``"globalcom2"``.
            images: Any number of images, each in a separate prompt, as in `encode`.
            **fields: With a spec, the method's options and ``retention``.

        Raises:
            UserError: The method acts in the language model or needs a prompt, or the vision
                encoder lacks what it needs.
        """
        if isinstance(compressor, str):
            compressor = parse(compressor, **fields)
        elif fields:
            raise UserError(f"fields {sorted(fields)} need a method's name, got {compressor!r}.")
        check_compatible(self.adapter.facts, compressor)
        if compressor.stage is Stage.LLM or list(compressor.parts()) != [compressor]:
            raise UserError(
                f"{compressor.label} does not act in front of the language model alone; run it "
                "with tokenprune.compress."
            )
        if any(signal.in_llm for signal in compressor.needs):
            raise UserError(
                f"{compressor.label} needs the prompt, which an image alone does not have; run it "
                "with tokenprune.compress."
            )
        encoded = self.encode(images, compressor.needs, compressor)
        return [
            SelectionRecord(
                index, 0, compressor.stage, None, tokens.layout, compressor(tokens).keep
            )
            for index, tokens in enumerate(encoded)
        ]

    @renamed_arguments(blind="without_images")
    def assemble(
        self,
        encoded: Sequence[Sequence[VisualTokens]],
        prompts: Sequence[str],
        *,
        without_images: bool = False,
    ) -> dict[str, Any]:
        """Inputs for ``model.generate`` from encoded images and videos.

        Call it again before every `generate`: beam search changes the encoder outputs in place.

        Args:
            encoded: For every prompt its encoded images and videos.
            prompts: As in `prepare`.
            without_images: Leave out the visual tokens and keep the rest of the prompts.
        """
        texts = []
        for some, question in zip(encoded, questions(prompts), strict=True):
            words: dict[str, list[str]] = {name: [] for name in self.placeholder_texts}
            for tokens in some:
                length = 0 if without_images else len(tokens)
                spelled = self.adapter.spelled(tokens, length, self.processor)
                words[tokens.layout.modality].append(spelled)
            text = self.prompt(question, *map(len, words.values()))
            marks = self._marks([text])
            self._check_order(marks, [tokens.layout.modality for tokens in some])
            pieces = re.split("|".join(map(re.escape, self.placeholder_texts.values())), text)
            filled = [
                piece + words[mark].pop(0) for piece, mark in zip(pieces, marks, strict=False)
            ]
            texts.append("".join([*filled, pieces[-1]]))
        batch = self.processor.tokenizer(texts, padding=True, return_tensors="pt")
        inputs = {**batch, **self.adapter.prompt_arguments(batch["input_ids"])}
        if not without_images:
            inputs |= self._encoding_arguments(encoded)
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        return inputs | ({} if without_images else encoder_outputs(self.adapter, encoded))

    def _encoding_arguments(self, encoded: Sequence[Sequence[VisualTokens]]) -> dict[str, Tensor]:
        return self.adapter.encoding_arguments([one.layout for some in encoded for one in some])

    def take(
        self,
        inputs: Mapping[str, Any],
        encoded: Sequence[Sequence[VisualTokens]],
        rows: Sequence[int],
    ) -> dict[str, Any]:
        """Inputs for some of the prompts that `assemble` has prepared.

        Args:
            inputs: Output of `assemble`.
            encoded: Its first argument.
            rows: Indices of the prompts, in any order; a prompt may occur more than once.
        """
        index = torch.tensor(rows, device=self.device)
        chosen, own = [encoded[row] for row in rows], self._encoding_arguments(encoded)
        text = {
            name: value[index]
            for name, value in inputs.items()
            if isinstance(value, Tensor) and name not in own
        }
        mine = self._encoding_arguments(chosen)
        text |= {name: value.to(self.device) for name, value in mine.items() if name in inputs}
        return text | encoder_outputs(self.adapter, chosen)

    # -- checks ----------------------------------------------------------------------------------

    def _require_language_model(self) -> None:
        if not self.adapter.has_language_model:
            raise no_language_model(self.adapter.name)

    def _check_order(self, marks: Sequence[str], given: Sequence[str]) -> None:
        """Raise `UserError` if one list holds images and videos in another order than the text."""
        if len(set(map(self.adapter.stream, marks))) < len(set(marks)) and marks != given:
            raise UserError(
                f"a prompt shows {', '.join(marks)}, but its encoded list holds "
                f"{', '.join(given)}; {self.adapter.name} reads both from one list, so give them "
                "in the order of the prompt."
            )

    def _check_videos(self, videos: Sequence[Any]) -> None:
        if videos and "video" not in self.adapter.modalities:
            raise UserError(
                f"{self.adapter.name} takes images only, got {len(videos)} videos; pass single "
                "frames as images, or load a model that takes videos, such as LLaVA-OneVision."
            )


def encoder_outputs(adapter: Adapter, encoded: Sequence[Sequence[VisualTokens]]) -> dict[str, Any]:
    """The argument ``mm_encoder_outputs`` of ``model.generate``; empty without images.

    Args:
        adapter: The model.
        encoded: For every prompt its encoded images and videos.
    """
    features: dict[str, list[Tensor]] = {}
    levels: dict[str, list[tuple[Tensor, ...]]] = {}
    for tokens in (tokens for some in encoded for tokens in some):
        feature = tokens.features.detach()  # beams and reruns need a new tensor for every use
        feature.visual = tokens  # type: ignore[attr-defined]
        stream = adapter.stream(tokens.layout.modality)
        features.setdefault(stream, []).append(feature)
        levels.setdefault(stream, []).append(tokens.levels)
    outputs = {name: vision.encoded(some, levels[name]) for name, some in features.items()}
    return {"mm_encoder_outputs": outputs} if outputs else {}
