"""Runs an encoder compressor inside the vision encoder."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenprune.adapter import position_table
from tokenprune.attention import key_vectors
from tokenprune.budget import budget
from tokenprune.encoder import EncoderCompressor, EncoderTokens
from tokenprune.engine.guard import bypassed
from tokenprune.layout import TokenLayout
from tokenprune.offload import replaced_forward, resident
from tokenprune.ops.merging import merge_weighted, spread
from tokenprune.precision import without_autocast
from tokenprune.tokens import Encoding
from tokenprune.untouched import untouched

if TYPE_CHECKING:
    from tokenprune.adapter import Adapter

__all__ = [
    "Tower",
    "TowerRun",
    "dry_run",
    "running",
]


@dataclass(eq=False)
class Tower:
    """One run of the vision encoder on V views.

    Attributes:
        groups: For every hidden state (the input of layer 0, then the output of each layer),
            (V, T) index in it of each of the T entries of a full view, -1 for a dropped entry.
        biases: For every layer, (V, n) bias of the attention logits of its keys, or None.
        attended, processed: For every layer, the number of entries in its attention and its MLP.
        size: (V, n) number of patches that each entry stands for, None while all are 1.
        key_width: Width of the keys that the method compares.
        by: `repr` of the method.
    """

    groups: list[Tensor] = field(default_factory=list)
    biases: list[Tensor | None] = field(default_factory=list)
    attended: list[int] = field(default_factory=list)
    processed: list[int] = field(default_factory=list)
    size: Tensor | None = None
    key_width: int = 0
    by: str = ""

    def spread(self, values: Tensor, layer: int | None) -> Tensor:
        """(V, T, ...) values of all T entries of a full view.

        Args:
            values: (V, n, ...) values of the entries of ``layer``.
            layer: Index of the layer; None for the output of the last one.
        """
        return spread(values, self.groups[-1 if layer is None else layer % len(self.attended)])

    def clusters(self, layouts: list[TokenLayout], shape: tuple[int, int]) -> list[Tensor]:
        """For every image or video, (N,) cluster of each token on the CPU, -1 at separators.

        Args:
            layouts: Layouts of the encoded images or videos.
            shape: (rows, columns) of the patches of a full view.
        """
        group, (height, width) = self.groups[-1], shape
        cells = group[:, -height * width :].unflatten(1, shape).cpu()
        found, first = [], 0
        for layout in layouts:
            rows, cols = layout.view_shape  # smaller than ``shape`` if the model pools
            row = (2 * layout.row + 1) * height // (2 * rows)
            col = (2 * layout.col + 1) * width // (2 * cols)
            ids = cells[first : first + layout.views][layout.view, row, col]
            ids = torch.where(ids < 0, -1, ids + layout.view * group.shape[1])
            found.append(ids.masked_fill(layout.is_separator, -1))
            first += layout.views
        return found

    @property
    def encoding(self) -> Encoding:
        """The record of this run that `VisualTokens` carry."""
        return Encoding(self.by, tuple(self.attended), tuple(self.processed), self.key_width)


@contextmanager
def running(
    adapter: Adapter,
    compressor: EncoderCompressor | None,
    call: Mapping[str, Any],
    modality: str,
) -> Iterator[Tower | None]:
    """While open, the vision encoder runs under ``compressor``.

    Hooks and replaced ``forward`` methods are set on the instances, and removed at the end.

    Args:
        adapter: The model.
        compressor: The method, or None to change nothing.
        call: Arguments of the encoder method that is about to run.
        modality: Key of `Adapter.encoders`.

    Yields:
        The record of the run, complete at its end; None without a method.
    """
    if compressor is None:
        yield None
        return
    full = adapter.layouts(call, modality)[0].view_sizes[0]
    session = TowerRun(adapter, compressor, budget(full, compressor.retention), call)
    tower = adapter.vision_tower
    with ExitStack() as stack:
        for handle in (
            tower.register_forward_pre_hook(session.enter, with_kwargs=True),
            tower.register_forward_hook(session.leave),
        ):
            stack.callback(handle.remove)
        for index, layer in enumerate(adapter.vision_layers):
            stack.enter_context(replaced_forward(layer, session.layer(index, layer)))
        if session.shape != adapter.view_shape:  # the position table is interpolated
            stack.enter_context(resident(position_table(adapter)))
        yield session.tower


def dry_run(
    adapter: Adapter, compressor: EncoderCompressor, layout: TokenLayout, seed: int = 0
) -> Tower:
    """A run on the views of one image without weights, on random states and keys."""
    session = TowerRun(adapter, compressor, budget(layout.view_sizes[0], compressor.retention), {})
    rows, cols = adapter.view_shape
    tall, wide = adapter.facts.vision.patch_size
    pixels = torch.zeros(layout.views, 1, rows * tall, cols * wide, device="cpu")
    session.enter(None, (pixels,), {})
    tower, draw = session.tower, torch.Generator("cpu").manual_seed(seed)
    entries = adapter.facts.vision.prefix_tokens + session.shape[0] * session.shape[1]
    width = adapter.facts.vision.hidden // adapter.facts.vision.heads  # a method's cost needs it
    states = torch.randn(
        layout.views, entries, width, generator=draw, dtype=torch.float32, device="cpu"
    )
    for index in range(len(adapter.vision_layers)):
        tower.attended.append(states.shape[1])
        states = session._reduced(index, states, functools.partial(torch.clone, states))
        tower.processed.append(states.shape[1])
    return tower


class TowerRun:
    """The hooks of one run."""

    def __init__(
        self, adapter: Adapter, compressor: EncoderCompressor, target: int, call: Mapping[str, Any]
    ) -> None:
        self.adapter, self.compressor, self.target = adapter, compressor, target
        self.depth = adapter.used_vision_layers(call)
        self.shape = compressor.grid(adapter.view_shape, target)
        self.tower = Tower(by=repr(compressor))

    def enter(
        self, module: nn.Module | None, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        """In front of the vision encoder: resize the views."""
        pixels: Tensor = args[0] if args else kwargs["pixel_values"]
        prefix, (rows, cols) = self.adapter.facts.vision.prefix_tokens, self.adapter.view_shape
        place = torch.arange(prefix, device=pixels.device)
        height, width = self.shape
        row = (2 * torch.arange(rows, device=pixels.device) + 1) * height // (2 * rows)
        col = (2 * torch.arange(cols, device=pixels.device) + 1) * width // (2 * cols)
        cell = prefix + (row[:, None] * width + col).flatten()
        self.tower.groups.append(torch.cat([place, cell]).repeat(len(pixels), 1))
        if self.shape == self.adapter.view_shape:
            return None
        tall, wide = self.adapter.facts.vision.patch_size
        small = F.interpolate(
            pixels.float(), (height * tall, width * wide), mode="bilinear", antialias=True
        ).to(pixels.dtype)
        changed = {**kwargs, "interpolate_pos_encoding": True}
        if args:
            return (small, *args[1:]), changed
        return args, {**changed, "pixel_values": small}

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After the vision encoder: spread its output over the entries of a full view."""
        if len(self.tower.attended) < self.depth:
            raise bypassed("the layers of the vision encoder")
        states = [
            None if state is None else spread(state, group)
            for state, group in zip(output.hidden_states or (), self.tower.groups, strict=False)
        ]
        output.hidden_states = tuple(states) or None
        output.last_hidden_state = spread(output.last_hidden_state, self.tower.groups[-1])
        return output

    def layer(self, index: int, layer: nn.Module) -> Callable[..., Tensor]:
        """The ``forward`` of an encoder layer that merges between attention and MLP."""

        def forward(hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
            tower = self.tower
            bias = None if tower.size is None else self.compressor.bias(tower.size)
            tower.biases.append(bias)
            tower.attended.append(hidden_states.shape[1])
            mask = None if bias is None else bias[:, None, None].to(hidden_states)
            with self.adapter.tap(index) as tapped:
                states: Tensor = self.adapter.vision_block(
                    layer,
                    hidden_states,
                    mask,
                    lambda states: self._reduced(index, states, lambda: key_vectors(tapped)),
                    **kwargs,
                )
            tower.processed.append(states.shape[1])
            return states

        return forward

    def _reduced(self, index: int, states: Tensor, keys_of: Callable[[], Tensor]) -> Tensor:
        """(V, m, D) the reduced ``states`` (V, n, D) between attention and MLP of a layer.

        ``keys_of`` returns the keys (V, n, d) of the layer.  It is called only if they are needed.
        """
        tower, group = self.tower, self.tower.groups[-1]
        size = tower.size
        size = states.new_ones(states.shape[:2], dtype=torch.float32) if size is None else size
        size, reduction = size.to(states.device), None
        if index < self.depth and self.compressor.reduces:
            keys = keys_of()
            tower.key_width = keys.shape[-1]
            tokens = EncoderTokens(
                layer=index,
                layers=self.depth,
                prefix=self.adapter.facts.vision.prefix_tokens,
                patches=self.shape[0] * self.shape[1],
                target=self.target,
                states=states.detach(),
                keys=keys,
                size=size,
            )
            who = self.compressor.name or type(self.compressor).__name__
            shown = {"states": states, "keys": keys, "size": size}
            with torch.no_grad(), without_autocast(states.device), untouched(who, shown):
                reduction = self.compressor.reduce(tokens)
        if reduction is None:
            tower.groups.append(group)
            return states
        moved = reduction.group.to(group.device)
        tower.groups.append(torch.where(group < 0, -1, moved.gather(1, group.clamp(min=0))))
        where = reduction.group.to(states.device)
        states, tower.size = merge_weighted(states, size, where, reduction.left)
        return states
