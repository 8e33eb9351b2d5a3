"""What a model family must provide so that any compressor runs in it, and how users load one."""

from __future__ import annotations

import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from transformers import BatchFeature

from tokenprune.attention import Projections, head_rows, projections
from tokenprune.budget import budget
from tokenprune.compressor import Compressor, Stage, cut_layer
from tokenprune.deprecated import renamed_arguments
from tokenprune.encoder import EncoderCompressor, encoder_part
from tokenprune.engine.guard import eagerly
from tokenprune.engine.tower import Tower
from tokenprune.engine.vision import encoded as as_encoded
from tokenprune.engine.vision import watched
from tokenprune.errors import UserError, unknown
from tokenprune.layout import TokenLayout
from tokenprune.offload import execution_device
from tokenprune.pictures import frames, picture
from tokenprune.prompts import (
    channels_first,
    chat_prompt,
    clips_by_prompt,
    images_by_prompt,
    listed,
    questions,
)
from tokenprune.registry import adapters, strategies
from tokenprune.signals import Signal
from tokenprune.spec import create, parse
from tokenprune.tokens import VisualTokens
from tokenprune.unwrap import unwrapped

if TYPE_CHECKING:
    from PIL.Image import Image

    from tokenprune.engine.trace import SelectionRecord

__all__ = [
    "Adapter",
    "adapter_of",
    "image_sizes",
    "tiny_decoder",
]


