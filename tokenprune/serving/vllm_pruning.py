"""Compresses images inside a vLLM server, between its vision encoder and its language model.

The server reserves the place of an image in the prompt before it encodes it.  `Plan` tells it the
number of tokens that will stay, from the size of the image alone.  `ServerPruner` runs the method
on what the vision encoder returned.  Both read the spec from the server's own configuration, never
from a request.  The module does not import vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.adapter import Adapter, adapter_of
from tokenprune.attention import Projections, first_arguments
from tokenprune.compressor import Compressor
from tokenprune.encoder import encoder_part
from tokenprune.engine.vision import COMPUTED, describe
from tokenprune.errors import UserError
from tokenprune.layout import moved
from tokenprune.serving import check_counted, check_served, served
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

__all__ = ["KEY", "OTHERWISE", "Plan", "ServerPruner", "planned"]

KEY = "tokenprune"
"""The entry of the config that holds the spec."""

OTHERWISE = "encode the images with tokenprune.serving.image_embeds, and send the embeddings"

Seen = Callable[[], dict[Signal, Tensor]]


def planned(config: Any) -> Plan | None:
    """The plan of a server whose config names a spec; None for a server that compresses nothing.

    Raises:
        UserError: The entry of the config is not a text, or as `Plan`.
    """
    spec = getattr(config, KEY, None)
    if spec is None:
        return None
    if not isinstance(spec, str):
        raise UserError(
            f"{KEY} in the config must be a spec such as 'fastervlm@0.25', got {spec!r}."
        )
    return Plan(config, spec)


class Plan:
    """What a server does with images: the method, and how many visual tokens it keeps.

    Args:
        config: The model's ``transformers`` config.
        spec: The spec.

    Attributes:
        compressor: The method.
        adapter: The model on the ``meta`` device, which describes images and computes nothing.

    Raises:
        UserError: The method cannot be served (`served`), cannot run in the model, acts inside the
            vision encoder, keeps a number of tokens that depends on the content, or needs a signal
            that the server does not compute.
    """

    def __init__(self, config: Any, spec: str) -> None:
        self.compressor: Compressor = served(spec)
        self.adapter: Adapter = described(config)
        check_served(self.adapter, self.compressor)
        if encoder_part(self.compressor) is not None:
            raise UserError(
                f"{self.compressor.label} acts inside the vision encoder, which the server runs "
                f"itself; {OTHERWISE}."
            )
        check_counted(self.adapter, self.compressor)
        for signal in sorted(self.compressor.needs, key=repr):
            self._check(signal)

    def _check(self, signal: Signal) -> None:
        name = self.compressor.label
        if signal.info.source == "projector":
            return
        if not signal.in_vision_layer:
            raise UserError(f"{name} needs {signal.name}, which a server does not compute.")
        # vLLM loads no layer beyond the one whose output the language model receives.
        index, loaded = signal.layer % self.adapter.facts.vision.layers, self.loaded_layers
        if index >= loaded:
            raise UserError(
                f"{name} needs {signal.name} of layer {index} of the vision encoder, but a server "
                f"loads only layers 0 to {loaded - 1}, up to the one whose output the language "
                f"model receives; {OTHERWISE}."
            )

    @property
    def loaded_layers(self) -> int:
        """Number of layers of the vision encoder that vLLM loads."""
        return self.adapter.used_vision_layers({})

    def kept(self, image_size: tuple[int, int], full: int) -> int:
        """Number of visual tokens that stay of an image of (height, width) pixels.

        Args:
            image_size: Size before any resizing.
            full: Number of tokens of the image that the server itself has computed.

        Raises:
            UserError: The server makes another number of tokens of the image than the adapter.
        """
        layout = self.adapter.layout(image_size)
        found = self.compressor.count(layout)
        if len(layout) != full or found is None:
            raise UserError(
                f"the server makes {full} tokens of an image of {image_size[1]}x{image_size[0]} "
                f"pixels, but transformers makes {len(layout)}; this image cannot be compressed."
            )
        return found


class ServerPruner:
    """Runs a method on the images that a model of vLLM encodes.

    Args:
        plan: What to do.
        model: The model, with ``vision_tower`` and ``multi_modal_projector`` as in
            ``transformers``, except that one module projects queries, keys and values
            (``qkv_proj``).

    Raises:
        UserError: The method needs a signal whose heads are divided between devices.
    """

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        self.compressor, self.adapter = plan.compressor, plan.adapter
        self.parts: Adapter = type(plan.adapter)(model)
        self.vision = plan.adapter.facts.vision
        self.attention = {
            signal.layer: self._attention(signal)
            for signal in self.compressor.needs
            if signal.in_vision_layer
        }

    def _attention(self, signal: Signal) -> Any:
        """The attention module that provides ``signal``."""
        layer = self.parts.vision_layers[signal.layer % self.vision.layers]
        attention: Any = layer.get_submodule("self_attn")
        if getattr(attention, "tp_size", 1) > 1:
            raise UserError(
                f"{self.compressor.label} needs {signal.name}, but the heads of the vision encoder "
                "are divided between devices; start the server with --mm-encoder-tp-mode data."
            )
        return attention

    @contextmanager
    def watching(self) -> Iterator[Seen]:
        """While open, keep what the signals are computed from.

        Yields:
            A function that returns every signal: (all views, patches, ...).
        """
        with ExitStack() as stack:
            tapped = {
                layer: stack.enter_context(_projections(attention))
                for layer, attention in self.attention.items()
            }
            inputs = stack.enter_context(first_arguments(self.parts.projector))

            def seen() -> dict[Signal, Tensor]:
                return {one: self._computed(one, tapped, inputs) for one in self.compressor.needs}

            yield seen

    def _computed(
        self, signal: Signal, tapped: Mapping[int, Projections], inputs: Sequence[Tensor]
    ) -> Tensor:
        if signal.layer not in tapped or not signal.in_vision_layer:
            return self.parts.unprojected(torch.cat([*inputs]))
        compute = COMPUTED[signal.resolve(self.vision.has_cls).name]
        return compute(tapped[signal.layer])[:, self.vision.prefix_tokens :]

    def pruned(
        self, packed: Sequence[Tensor], inputs: Mapping[str, Any], seen: Seen
    ) -> tuple[Tensor, ...]:
        """What stays of every image.

        Args:
            packed: (N, D) features of every image, as the model returns them.
            inputs: The arguments of the model: ``pixel_values``, one tensor (views, 3, height,
                width) or (3, height, width) for each image, and perhaps ``image_sizes``.
            seen: From `watching`.

        Returns:
            (M, D) of every image.
        """
        with torch.no_grad():
            records = self._records(packed, inputs, seen())
            return tuple(self._kept(one) for one in records)

    def _records(
        self, packed: Sequence[Tensor], inputs: Mapping[str, Any], maps: dict[Signal, Tensor]
    ) -> list[VisualTokens]:
        views = [one if one.ndim == 4 else one[None] for one in inputs["pixel_values"]]
        call = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        call["pixel_values"] = torch.cat(views)
        if "image_sizes" in call:
            call["image_sizes"] = call["image_sizes"].cpu()
        layouts = self.adapter.layouts(call, "image")
        # A request with several images pads all of them to the same number of views.
        starts = torch.tensor([0, *map(len, views)], device="cpu").cumsum(0).tolist()
        own = torch.cat(
            [
                torch.arange(start, start + layout.views, device="cpu")
                for start, layout in zip(starts, layouts, strict=False)
            ]
        )
        call["pixel_values"] = call["pixel_values"][own]
        maps = {signal: values[own] for signal, values in maps.items()}
        records = describe(self.adapter, call, [*packed], maps, "image", layouts=layouts)
        if any(signal.name == "unprojected" for signal in maps):
            records = [replace(one, projector=self.parts.project) for one in records]
        return records

    def _kept(self, tokens: VisualTokens) -> Tensor:
        chosen = self.compressor(tokens)
        if chosen.features is not None:
            return chosen.features
        return tokens.features[moved(chosen.keep, tokens.features.device)]


@contextmanager
def _projections(attention: Any) -> Iterator[Projections]:
    """While open, keep the queries and keys of an attention module with ``qkv_proj``."""
    tapped = Projections(heads=int(attention.num_heads), scale=float(attention.scale))

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        joined: Tensor = output[0] if isinstance(output, tuple) else output
        tapped.query, tapped.key, _ = joined.detach().chunk(3, -1)

    handle = attention.qkv_proj.register_forward_hook(keep)
    try:
        yield tapped
    finally:
        handle.remove()


def described(config: Any) -> Adapter:
    """The adapter of a model with ``config`` on the ``meta`` device, which has no weights.

    Raises:
        UnknownNameError: There is no adapter for the model.
    """
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    return adapter_of(model)
