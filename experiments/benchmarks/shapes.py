"""Models and visual tokens of the measured shapes."""

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

from tokenprune.adapter import Adapter, adapter_of
from tokenprune.cost.arithmetic import DecoderShape
from tokenprune.experiments.common.timing import timed
from tokenprune.layout import TokenLayout
from tokenprune.models import testbed
from tokenprune.models.llava_next import LlavaNext
from tokenprune.pipeline import Pipeline, encoder_outputs
from tokenprune.signals import SIGNALS, Signal
from tokenprune.synthetic import sample_tokens
from tokenprune.tokens import VisualTokens

LLAVA_NEXT_7B = DecoderShape(
    layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, head_dim=128
)
VISION_WIDTH, VISION_LAYERS, VISION_HEADS, PREFIX = 1024, 24, 16, 1  # CLIP ViT-L/14 at 336 pixels
FIVE_VIEWS = TokenLayout.anyres((2, 2), (24, 24), (0, 48, 0, 48))
"""2880 patch tokens and 48 separators: a square image in LLaVA-NeXT."""
TEXT = 64  # tokens of a prompt that are not visual


def dtype_of(device: str) -> torch.dtype:
    """bfloat16 on a GPU; on the CPU the one of float32 and bfloat16 with the faster matmul."""
    if device.startswith("cuda"):
        return torch.bfloat16
    taken = {}
    for dtype in (torch.float32, torch.bfloat16):
        one, other = torch.ones(256, 4096, dtype=dtype), torch.ones(4096, 4096, dtype=dtype)
        taken[dtype] = timed(functools.partial(torch.mm, one, other), repeats=3).median
    return min(taken, key=lambda dtype: taken[dtype])


def decoder_config(shape: DecoderShape) -> LlamaConfig:
    """A Llama of ``shape`` with a small vocabulary, as logits are not measured."""
    return LlamaConfig(
        vocab_size=64,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=65536,
    )


def llava(shape: DecoderShape, device: str, dtype: torch.dtype) -> Adapter:
    """A LLaVA-NeXT with random weights: a tiny vision encoder and a decoder of ``shape``."""
    config = LlavaNextConfig(**LlavaNext.tiny().config.to_dict())
    config.text_config = decoder_config(shape)
    return random_model(config, device, dtype)


def random_model(config: LlavaNextConfig, device: str, dtype: torch.dtype) -> Adapter:
    """A LLaVA-NeXT of ``config`` with random weights."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a float32 copy of a large model may not fit
    try:
        with torch.device(device):
            model = LlavaNextForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(usual)
    return adapter_of(model)


def larger_testbed(shape: DecoderShape) -> Pipeline:
    """The testbed's processor and vision encoder with a decoder of ``shape``, all random."""
    from transformers import AutoProcessor

    folder = testbed.path("testbed-next")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    vocabulary = config.text_config.vocab_size
    config.text_config = decoder_config(shape)
    config.text_config.vocab_size = vocabulary
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(config).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    processor.tokenizer.padding_side = "left"
    return Pipeline(model, processor)


def tokens_at(
    layout: TokenLayout,
    needs: frozenset[Signal],
    width: int,
    *,
    vision: int = VISION_WIDTH,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> VisualTokens:
    """Random visual tokens with features and signals as wide as in the model."""
    axes = {
        "hidden": width, "kv_width": width, "vision_width": vision, "projector_width": vision,
        "joint_width": vision, "vision_head_width": vision // VISION_HEADS,
        "heads": LLAVA_NEXT_7B.heads,
    }  # fmt: skip
    widths = {
        name: axes[info.shape[-1]] for name, info in SIGNALS.items() if info.shape[-1] in axes
    }
    made = sample_tokens(needs, layout, dtype=dtype, text=TEXT, widths=widths | {"features": width})
    return replace(
        made,
        layout=layout.to(device),
        features=made.features.to(device),
        signals={one: value.to(device) for one, value in made.signals.items()},
        projector=nn.Linear(vision, width, device=device, dtype=dtype).requires_grad_(False),
        text={one: value.to(device) for one, value in made.text.items()},
        inputs=made.inputs and (made.inputs[0].to(device), made.inputs[1].to(device)),
    )


def prompt_of(adapter: Adapter, tokens: VisualTokens, rows: int = 1) -> dict[str, Any]:
    """Inputs for a forward of ``rows`` equal prompts: the visual tokens, then `TEXT` ids."""
    device = tokens.features.device
    image = torch.full((1, len(tokens)), adapter.facts.placeholders["image"])
    ids = torch.cat([torch.tensor([[1]]), image, torch.full((1, TEXT - 1), 5)], 1).to(device)
    ids = ids.repeat(rows, 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | encoder_outputs(adapter, [[tokens]] * rows)


def vit_flops(views: int, patches: int, width: int, mlp: int, layers: int) -> float:
    """FLOPs of a vision transformer over ``views`` views."""
    n = patches + PREFIX
    return float(views * layers * (2 * n * (4 * width**2 + 2 * width * mlp) + 4 * n * n * width))