class Adapter(ABC):
    """One family of Hugging Face models.

    A subclass says where things are in the model (`layouts`, `pack`, `vision_attention`); what
    users call (`prepare`, `encode`, `assemble`, `decode`) is shared.

    Attributes:
        hosts: Names of the ``transformers`` classes the adapter knows.
        encoders: Modality (``image``, ``video``) to the method of `base` that encodes it.
        image_arguments: What that method takes for images of an image processor's output.
        has_language_model: Whether there is anything behind the vision tower.
        fit: How the processor makes a square of an image that is one view and has no crops:
            ``stretch`` its sides, ``pad`` the shorter ones, or ``crop`` the longer ones.
        model: The user's model, untouched.
        processor: Its processor, or None where only the model was given.
        path: Folder it was loaded from, or None.
    """

    name: ClassVar[str] = ""
    hosts: ClassVar[tuple[str, ...]] = ()
    encoders: ClassVar[Mapping[str, str]] = {"image": "get_image_features"}
    image_arguments: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
    has_language_model: ClassVar[bool] = True
    fit: ClassVar[Literal["stretch", "pad", "crop"]] = "stretch"

    def __init__(self, model: nn.Module, processor: Any = None, path: Path | None = None) -> None:
        self.model: Any = model
        self.processor = processor
        self.path = path

    # -- where things are ------------------------------------------------------------------------

    @property
    def base(self) -> Any:
        """The module that encodes images and calls the language model."""
        return getattr(self.model, "model", self.model)

    @property
    def language_model(self) -> Any:
        """The decoder.  Raises `UserError` if there is none."""
        self.require_language_model()
        return self.base.language_model

    @property
    def decoder_layers(self) -> Sequence[nn.Module]:
        """Its layers."""
        layers: Sequence[nn.Module] = self.language_model.layers
        return layers

    @property
    def vision_tower(self) -> Any:
        """The vision tower, which maps views to hidden states."""
        return self.base.vision_tower

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        """Layers of the vision tower."""
        tower = self.vision_tower
        layers: Sequence[nn.Module] = getattr(tower, "vision_model", tower).encoder.layers
        return layers

    @property
    def vision_positions(self) -> nn.Module:
        """Table of the position embeddings of the vision tower."""
        tower = self.vision_tower
        table: nn.Module = getattr(tower, "vision_model", tower).embeddings.position_embedding
        return table

    def vision_attention(self, layer: int) -> nn.Module:
        """Attention module of encoder layer ``layer`` (negative counts from the end)."""
        return self.vision_layers[layer].get_submodule("self_attn")

    def vision_block(
        self,
        layer: Any,
        states: Tensor,
        mask: Tensor | None,
        between: Callable[[Tensor], Tensor],
        **kwargs: Any,
    ) -> Tensor:
        """What an encoder layer of CLIP and SigLIP does, with something done in its middle.

        Args:
            layer: One of `vision_layers`.
            states: (V, n, D) its input.
            mask: (V, 1, 1, n) what is added to the attention logits of each key, or None.
            between: Maps the states behind the attention to those in front of the MLP.
            **kwargs: What else the encoder hands to its layers.
        """
        normed = layer.layer_norm1(states)
        attended = layer.self_attn(hidden_states=normed, attention_mask=mask, **kwargs)[0]
        states = between(states + attended)
        result: Tensor = states + layer.mlp(layer.layer_norm2(states))
        return result

    def used_vision_layers(self, call: Mapping[str, Any]) -> int:
        """How many encoder layers lie in front of the hidden states that are used."""
        chosen = call.get("vision_feature_layer")
        if chosen is None:
            chosen = self.base.config.vision_feature_layer
        states = len(self.vision_layers) + 1
        return max(index % states for index in ([chosen] if isinstance(chosen, int) else chosen))

    @property
    def pooling_head(self) -> Any:
        """Multi-head attention of the tower's pooling head, or None where there is none."""
        tower = self.base.vision_tower
        head = getattr(getattr(tower, "vision_model", tower), "head", None)
        return getattr(head, "attention", None)

    @property
    def view_shape(self) -> tuple[int, int]:
        """(rows, columns) of the patches the vision tower makes of a view."""
        config = self.base.config.vision_config
        side = config.image_size // config.patch_size
        return side, side

    @property
    def patch_size(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels of the view."""
        side = int(self.base.config.vision_config.patch_size)
        return side, side

    @property
    def projector(self) -> Any:
        """Module that maps the vision tower's vectors to the language model's."""
        return self.base.multi_modal_projector

    @property
    def vision_width(self) -> int:
        """Width of the vision tower."""
        return int(self.base.config.vision_config.hidden_size)

    @property
    def vision_heads(self) -> int:
        """Attention heads of the vision tower."""
        config = self.base.config.vision_config
        return int(getattr(config, "num_attention_heads", None) or config.num_heads)

    @property
    def has_cls(self) -> bool:
        """Whether entry 0 of the tower's sequence is a CLS token."""
        return "clip" in self.base.config.vision_config.model_type

    @property
    def prefix_tokens(self) -> int:
        """Entries of the tower's sequence in front of the patches: CLS token, registers."""
        return int(self.has_cls)

    @property
    def vision_tokens(self) -> int:
        """Entries of the tower's sequence for one view."""
        rows, columns = self.view_shape
        return self.prefix_tokens + rows * columns

    def tap(self, layer: int) -> AbstractContextManager[Projections]:
        """While open, queries and keys of encoder layer ``layer`` are kept."""
        return projections(self.vision_attention(layer))

    def tap_head(self) -> AbstractContextManager[list[Tensor]]:
        """While open, rows of the pooling head (views, patches) are kept."""
        return head_rows(self.pooling_head)

    @property
    def placeholders(self) -> dict[str, int]:
        """Modality to the token id that stands for one visual token."""
        self.require_language_model()
        return {name: int(getattr(self.base.config, f"{name}_token_id")) for name in self.encoders}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "layout" in vars(cls):
            rename = renamed_arguments(together="same_prompt")
            cls.layout = rename(cls.layout)  # type: ignore[method-assign]

    @abstractmethod
    def layout(self, image_size: tuple[int, int], *, same_prompt: bool = False) -> TokenLayout:
        """Layout of an image of ``image_size`` = (height, width) pixels.

        Args:
            image_size: Before any resizing.
            same_prompt: Whether there are other images in the prompt.
        """

    @abstractmethod
    def layouts(self, call: Mapping[str, Any], modality: str) -> list[TokenLayout]:
        """Layout of every image or video of one encoder call.

        Args:
            call: The arguments the encoder method was called with.
            modality: Which of `encoders`.
        """

    @abstractmethod
    def pack(self, maps: list[Tensor], call: Mapping[str, Any], modality: str) -> list[Tensor]:
        """Per-view maps of every image or video, packed exactly like its features.

        Args:
            maps: For every image or video (views, patches, C).
            call: As in `layouts`.
            modality: As in `layouts`.

        Returns:
            For each (N, C), NaN at separators.
        """

    def describe(
        self,
        call: Mapping[str, Any],
        features: list[Tensor],
        maps: Mapping[Signal, Tensor],
        modality: str,
        tower: Tower | None = None,
    ) -> list[VisualTokens]:
        """What is known of every image or video of one encoder call.

        Args:
            call: The arguments the encoder method was called with.
            features: For each (N, D).
            maps: Signal to (all views, patches), or (all views, patches, C) of a vector.
            modality: Which of `encoders`.
            tower: How the tower ran, where a method acted inside it.
        """
        layouts = self.layouts(call, modality)
        clusters = tower.clusters(layouts, self.view_shape) if tower is not None else None
        views = [layout.views for layout in layouts]
        packed = {}
        for signal, values in maps.items():
            wide = values if signal.is_vector else values[..., None]
            rows = self.pack(list(wide.split(views)), call, modality)
            packed[signal] = rows if signal.is_vector else [row.squeeze(-1) for row in rows]
        projector = self.projector if any(s.name == "unprojected" for s in maps) else None
        return [
            VisualTokens(
                layout=layout,
                # A second tensor on the same memory: the record must not hold its own carrier.
                features=feature.detach(),
                signals={signal: values[index] for signal, values in packed.items()},
                fingerprint=self.fingerprint(call, index, sum(views[:index])),
                projector=projector,
                clusters=clusters[index] if clusters is not None else None,
                encoding=tower.encoding if tower is not None else None,
            )
            for index, (layout, feature) in enumerate(zip(layouts, features, strict=True))
        ]

    def fingerprint(self, call: Mapping[str, Any], index: int, first_view: int) -> Tensor:
        """Some pixels of the first view of an image or of all frames, the same in every batch."""
        if "pixel_values_videos" in call:
            view = call["pixel_values_videos"][index]
        else:
            pixels = call["pixel_values"]
            view = pixels[index, 0] if pixels.ndim == 5 else pixels[first_view]
        sample: Tensor = view[..., ::7, ::7]
        return sample

    def check(self, compressor: Compressor, extra_signals: Collection[Signal] = ()) -> None:
        """Raise `UserError` if neither the model nor ``extra_signals`` has what a method needs.

        Args:
            compressor: A method.
            extra_signals: Signals that come with the images.
        """
        taken: dict[int, Compressor] = {}
        for part in compressor.parts():
            if part.stage is Stage.LLM and not self.has_language_model:
                raise UserError(
                    f"{part.name} acts inside the language model, which {self.name} models do not "
                    f"have. Strategies that work here: {', '.join(self._compatible())}."
                )
            if isinstance(part, EncoderCompressor):
                self._check_tower(part)
            for signal in sorted(part.needs.difference(extra_signals), key=repr):
                self._check_signal(signal, part.name, part)
            for cut in part.cuts:
                layer = self.cut_layer(cut)
                if not 0 < layer < len(self.decoder_layers):
                    raise UserError(
                        f"{part.name} cuts in front of decoder layer {layer}; this model has "
                        f"layers 0 to {len(self.decoder_layers) - 1}."
                    )
                if taken.setdefault(layer, part) is not part:
                    raise UserError(
                        f"{taken[layer].name} and {part.name} both cut in front of decoder layer "
                        f"{layer}; move one of them to another layer."
                    )

    def _check_tower(self, part: EncoderCompressor) -> None:
        """Raise `UserError` if the vision tower cannot run under ``part``."""
        reason = self._tower_refuses(part)
        if reason:
            raise UserError(
                f"{part.name} {reason}. Strategies that work here: {', '.join(self._compatible())}."
            )

    def _tower_refuses(self, part: EncoderCompressor) -> str:
        """Why the vision tower cannot run under ``part``, or nothing."""
        known = all(
            hasattr(layer, name)
            for layer in self.vision_layers
            for name in ("layer_norm1", "self_attn", "layer_norm2", "mlp")
        )
        if not known:
            return (
                "acts inside the vision tower, which is offered for the CLIP and SigLIP towers of "
                f"transformers, not for {self.base.config.vision_config.model_type!r}"
            )
        grid = part.grid(self.view_shape, budget(math.prod(self.view_shape), part.retention))
        takes = inspect.signature(self.vision_tower.forward).parameters
        if grid != self.view_shape and "interpolate_pos_encoding" not in takes:
            return "resizes the views, but this vision tower cannot interpolate its positions"
        kind = getattr(self.vision_tower.config, "_attn_implementation", "sdpa")
        if kind not in ("sdpa", "eager") and part.bias(torch.ones(1, 2)) is not None:
            return (
                f"adds to the attention logits, which {kind} attention does not take; load the "
                "model with attn_implementation='sdpa'"
            )
        return ""

    def _check_signal(self, signal: Signal, who: str, part: Compressor | None = None) -> None:
        """Raise `UserError` if the model cannot provide ``signal``, which ``who`` needs."""
        missing = self._missing(signal)
        if missing:
            tower = self.base.config.vision_config.model_type
            lacks = f"the attention of {missing}, which the {tower} tower of this model does"
            if signal.in_llm or signal.needs_text_tower:
                lacks = f"{missing}, which {self.name} models do"
            works = [] if part is None else self.other_options(part)
            if not (works and signal.needs_text_tower):  # which most strategies do without
                works += self._compatible()
            raise UserError(
                f"{who} needs {lacks} not have. Strategies that work here: {', '.join(works)}."
            )
        depth = len(self.decoder_layers if signal.in_llm else self.vision_layers)
        if not -depth <= signal.layer < depth:
            raise UserError(
                f"{who} asks for layer {signal.layer} of the "
                f"{'decoder' if signal.in_llm else 'vision tower'}, which has {depth}."
            )

    def cut_layer(self, cut: int | float) -> int:
        """Index of the decoder layer that a cut lies in front of (`compressor.cut_layer`)."""
        return cut_layer(cut, len(self.decoder_layers))

    @property
    def positions(self) -> int | None:
        """How many positions the decoder knows, rotary scaling included; None if it has no end.

        ``max_position_embeddings``, or ``factor`` times what the model was trained on, where
        ``rope_parameters`` of the config say so.
        """
        config = self.base.config.get_text_config()
        known: int | None = getattr(config, "max_position_embeddings", None)
        scaling = getattr(config, "rope_parameters", None) or {}
        if known is None or not isinstance(scaling.get("factor"), int | float):
            return known
        trained = scaling.get("original_max_position_embeddings") or known
        return max(known, int(trained * scaling["factor"]))

    def check_length(self, tokens: int, new: int = 0, what: str = "the prompt") -> None:
        """Raise `UserError` if the decoder does not know so many positions.

        Args:
            tokens: Of the prompt, visual ones included.
            new: That are generated behind it.
            what: What to call the prompt.
        """
        known = self.positions
        if known is not None and tokens + new > known:
            more = f" and {new} of the answer" if new else ""
            raise UserError(
                f"{what} has {tokens} tokens{more}, but the language model knows {known} "
                "positions; shorten the text, or show fewer or smaller images."
            )

    def require_language_model(self) -> None:
        """Raise `UserError` if there is none."""
        if not self.has_language_model:
            raise UserError(
                f"{self.name} models have no language model; use adapter.encode and "
                "adapter.choose, or load a vision-language model."
            )

    def _missing(self, signal: Signal) -> str:
        """The part of the model that ``signal`` needs and that is not there, or nothing."""
        if signal.in_llm and not self.has_language_model:
            return "a language model"
        if signal.needs_cls and not self.has_cls:
            return "a CLS token"
        if signal.needs_head and self.pooling_head is None:
            return "a pooling head"
        if signal.needs_text_tower:
            return "a CLIP text tower, to compare the patches with the question"
        return ""

    def other_options(self, part: Compressor) -> list[str]:
        """Specs that differ from ``part`` in one option and have what they need in this model."""
        hints = get_type_hints(type(part), include_extras=False)
        found = []
        for name in (item.name for item in dataclasses.fields(part)):
            for value in get_args(hints[name]) if get_origin(hints[name]) is Literal else ():
                other = dataclasses.replace(part, **{name: value})
                if not any(self._missing(signal) for signal in other.needs):
                    found.append(other.label)
        return found

    def _compatible(self) -> list[str]:
        fine = []
        for name in strategies.names():
            method = create(name, retention=0.5)
            if method.stage is Stage.LLM and not self.has_language_model:
                continue
            if any(self._missing(signal) for signal in method.needs):
                continue
            if isinstance(method, EncoderCompressor) and self._tower_refuses(method):
                continue
            fine.append(name)
        return fine

    # -- what users call -------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""
        return execution_device(self.model)

    def prompt(self, question: str, images: int, videos: int = 0) -> str:
        """``question`` in the model's chat template, with its images and videos.

        These stand where the question marks them (``<image>\\nWhat is this?``), or else in front.
        A text that has the turn markers of the template already is taken as it is; so is, without a
        chat template, any text with marks.

        Raises:
            UserError: It has marks, but not as many as images or videos.
        """
        counts = dict(zip(self.encoders, (images, videos), strict=False))
        return chat_prompt(question, self.processor, counts, self.placeholder_texts)

    @property
    def placeholder_texts(self) -> dict[str, str]:
        """Modality to the text of its placeholder."""
        self.require_language_model()
        return {name: str(getattr(self.processor, f"{name}_token")) for name in self.encoders}

    @property
    def image_token(self) -> str:
        """The text of one image placeholder."""
        return self.placeholder_texts["image"]

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
            images: For every prompt an image or a list of images (empty for text only), each
                anything that `pictures.picture` takes: PIL images, paths, open files, arrays, ...
            prompts: Questions, which may mark the places of their images and videos, or finished
                prompts (`prompt`).
            videos: For every prompt a video or a list of videos (empty for none), each anything
                that `pictures.frames` takes: lists of images, arrays, animated images, ...; the
                videos of one call must have equally many frames, because the model stacks them.
            longer: Take prompts beyond the positions that the decoder knows, for a method that
                shortens them in front of it.

        Raises:
            UserError: As many prompts as image and video lists are needed, marks must match, the
                model must take videos, images and videos must be readable, and the decoder must
                know as many positions as the prompt has tokens.
        """
        self.require_language_model()
        prompts = questions(prompts)
        pictures = images_by_prompt(images, len(prompts))
        moving = clips_by_prompt(videos, len(prompts))
        clips = [video for some in moving for video in some]
        self._check_videos(clips)
        if len({len(clip) for clip in clips}) > 1:
            raise UserError(
                f"the videos have {sorted({len(clip) for clip in clips})} frames, but the model "
                "stacks the videos of a batch; give all of them equally many frames, or encode "
                "them with encode_videos and hand them to assemble."
            )
        texts = [
            self.prompt(question, len(some), len(many))
            for question, some, many in zip(prompts, pictures, moving, strict=True)
        ]
        media = {"videos": [channels_first(clip) for clip in clips]} if clips else {}
        batch = self.processor(
            images=self.grouped(pictures) if any(pictures) else None,
            text=texts,
            padding=True,
            return_tensors="pt",
            **media,
        )
        if not longer:
            self.check_length(batch["input_ids"].shape[1])
        return batch.to(self.device, self.model.dtype)

    def grouped(self, images: list[list[Image]]) -> Any:
        """The images of all prompts as the processor takes them."""
        return [image for some in images for image in some]

    def _check_videos(self, videos: Sequence[Any]) -> None:
        if videos and "video" not in self.encoders:
            raise UserError(
                f"{self.name} takes images only, got {len(videos)} videos; hand over single "
                "frames as images, or load a LLaVA-OneVision model."
            )

    def encode(
        self,
        images: Sequence[Any],
        signals: Iterable[Signal] = (),
        compressor: Compressor | None = None,
        *,
        same_prompt: bool = False,
    ) -> list[VisualTokens]:
        """Run the vision tower once over ``images``.

        Args:
            images: Any number, each anything that `pictures.picture` takes.
            signals: What to compute on the way.
            compressor: A method that acts inside the tower, or a chain that begins with one; what
                else is in it does not matter here.
            same_prompt: Whether they belong to one prompt; LLaVA-OneVision then cuts no crops.

        Returns:
            For every image its packed features with layout and ``signals``; hand them to
            `assemble` as often as you like.
        """
        pictures = [picture(image) for image in listed(images, "image")]
        if not pictures:
            return []
        grouped = self.grouped([pictures] if same_prompt else [[image] for image in pictures])
        batch = self.processor.image_processor(grouped, return_tensors="pt")
        return self._encode("image", self.encoder_inputs(batch), signals, compressor)

    def choose(
        self, compressor: Compressor | str, images: Sequence[Any], **fields: Any
    ) -> list[SelectionRecord]:
        """What a method that acts inside the vision tower or right behind it keeps of each image.

        Nothing behind the vision tower runs.

        Args:
            compressor: A `Compressor` or a spec such as ``"globalcom2"``.
            images: Any number, each by itself; as in `encode`.
            **fields: With a spec: the strategy's fields, e.g. ``retention=0.25``.

        Raises:
            UserError: The tower lacks what the method needs, or it acts elsewhere.
        """
        from tokenprune.engine.trace import SelectionRecord

        if isinstance(compressor, str):
            compressor = parse(compressor, **fields)
        elif fields:
            raise UserError(f"fields {sorted(fields)} need a strategy's name, got {compressor!r}.")
        self.check(compressor)
        if compressor.stage is Stage.LLM or list(compressor.parts()) != [compressor]:
            raise UserError(
                f"{compressor.label} does not act in front of the language model alone; run it "
                "with tokenprune.compress."
            )
        if any(signal.in_llm for signal in compressor.needs):
            raise UserError(
                f"{compressor.label} looks at the prompt, which an image alone does not have; run "
                "it with tokenprune.compress."
            )
        encoded = self.encode(images, compressor.needs, compressor)
        return [
            SelectionRecord(
                index, 0, compressor.stage, None, tokens.layout, compressor(tokens).keep
            )
            for index, tokens in enumerate(encoded)
        ]

    def encode_videos(
        self,
        videos: Sequence[Any],
        signals: Iterable[Signal] = (),
        compressor: Compressor | None = None,
    ) -> list[VisualTokens]:
        """Run the vision tower over each of ``videos``, which may differ in length.

        Args:
            videos: As in `prepare`.
            signals: What to compute on the way.
            compressor: As in `encode`.

        Returns:
            As `encode`.
        """
        videos = listed(videos, "video")
        self._check_videos(videos)
        found = []
        for video in videos:
            clip = channels_first(frames(video))
            batch = self.processor.video_processor([clip], return_tensors="pt")
            call = {"pixel_values_videos": batch["pixel_values_videos"]}
            found += self._encode("video", call, signals, compressor)
        return found

    def _encode(
        self,
        modality: str,
        call: Mapping[str, Any],
        signals: Iterable[Signal],
        compressor: Compressor | None,
    ) -> list[VisualTokens]:
        signals = frozenset(signals)
        part = encoder_part(compressor)
        if part is not None:
            self._check_tower(part)
        for signal in signals:
            if not signal.in_llm:
                self._check_signal(signal, signal.name)
        moved = BatchFeature(dict(call)).to(self.device, self.model.dtype)
        encode = watched(self, modality, signals, encoder=part)
        with eagerly(self.base), torch.inference_mode(False), torch.no_grad():
            output = encode(**moved)
        return [feature.visual for feature in output.pooler_output]

    def encoder_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What `get_image_features` takes of an image processor's output."""
        return {name: batch[name] for name in self.image_arguments}

    def assemble(
        self,
        encoded: Sequence[Sequence[VisualTokens]],
        prompts: Sequence[str],
        *,
        without_images: bool = False,
    ) -> dict[str, Any]:
        """Inputs for ``model.generate`` from images and videos that are encoded already.

        Call it afresh for every `generate`: beam search changes the encoder outputs in place.

        Args:
            encoded: For every prompt its encoded images and videos.
            prompts: As in `prepare`.
            without_images: Leave the visual tokens out; the prompts stay the same otherwise.
        """
        self.require_language_model()
        texts = []
        for some, question in zip(encoded, questions(prompts), strict=True):
            lengths: dict[str, list[int]] = {name: [] for name in self.encoders}
            for tokens in some:
                lengths[tokens.layout.modality].append(0 if without_images else len(tokens))
            text = self.prompt(question, *map(len, lengths.values()))
            for modality, token in self.placeholder_texts.items():
                pieces = text.split(token)
                spelled = [token * length for length in lengths[modality]] + [""]
                text = "".join(a + b for a, b in zip(pieces, spelled, strict=True))
            texts.append(text)
        batch = self.processor.tokenizer(texts, padding=True, return_tensors="pt")
        return dict(batch.to(self.device)) | ({} if without_images else self._outputs(encoded))

    def take(
        self,
        inputs: Mapping[str, Any],
        encoded: Sequence[Sequence[VisualTokens]],
        rows: Sequence[int],
    ) -> dict[str, Any]:
        """Inputs for prompts that `assemble` has spelled out already.

        Args:
            inputs: What `assemble` returned.
            encoded: What it was given.
            rows: Which prompts, in any order and as often as wanted.
        """
        index = torch.tensor(rows, device=self.device)
        text = {name: value[index] for name, value in inputs.items() if isinstance(value, Tensor)}
        return text | self._outputs([encoded[row] for row in rows])

    def _outputs(self, encoded: Sequence[Sequence[VisualTokens]]) -> dict[str, Any]:
        """What the encoders return for the images and videos of some prompts."""
        features: dict[str, list[Tensor]] = {name: [] for name in self.encoders}
        for tokens in (tokens for some in encoded for tokens in some):
            feature = tokens.features.detach()  # new, so that beams and reruns tell apart
            feature.visual = tokens  # type: ignore[attr-defined]
            features[tokens.layout.modality].append(feature)
        outputs = {name: as_encoded(some) for name, some in features.items() if some}
        return {"mm_encoder_outputs": outputs} if outputs else {}

    def dummy_images(
        self, sizes: Sequence[tuple[int, int]], seed: int = 0, *, same_prompt: bool = False
    ) -> dict[str, Tensor]:
        """Random encoder inputs for images of ``sizes`` (height, width), as the processor's.

        Args:
            sizes: Of any number of images.
            seed: Of the pixels.
            same_prompt: Whether they belong to one prompt.
        """
        draw = torch.Generator("cpu").manual_seed(seed)
        side = self.base.config.vision_config.image_size
        views = max(self.layout(size, same_prompt=same_prompt).views for size in sizes)
        numbers = [len(sizes)] if same_prompt else [1] * len(sizes)
        made = {
            "pixel_values": _pixels(draw, len(sizes), views, 3, side, side),
            "image_sizes": torch.tensor(sizes, device="cpu"),
            "batch_num_images": torch.tensor(numbers, device="cpu"),
        }
        return {name: made[name] for name in self.image_arguments}

    def dummy_video(self, frames: int, seed: int = 0) -> dict[str, Tensor]:
        """Random encoder inputs for one video of ``frames`` frames."""
        draw = torch.Generator("cpu").manual_seed(seed)
        side = self.base.config.vision_config.image_size
        return {"pixel_values_videos": _pixels(draw, 1, frames, 3, side, side)}

    def decode(self, ids: Tensor, inputs: Mapping[str, Any]) -> list[str]:
        """The newly generated text of every row."""
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]


