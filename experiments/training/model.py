"""Model, tokenizer and processor of testbed-next."""

import math
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from einops import repeat
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from tokenprune.models.testbed import scenes
from tokenprune.models.testbed.scenes import VIEW

PATCH = 5


SIDE = VIEW // PATCH  # patches along a view


PER_VIEW = SIDE * SIDE


WIDTH = 128


CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<assistant>' if message.role == 'assistant' else '<user>' -}}
{%- if message.content is string -%}{{- message.content -}}{%- else -%}
{%- for part in message.content -%}
{{- part.text if part.type == 'text' else '<' + part.type + '>' -}}
{%- endfor -%}
{%- endif -%}
{%- if message.role == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}
"""


# --- the model and its processor ------------------------------------------------------------------


def build_tokenizer(
    *modalities: scenes.Modality, marks: Mapping[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the lower-case words in the questions of the modalities.

    Words of image questions have the same ids for every choice of modalities.  ``marks`` are
    special tokens after all words, by name.
    """
    special = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>")
    known = [*special, *scenes.vocabulary(modalities)]
    extra = {"image_token": "<image>", "user_token": "<user>", "assistant_token": "<assistant>"}
    if "video" in modalities:
        known.append("<video>")
        extra["video_token"] = "<video>"
    known += (marks or {}).values()
    extra |= marks or {}
    words = {word: index for index, word in enumerate(known)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        extra_special_tokens=extra,
    )


@cache
def build_processor() -> LlavaNextProcessor:
    """The LLaVA-NeXT processor with a word-level tokenizer of lower-case words."""
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": VIEW},
        crop_size={"height": VIEW, "width": VIEW},
        image_grid_pinpoints=[list(size) for size in scenes.GRID_PINPOINTS],
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer("image"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(seed: int) -> LlavaNextForConditionalGeneration:
    """The model with random weights; position embeddings start as sine and cosine codes."""
    torch.manual_seed(seed)
    tokenizer = build_processor().tokenizer
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=VIEW,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        **tokens,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[list(size) for size in scenes.GRID_PINPOINTS],
        image_seq_length=PER_VIEW,
        vision_feature_layer=-2,
        dtype="float32",
        **tokens,
    )
    model = LlavaNextForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**tokens, max_new_tokens=4, do_sample=False)
    embeddings = model.model.vision_tower.embeddings
    with torch.no_grad():
        nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.1)
        nn.init.normal_(model.model.image_newline, std=0.1)
        # Without a position code from the start, the encoder does not learn where a patch is.
        scale = 0.4 * embeddings.patch_embedding.weight.std() * math.sqrt(3 * PATCH * PATCH)
        embeddings.position_embedding.weight[1:] += scale * math.sqrt(2) * position_codes()
    return model


def position_codes() -> Tensor:
    """Sine and cosine codes of row and column, (patches, width), each entry within -1 and 1."""
    frequencies = torch.exp(torch.linspace(math.log(2.0), math.log(0.15), WIDTH // 4))
    angles = torch.arange(SIDE)[:, None] * frequencies
    codes = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = repeat(codes, "r d -> (r c) d", c=SIDE)
    columns = repeat(codes, "c d -> (r c) d", r=SIDE)
    return torch.cat([rows, columns], dim=1)


def export(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
    """Write model (weights in half precision) and processor; every file is replaced atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        half = {key: value.detach().cpu().half() for key, value in model.state_dict().items()}
        model.save_pretrained(name, state_dict=half)
        processor.save_pretrained(name)
        for file in Path(name).iterdir():
            file.chmod(0o644)
            file.replace(folder / file.name)
