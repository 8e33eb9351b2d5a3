"""What a model family must provide so that any compressor runs in it, and how users load one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from tokenprune.compressor import Compressor, Stage, create
from tokenprune.errors import UserError, unknown
from tokenprune.observe import observing
from tokenprune.registry import adapters, strategies
from tokenprune.tokens import Signal, TokenLayout, VisualTokens

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Adapter", "load"]


class Adapter(ABC):
    """One family of Hugging Face models.

    A subclass says where things are in the model (`layouts`, `pack`, `vision_attention`); what
    users call (`prepare`, `encode`, `assemble`, `decode`) is shared.

    Attributes:
        hosts: Names of the ``transformers`` classes the adapter knows.
        encoders: Modality to the method of `base` that encodes it.
        model: The user's model, untouched.
        processor: Its processor, or None where only the model was given.
        path: Folder it was loaded from, or None.
    """

    name: ClassVar[str] = ""
    hosts: ClassVar[tuple[str, ...]] = ()
    encoders: ClassVar[Mapping[str, str]] = {"image": "get_image_features"}

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
        """The decoder."""
        return self.base.language_model

    @property
    def decoder_layers(self) -> Sequence[nn.Module]:
        """Its layers."""
        layers: Sequence[nn.Module] = self.language_model.layers
        return layers

    @property
    def vision_layers(self) -> Sequence[nn.Module]:
        """Layers of the vision tower."""
        tower = self.base.vision_tower
        layers: Sequence[nn.Module] = getattr(tower, "vision_model", tower).encoder.layers
        return layers

    def vision_attention(self, layer: int) -> nn.Module:
        """Attention module of encoder layer ``layer`` (negative counts from the end)."""
        return self.vision_layers[layer].get_submodule("self_attn")

    @property
    def vision_width(self) -> int:
        """Width of the vision tower."""
        return int(self.base.config.vision_config.hidden_size)

    @property
    def has_cls(self) -> bool:
        """Whether entry 0 of the tower's sequence is a CLS token."""
        return "clip" in self.base.config.vision_config.model_type

    @property
    def placeholders(self) -> dict[str, int]:
        """Modality to the token id that stands for one visual token."""
        return {name: int(getattr(self.base.config, f"{name}_token_id")) for name in self.encoders}

    @abstractmethod
    def layouts(self, call: Mapping[str, Any]) -> list[TokenLayout]:
        """Layout of every image of one encoder call.

        Args:
            call: The arguments the encoder method was called with.
        """

    @abstractmethod
    def pack(self, maps: list[Tensor], call: Mapping[str, Any]) -> list[Tensor]:
        """Per-view score maps of every image, packed exactly like its features.

        Args:
            maps: For every image (views, patches).
            call: As in `layouts`.

        Returns:
            For every image (N,), NaN at separators.
        """

    def describe(
        self, call: Mapping[str, Any], features: list[Tensor], maps: Mapping[Signal, Tensor]
    ) -> list[VisualTokens]:
        """What is known of every image of one encoder call.

        Args:
            call: The arguments the encoder method was called with.
            features: For every image (N, D).
            maps: Signal to (all views, patches).
        """
        layouts = self.layouts(call)
        views = [layout.views for layout in layouts]
        packed = {
            signal: self.pack(list(values.split(views)), call) for signal, values in maps.items()
        }
        return [
            VisualTokens(
                layout=layout,
                # A second tensor on the same memory: the record must not hold its own carrier.
                features=feature.detach(),
                signals={signal: values[index] for signal, values in packed.items()},
                fingerprint=self.fingerprint(call, index, sum(views[:index])),
            )
            for index, (layout, feature) in enumerate(zip(layouts, features, strict=True))
        ]

    def fingerprint(self, call: Mapping[str, Any], image: int, first_view: int) -> Tensor:
        """Some pixels of the image's first view, the same in every batch."""
        pixels = call["pixel_values"]
        view = pixels[image, 0] if pixels.ndim == 5 else pixels[first_view]
        sample: Tensor = view[..., ::7, ::7]
        return sample

    def check(self, compressor: Compressor) -> None:
        """Raise `UserError` if the model lacks what ``compressor`` needs."""
        for part in compressor.stages():
            if part.stage is Stage.ENCODER:
                raise UserError(f"{part.name} acts inside the encoder, which is not supported yet.")
            for signal in part.needs:
                depth = len(self.decoder_layers if signal.in_llm else self.vision_layers)
                if signal.needs_cls and not self.has_cls:
                    raise UserError(
                        f"{part.name} needs the attention of a CLS token, which the "
                        f"{self.base.config.vision_config.model_type} tower of this model does "
                        f"not have. Strategies that work here: {', '.join(self._compatible())}."
                    )
                if not -depth <= signal.layer < depth:
                    raise UserError(
                        f"{part.name} asks for layer {signal.layer} of the "
                        f"{'decoder' if signal.in_llm else 'vision tower'}, which has {depth}."
                    )
            for cut in part.cuts:
                if not 0 < cut < len(self.decoder_layers):
                    raise UserError(
                        f"{part.name} cuts in front of decoder layer {cut}; this model has layers "
                        f"0 to {len(self.decoder_layers) - 1}."
                    )

    def _compatible(self) -> list[str]:
        fine = []
        for name in strategies.names():
            signals = create(name, retention=0.5).needs
            if self.has_cls or not any(signal.needs_cls for signal in signals):
                fine.append(name)
        return fine

    # -- what users call -------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where inputs belong."""
        device: torch.device = self.model.device
        return device

    def prompt(self, question: str, images: int) -> str:
        """``question`` in the model's chat template, behind ``images`` images.

        A question that already has one placeholder per image is taken as it is.

        Raises:
            UserError: It has placeholders, but not as many as images.
        """
        token = self.image_token
        found = question.count(token)
        if found and found != images:
            raise UserError(
                f"the prompt {question[:60]!r} has {found} {token!r} placeholders but {images} "
                "images; write one per image, or none to have them put in front."
            )
        if found:
            return question
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
            message = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(message, add_generation_prompt=True)
            return str(text)
        return f"{token}\n" * images + question

    @property
    def image_token(self) -> str:
        """The text of one image placeholder."""
        return str(self.processor.image_token)

    def prepare(
        self,
        images: Sequence[Image | Sequence[Image]] | None,
        prompts: Sequence[str],
    ) -> Any:
        """Inputs for ``model(**inputs)`` and ``model.generate(**inputs)``.

        Args:
            images: For every prompt an image or a list of images (empty for text only).
            prompts: Questions, or full prompts with placeholders.

        Raises:
            UserError: As many prompts as image lists are needed, and placeholders must match.
        """
        lists = _nested(images, len(prompts))
        texts = [self.prompt(q, len(some)) for q, some in zip(prompts, lists, strict=True)]
        flat = [image.convert("RGB") for some in lists for image in some]
        batch = self.processor(images=flat or None, text=texts, padding=True, return_tensors="pt")
        return batch.to(self.device, self.model.dtype)

    def encode(self, images: Sequence[Image], signals: Iterable[Signal] = ()) -> list[VisualTokens]:
        """Run the vision tower once over ``images``.

        Returns:
            For every image its packed features with layout and ``signals``; hand them to
            `assemble` as often as you like.
        """
        batch = self.processor.image_processor(
            [image.convert("RGB") for image in images], return_tensors="pt"
        ).to(self.device, self.model.dtype)
        with observing(self, frozenset(signals)), torch.inference_mode(False), torch.no_grad():
            output = self.base.get_image_features(**self.encoder_inputs(batch))
        return [feature.visual for feature in output.pooler_output]

    def encoder_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What `get_image_features` takes of an image processor's output."""
        return {name: batch[name] for name in ("pixel_values", "image_sizes")}

    def assemble(
        self, encoded: Sequence[Sequence[VisualTokens]], prompts: Sequence[str]
    ) -> dict[str, Any]:
        """Inputs for ``model.generate`` from images that are encoded already.

        Call it afresh for every `generate`: beam search changes the encoder outputs in place.

        Args:
            encoded: For every prompt its encoded images.
            prompts: As in `prepare`.
        """
        texts = []
        for some, question in zip(encoded, prompts, strict=True):
            pieces = self.prompt(question, len(some)).split(self.image_token)
            spelled = [self.image_token * len(tokens) for tokens in some] + [""]
            texts.append("".join(a + b for a, b in zip(pieces, spelled, strict=True)))
        batch = self.processor.tokenizer(texts, padding=True, return_tensors="pt")
        features = []
        for tokens in (tokens for some in encoded for tokens in some):
            feature = tokens.features.detach()  # a new tensor, so that beams and reruns tell apart
            feature.visual = tokens  # type: ignore[attr-defined]
            features.append(feature)
        inputs = dict(batch.to(self.device))
        if features:
            output = BaseModelOutputWithPooling()
            output.pooler_output = features  # type: ignore[assignment]
            inputs["mm_encoder_outputs"] = {"image": output}
        return inputs

    def decode(self, ids: Tensor, inputs: Mapping[str, Any]) -> list[str]:
        """The newly generated text of every row."""
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]