def image_sizes(call: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(height, width) in pixels of every image of an encoder call."""
    return [(int(height), int(width)) for height, width in call["image_sizes"]]


def tiny_decoder(kind: str) -> Any:
    """Configuration of a decoder of a few thousand weights; ``kind`` is a ``model_type``."""
    from transformers import AutoConfig

    return AutoConfig.for_model(
        kind,
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _pixels(draw: torch.Generator, *shape: int) -> Tensor:
    """Random pixels on the CPU in float32, whatever the defaults of PyTorch are."""
    return torch.randn(*shape, generator=draw, dtype=torch.float32, device="cpu")


def adapter_of(model: nn.Module | Adapter) -> Adapter:
    """The adapter for ``model``, found by its class or a parent class.

    Args:
        model: A model, also wrapped by ``torch.compile``, PEFT, Accelerate, `torch.nn.DataParallel`
            on one device or ``DistributedDataParallel``; or an adapter, which is returned as it is.

    Raises:
        UnknownNameError: No adapter knows the class.
        UserError: Not a model, or the model is wrapped in a way that compression cannot follow.
    """
    known = [adapters.get(name) for name in adapters.names()]
    if isinstance(model, tuple(known)):
        return model  # type: ignore[return-value]
    hosts = {host: cls for cls in known for host in cls.hosts}
    inner = unwrapped(model, hosts)
    for parent in type(inner).__mro__:
        if parent.__name__ in hosts:
            found: Adapter = hosts[parent.__name__](inner)
            return found
    raise unknown("model class with an adapter", type(inner).__name__, hosts)
