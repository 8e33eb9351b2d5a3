"""The cost of a method inside the vision encoder, without and with the encoder's own layers.

`Steps` runs only what the method adds to the encoder, on random states of the real shape: resizing
the views, keys, matching and merging in every layer, and the expansion back to full views.  It
leaves out attention and MLP.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaNextConfig
from transformers.modeling_outputs import BaseModelOutput

from tokenprune.adapter import Adapter
from tokenprune.attention import Projections, key_vectors
from tokenprune.budget import budget
from tokenprune.cost.arithmetic import DecoderShape
from tokenprune.encoder import EncoderCompressor
from tokenprune.engine.tower import Tower, TowerRun, running
from tokenprune.experiments.benchmarks.record import Figure
from tokenprune.experiments.benchmarks.shapes import (
    VISION_HEADS,
    VISION_LAYERS,
    VISION_WIDTH,
    decoder_config,
    random_model,
    tokens_at,
)
from tokenprune.experiments.common.timing import peak_memory, timed
from tokenprune.layout import TokenLayout
from tokenprune.tokens import VisualTokens

NO_DECODER = DecoderShape(layers=1, hidden=8, intermediate=8, heads=1, kv_heads=1, head_dim=8)
PATCH = 14
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}


def clip(side: int, device: str, dtype: torch.dtype, **sizes: int) -> Adapter:
    """A LLaVA-NeXT with random weights: CLIP ViT-L/14 and a decoder of negligible size.

    Args:
        side: Rows and columns of patches in a view; 24 are 336 pixels.
        device, dtype: Of the weights.
        **sizes: Fields of `CLIPVisionConfig` that differ from ViT-L/14.
    """
    usual: dict[str, Any] = {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 4 * VISION_WIDTH,
        "num_hidden_layers": VISION_LAYERS,
    }
    pixels = side * PATCH
    vision = CLIPVisionConfig(
        **{**usual, **sizes},
        num_attention_heads=VISION_HEADS,
        image_size=pixels,
        patch_size=PATCH,
        projection_dim=8,
    )
    config = LlavaNextConfig(
        text_config=decoder_config(NO_DECODER),
        vision_config=vision,
        image_token_index=63,
        image_grid_pinpoints=[[2 * pixels, 2 * pixels]],
        image_seq_length=side**2,
        vision_feature_layer=-2,
    )
    return random_model(config, device, dtype)


class Steps:
    """What a method adds to the vision encoder, on the views of one image or video."""

    def __init__(
        self, adapter: Adapter, compressor: EncoderCompressor, layout: TokenLayout, width: int
    ) -> None:
        """Draw the inputs; ``width`` is that of the language model."""
        self.adapter, self.compressor, self.layout = adapter, compressor, layout
        (rows, columns), (tall, wide) = adapter.view_shape, adapter.facts.vision.patch_size
        weight = next(adapter.vision_tower.parameters())
        draw = functools.partial(torch.randn, device=weight.device, dtype=weight.dtype)
        self.pixels = draw(layout.views, 3, rows * tall, columns * wide)
        self.states, self.query, self.key = (
            draw(layout.views, adapter.facts.vision.tokens, adapter.facts.vision.hidden)
            for _ in range(3)
        )
        self.tokens = tokens_at(
            layout, frozenset(), width, dtype=weight.dtype, device=str(weight.device)
        )

    def __call__(self) -> Tower:
        """Run the steps of all layers once."""
        session, states = self._begin()
        seen = [states]
        for index in range(len(self.adapter.vision_layers)):
            seen.append(self._layer(session, index, seen[-1]))
        output = BaseModelOutput(last_hidden_state=seen[-1], hidden_states=tuple(seen))
        session.leave(self.adapter.vision_tower, (), output)
        return session.tower

    def first(self) -> None:
        """Run the first layer and keep no result, to measure the working memory."""
        session, states = self._begin()
        self._layer(session, 0, states)

    def shown(self, tower: Tower) -> VisualTokens:
        """The visual tokens that the method gets in front of the language model after a run."""
        (clusters,) = tower.clusters([self.layout], self.adapter.view_shape)
        return replace(self.tokens, clusters=clusters, encoding=tower.encoding)

    def _begin(self) -> tuple[TowerRun, Tensor]:
        target = budget(self.layout.view_sizes[0], self.compressor.retention)
        session = TowerRun(self.adapter, self.compressor, target, {})
        session.enter(None, (self.pixels,), {})
        count = self.adapter.facts.vision.prefix_tokens + session.shape[0] * session.shape[1]
        return session, self.states[:, :count]

    def _layer(self, session: TowerRun, index: int, states: Tensor) -> Tensor:
        count = states.shape[1]
        query, key = self.query[:, :count], self.key[:, :count]
        tapped = Projections(self.adapter.facts.vision.heads, 1.0, query, key)
        session.tower.attended.append(count)
        states = session._reduced(index, states, lambda: key_vectors(tapped))
        session.tower.processed.append(states.shape[1])
        return states


def figures(
    compressors: Sequence[EncoderCompressor],
    layout: TokenLayout,
    width: int,
    adapter: Adapter,
    prefill: tuple[float, float, float],
    repeats: int,
    tell: Callable[[str], None],
) -> Iterator[Figure]:
    """Shares of a prefill, and the cost of the whole vision encoder with and without a method.

    Args:
        compressors: Methods that act inside the vision encoder.
        layout: Of the image.
        width: Of the language model.
        adapter: Of the model with the vision encoder.
        prefill: Its seconds, its bytes without the weights, and the bytes of the weights.
        repeats: Timed runs of each figure.
        tell: Called with what is being measured.
    """
    (seconds, held, weights), device = prefill, str(adapter.device)
    measured = functools.partial(timed, repeats=repeats, device=device)
    tell("vision encoder")
    whole: Any = None
    for compressor in compressors:
        steps = Steps(adapter, compressor, layout, width)
        if whole is None:  # the same pixels serve all methods
            whole = functools.partial(_run, adapter, steps.pixels, None)
            plain, peak = measured(whole, warmup=1).median, peak_memory(whole, device)
        name = compressor.name
        tell(name)
        work, select = steps, functools.partial(compressor, steps.shown(steps()))
        inside, after = (measured(one, warmup=0).median for one in (work, select))
        memory = max(peak_memory(one, device) for one in (steps.first, select))
        under = functools.partial(_run, adapter, steps.pixels, compressor)
        taken, most = measured(under, warmup=1).median, peak_memory(under, device)
        yield Figure(
            case=name, figure="time / prefill", value=(inside + after) / seconds, better="low",
            note=f"in the encoder {1000 * inside:.3g} ms, after it {1000 * after:.3g} ms",
        )  # fmt: skip
        yield Figure(
            case=name, figure="memory / prefill", value=memory / (held + weights), better="low",
            note=f"{memory / 2**20:.3g} MiB",
        )  # fmt: skip
        yield Figure(
            case=name, figure="memory / all but weights", value=memory / held, better="low"
        )
        yield Figure(
            case=name, figure="tower's time / plain", value=taken / plain, better="low",
            note=f"{1000 * taken:.4g} of {1000 * plain:.4g} ms",
        )  # fmt: skip
        yield Figure(
            case=name, figure="tower's memory / plain", value=most / peak, better="low",
            note=f"{most / 2**20:.4g} of {peak / 2**20:.4g} MiB, without weights",
        )  # fmt: skip


@torch.no_grad()
def _run(adapter: Adapter, pixels: Tensor, compressor: EncoderCompressor | None) -> None:
    """Run the whole vision encoder, as the model calls it."""
    rows, columns = pixels.shape[-2:]
    call = {"pixel_values": pixels[None], "image_sizes": torch.tensor([[2 * rows, 2 * columns]])}
    with running(adapter, compressor, call, "image"):
        adapter.vision_tower(pixels, output_hidden_states=True)