def load(
    name: str,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    **options: Any,
) -> Adapter:
    """Load a model and its processor.

    Args:
        name: An embedded testbed (``testbed-next``), a Hub id such as
            ``llava-hf/llava-v1.6-vicuna-7b-hf``, or a local folder.
        device: Where to put it; None leaves it to ``device_map`` or the CPU.
        dtype: ``float32``, ``bfloat16``, ... or ``auto`` for that of the checkpoint.  The testbeds
            are stored in half precision and run in float32 unless told otherwise.
        **options: For ``from_pretrained``: ``device_map``, ``quantization_config``,
            ``attn_implementation``, ``revision``, ...

    Raises:
        UserError: Unknown name, a model class without an adapter, bad dtype, or a device that is
            not there.
    """
    import transformers

    from tokenprune.models import testbed

    dtype, device = _dtype(dtype), _device(device)
    embedded = name in testbed.names()
    source = testbed.path(name) if embedded else Path(name)
    where = str(source) if embedded or source.is_dir() else name
    if embedded and dtype == "auto":
        dtype = torch.float32
    if "/" not in where and not source.is_dir():
        raise unknown("model", name, testbed.names())
    try:
        config = transformers.AutoConfig.from_pretrained(
            where, **{key: options[key] for key in ("revision", "token") if key in options}
        )
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"cannot load {name!r}: {first} Give an embedded testbed "
            f"({', '.join(testbed.names())}), a local folder or a Hub id."
        ) from error
    hosts = {host: adapters.get(a) for a in adapters.names() for host in adapters.get(a).hosts}
    kind = (config.architectures or [type(config).__name__])[0]
    if kind not in hosts:
        raise unknown("model class with an adapter", kind, hosts)
    model = getattr(transformers, kind).from_pretrained(where, dtype=dtype, **options).eval()
    if device is not None:
        model = model.to(device)
    processor = transformers.AutoProcessor.from_pretrained(where)
    processor.tokenizer.padding_side = "left"  # what batched generation needs
    found: Adapter = hosts[kind](model, processor, source if Path(where).is_dir() else None)
    return found


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    floats = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in floats:
        raise unknown("dtype", dtype, [*floats, "auto"])
    return floats[dtype]


def _device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise unknown("device", str(device), ["cpu", "cuda", "cuda:0", "mps"]) from None
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device {str(device)!r} was asked for, but this machine has no CUDA device that "
            "PyTorch can see; use --device cpu."
        )
    return wanted


def _nested(images: Sequence[Any] | None, prompts: int) -> list[list[Any]]:
    lists = [
        list(some) if isinstance(some, Sequence) else [some]
        for some in (images if images is not None else [[]] * prompts)
    ]
    if len(lists) != prompts:
        raise UserError(f"{len(lists)} image lists for {prompts} prompts; give one per prompt.")
    return lists
