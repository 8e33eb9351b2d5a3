"""Train `testbed-next`, the embedded LLaVA-NeXT of 1.7 million parameters, from scratch.

    python -m tokenprune.experiments.train_testbed --out runs/testbed-next

End-to-end training from random weights stalls, so skills are taught one by one:

1. vision     the vision tower labels every patch (shape, colour, digit, place) and tags the view;
2. language   the decoder answers from *ideal* patch embeddings made of the true labels;
3. projector  the projector learns to turn vision features into those ideal embeddings;
4. joint      projector and decoder answer from pixels.

From the middle of stage 2 on, most batches lose visual tokens (`drop_tokens`): random subsets,
single views, whole rows, whole crops, with compact and with original positions.  No saliency is
involved, so that no pruning method is favoured.  Finished stages are kept in `OUT/stages` and not
repeated; stages 1 and 2 are independent and may run side by side (`--stages`).
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import typer
from einops import rearrange, repeat
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf
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
from tokenprune.models.testbed.scenes import KINDS, VIEW, Question, Scene, Size

PATCH = 8
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


def build_tokenizer(*modalities: scenes.Modality) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the lower-case words that questions of the modalities have.

    Words of images have the same ids in all of them.
    """
    special = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<user>", "<assistant>")
    known = [*special, *scenes.vocabulary(modalities)]
    extra = {"image_token": "<image>", "user_token": "<user>", "assistant_token": "<assistant>"}
    if "video" in modalities:
        known.append("<video>")
        extra["video_token"] = "<video>"
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
    """A real LLaVA-NeXT processor with a word-level tokenizer of lower-case words."""
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
    """The model with random weights; its position embeddings start as sine and cosine codes."""
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
        # The tower forgets where a patch lies unless its position code is there from the start.
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
    """Write model (weights in half precision) and processor; each file appears at once, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        half = {key: value.detach().cpu().half() for key, value in model.state_dict().items()}
        model.save_pretrained(name, state_dict=half)
        processor.save_pretrained(name)
        for file in Path(name).iterdir():
            file.chmod(0o644)
            file.replace(folder / file.name)


# --- scenes as tensors ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """How an image of one size is cut into views and packed into a sequence.

    `order` (N,) tells for each packed token which patch it is, counted through the thumbnail and
    then the crops, or -1 for a newline; `row` (N,) counts the rows of thumbnail and crop canvas.
    """

    grid: tuple[int, int]  # crops along height and width
    padding: tuple[int, int]  # above and left of the image, in pixels
    order: Tensor
    row: Tensor

    @property
    def views(self) -> int:
        return 1 + self.grid[0] * self.grid[1]


@cache
def geometry(size: Size) -> Geometry:
    """The geometry of a canvas (height, width) that fits a pinpoint up to symmetric padding."""
    fitting = [p for p in scenes.GRID_PINPOINTS if p[0] >= size[0] and p[1] >= size[1]]
    height, width = min(fitting, key=math.prod)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    rows, columns = height // VIEW, width // VIEW
    crops = PER_VIEW + torch.arange(rows * columns * PER_VIEW)
    canvas = rearrange(crops, "(R C r c) -> (R r) (C c)", R=rows, C=columns, r=SIDE, c=SIDE)
    canvas = canvas[top // PATCH :, left // PATCH :]
    canvas = canvas[: size[0] // PATCH, : size[1] // PATCH]
    canvas = F.pad(canvas, (0, 1), value=-1)  # the newline after each row
    row = torch.cat(
        [
            torch.arange(SIDE).repeat_interleave(SIDE),
            SIDE + torch.arange(canvas.shape[0]).repeat_interleave(canvas.shape[1]),
        ]
    )
    order = torch.cat([torch.arange(PER_VIEW), canvas.flatten()])
    return Geometry((rows, columns), (top, left), order, row)


def to_views(batch: list[Scene], geo: Geometry, device: torch.device) -> Tensor:
    """Pixels of all views of scenes of one size, as the processor makes them: (b, v, 3, 56, 56)."""
    images = rearrange(torch.from_numpy(np.stack([s.pixels for s in batch])), "b h w c -> b c h w")
    images = images.to(device)
    bicubic = InterpolationMode.BICUBIC
    thumbnails = tvf.resize(images, [VIEW, VIEW], interpolation=bicubic, antialias=True)
    (top, left), (rows, columns) = geo.padding, geo.grid
    bottom = rows * VIEW - images.shape[2] - top
    right = columns * VIEW - images.shape[3] - left
    crops = rearrange(
        F.pad(images, (left, right, top, bottom)),
        "b c (R h) (C w) -> b (R C) c h w",
        R=rows,
        C=columns,
    )
    views = torch.cat([thumbnails[:, None], crops], dim=1)
    return (views.float() / 255 - 0.5) / 0.25


# What a patch shows: nothing or a shape (each counted anew in the thumbnail, where it is smaller),
# the colour of the shape or of the background, nothing or a digit, and where the patch lies.
SKILLS = {
    "shape": 1 + 2 * len(scenes.SHAPES),
    "colour": len(scenes.COLOURS) + len(scenes.TINTS),
    "digit": 11,
    "row": SIDE,
    "column": SIDE,
}
PAIRS = len(scenes.SHAPES) * len(scenes.COLOURS)
TAGS = PAIRS + len(scenes.TINTS) + 10


@dataclass(frozen=True)
class Labels:
    """The truth about views: `patches` (b, v, 49, skills) class indices, `sure` likewise bool
    (false where a patch is only touched), `tags` (b, v, TAGS) bool and `known` likewise."""

    patches: Tensor
    sure: Tensor
    tags: Tensor
    known: Tensor


def overlap(centre: float, half: float, cells: int) -> NDArray[np.float64]:
    """Share of each of `cells` patches in a row that [centre - half, centre + half] covers."""
    edges = np.arange(cells) * PATCH
    low, high = np.maximum(edges, centre - half), np.minimum(edges + PATCH, centre + half)
    covered: NDArray[np.float64] = np.clip(high - low, 0, None) / PATCH
    return covered


def to_labels(batch: list[Scene], geo: Geometry, device: torch.device) -> Labels:
    """True labels of the views of scenes of one size."""
    (top, left), (rows, columns) = geo.padding, geo.grid
    height, width = batch[0].size
    most = max(len(scene.items) for scene in batch)
    b, v = len(batch), geo.views

    def cut(canvas: Tensor) -> Tensor:
        return rearrange(canvas, "... (R r) (C c) -> ... (R C) (r c)", R=rows, C=columns, r=SIDE)

    # How much of each patch each item covers, (b, items, v, 49), and its digit likewise.
    owner = torch.from_numpy(np.stack([scene.owner for scene in batch]))
    masks = (owner[:, None] == torch.arange(most)[:, None, None]).float()
    padded = F.pad(masks, (left, columns * VIEW - width - left, top, rows * VIEW - height - top))
    thumbnail = F.adaptive_avg_pool2d(masks, SIDE).flatten(2)[:, :, None]
    cover = torch.cat([thumbnail, cut(F.avg_pool2d(padded, PATCH))], dim=2)
    ink = torch.zeros(b, most, rows * SIDE, columns * SIDE)
    # Class indices of items, with one row more for "no item".
    table = torch.zeros(b, most + 1, 3, dtype=torch.long)
    for i, scene in enumerate(batch):
        table[i, most, 1] = len(scenes.COLOURS) + list(scenes.TINTS).index(scene.tint)
        for j, item in enumerate(scene.items):
            table[i, j, 0] = 1 + scenes.SHAPES.index(item.shape)
            table[i, j, 1] = list(scenes.COLOURS).index(item.colour)
            table[i, j, 2] = 1 + item.digit
            ink[i, j] = torch.from_numpy(
                overlap(item.y + top, 5, rows * SIDE)[:, None]
                * overlap(item.x + left, 5, columns * SIDE)
            ).float()
    inked = torch.cat([torch.zeros_like(thumbnail), cut(ink)], dim=2)

    covered, which = cover.max(dim=1)
    which = which.where(covered >= 0.25, torch.tensor(most))
    written, writer = inked.max(dim=1)
    writer = writer.where(written >= 0.25, torch.tensor(most))

    def look_up(index: Tensor, column: int) -> Tensor:
        return table[:, :, column].gather(1, index.flatten(1)).view_as(index)

    shape, colour, digit = look_up(which, 0), look_up(which, 1), look_up(writer, 2)
    shape[:, 0] += len(scenes.SHAPES) * (shape[:, 0] > 0)
    place = torch.arange(PER_VIEW).expand_as(shape)
    patches = torch.stack([shape, colour, digit, place // SIDE, place % SIDE], dim=-1)

    clear = (covered < 0.06) | (covered >= 0.25)
    legible = (written < 0.1) | (written >= 0.25)
    legible[:, 0] = False  # half its size, a digit in the thumbnail is not for reading
    sure = torch.stack([clear, clear, legible, clear | True, clear | True], dim=-1)

    tags = torch.zeros(b, v, TAGS)
    known = torch.ones(b, v, TAGS, dtype=torch.bool)
    known[:, 0, -10:] = False
    for i, scene in enumerate(batch):
        tags[i, :, PAIRS + list(scenes.TINTS).index(scene.tint)] = 1
        for j, item in enumerate(scene.items):
            pair = scenes.SHAPES.index(item.shape) * len(scenes.COLOURS)
            pair += list(scenes.COLOURS).index(item.colour)
            tags[i, :, pair] = (which[i] == j).any(-1).float()
            tags[i, :, item.digit - 10] += (writer[i] == j).any(-1).float()
    tags = tags.clamp(max=1)
    return Labels(*(x.to(device) for x in (patches, sure, tags, known)))


def scene_batches(
    count: int, seed: int, *, items: tuple[int, int] = (1, 4), alike: float = 0.0
) -> Iterator[tuple[list[Scene], np.random.Generator]]:
    """Endless batches of `count` scenes of one size, with the generator to draw further from.

    A share of `alike` scenes has few colours and shapes (see `scenes.render`).
    """
    rng = np.random.default_rng(seed)
    sizes, shares = list(scenes.SIZES), list(scenes.SIZES.values())
    while True:
        size = sizes[rng.choice(len(sizes), p=shares)]
        yield (
            [
                scenes.render(rng, size=size, items=items, alike=alike > 0 and rng.random() < alike)
                for _ in range(count)
            ],
            rng,
        )


# --- optimisation ---------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised (Jordan, 2024), scaled to AdamW's size.

    `torch.optim.Muon` does the same in bfloat16 and one matrix at a time, which a CPU without
    bfloat16 arithmetic emulates thirty times slower; here equal shapes go together, in float32.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for (rows, columns), parameters in by_shape.items():
                momenta = []
                for parameter in parameters:
                    gradient = parameter.grad
                    if gradient is None:
                        gradient = torch.zeros_like(parameter)
                    state = self.state[parameter]
                    momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(gradient, 0.05)
                    momenta.append(gradient.lerp(momentum, 0.95))
                updates = orthogonalise(torch.stack(momenta))
                scale = 0.2 * math.sqrt(max(rows, columns))
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.sub_(update, alpha=group["lr"] * scale)


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of matrices (n, rows, columns) towards one (Newton-Schulz)."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if tall else x


class Optimisers:
    """Muon for the matrices of layers, AdamW for everything else, one schedule for both."""

    def __init__(
        self, modules: Iterable[nn.Module], lr: float, steps: int, fall: float = 0.4
    ) -> None:
        named = [item for module in modules for item in module.named_parameters()]
        named = [(name, p) for name, p in named if p.requires_grad]
        matrices = [p for name, p in named if p.ndim == 2 and "layers." in name]
        others = [p for name, p in named if not (p.ndim == 2 and "layers." in name)]
        self.parameters = matrices + others
        self.lr, self.steps, self.fall, self.done = lr, steps, fall, 0
        adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.parts: list[torch.optim.Optimizer] = [adam]
        if matrices:
            self.parts.append(Muon(matrices, lr=lr))

    def step(self, loss: Tensor) -> None:
        """One update; the rate rises over 2 % of the steps and falls over the last share `fall`."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        progress = self.done / self.steps
        factor = min(1.0, (progress + 1e-3) / 0.02, (1 - progress) / self.fall)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * factor
            part.step()
            part.zero_grad()
        self.done += 1


class Meter:
    """Running means of figures by name, printed now and then."""

    def __init__(self, stage: str, every: int = 50) -> None:
        self.stage, self.every, self.start = stage, every, time.monotonic()
        self.sums: dict[str, list[float]] = {}
        self.last: dict[str, float] = {}

    def add(self, name: str, values: Tensor) -> None:
        total = self.sums.setdefault(name, [0.0, 0.0])
        total[0] += float(values.detach().float().sum())
        total[1] += values.numel()

    def tick(self, step: int, steps: int) -> None:
        if (step + 1) % self.every and step + 1 < steps:
            return
        self.last = {name: s / n for name, (s, n) in self.sums.items() if n}
        self.sums.clear()
        figures = "  ".join(f"{name} {value:.3f}" for name, value in self.last.items())
        seconds = time.monotonic() - self.start
        print(f"{self.stage} {step + 1}/{steps}  {seconds:.0f} s  {figures}", flush=True)


# --- stage 1: the vision tower --------------------------------------------------------------------


def encode(model: LlavaNextForConditionalGeneration, views: Tensor) -> tuple[Tensor, Tensor]:
    """Patch features as the projector gets them, (b, v, 49, d), and pooled [CLS], (b, v, d)."""
    b = len(views)
    out = model.model.vision_tower(views.flatten(0, 1), output_hidden_states=True)
    patches = out.hidden_states[model.config.vision_feature_layer][:, 1:]
    return patches.unflatten(0, (b, -1)), out.pooler_output.unflatten(0, (b, -1))


def skill_loss(guesses: Tensor, labels: Labels, meter: Meter) -> Tensor:
    """Cross-entropy of `guesses` (b, v, 49, classes of all skills) at the patches; a scalar."""
    loss = guesses.new_zeros(())
    logits = guesses.split(list(SKILLS.values()), dim=-1)
    for index, (skill, guess) in enumerate(zip(SKILLS, logits, strict=True)):
        sure, truth = labels.sure[..., index], labels.patches[..., index]
        guess, truth = guess[sure], truth[sure]
        losses = F.cross_entropy(guess, truth, reduction="none")
        # Few patches show an object or a digit: each side counts half.
        shown = truth > 0 if skill in ("shape", "digit") else torch.ones_like(truth) > 0
        weight = 2.0 if skill in ("shape", "digit") else 0.5
        loss = loss + weight * losses[shown].mean()
        if not shown.all():
            loss = loss + losses[~shown].mean()
        meter.add(skill, (guess.argmax(-1) == truth)[shown])
    return loss


def train_vision(run: "Run") -> None:
    model, steps = run.model, run.steps["vision"]
    skill_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, sum(SKILLS.values())))
    tag_head = nn.Linear(WIDTH, TAGS)
    skill_head.to(run.device), tag_head.to(run.device)
    tower = model.model.vision_tower
    optimisers = Optimisers([tower, skill_head, tag_head], 2e-3, steps, fall=0.6)
    meter = run.meter("vision")
    batches = scene_batches(10, run.seed + 1, items=(3, 6))
    for step in range(steps):
        batch, _ = next(batches)
        geo = geometry(batch[0].size)
        labels = to_labels(batch, geo, run.device)
        patches, pooled = encode(model, to_views(batch, geo, run.device))
        loss = skill_loss(skill_head(patches), labels, meter)
        tag_logits, known = tag_head(pooled), labels.known
        loss = loss + 4 * F.binary_cross_entropy_with_logits(tag_logits[known], labels.tags[known])
        hits = (tag_logits > 0) & (labels.tags > 0) & known
        meter.add("tags", hits[(labels.tags > 0) & known])
        meter.add("loss", loss)
        optimisers.step(loss)
        meter.tick(step, steps)


# --- answering packed questions -------------------------------------------------------------------


class Ideal(nn.Module):
    """Ideal patch embeddings: the sum of one learnt vector per true label.

    What has a name starts at the embedding of its word, so that one circuit, "find the patches
    that resemble these words", serves all colours and shapes at once.
    """

    def __init__(self, words: Tensor) -> None:
        super().__init__()
        tables = [nn.Embedding(n, WIDTH) for n in SKILLS.values()]
        self.tables = nn.ModuleList(tables)
        shape, colour, digit, row, column = tables
        named = build_processor().tokenizer.convert_tokens_to_ids
        with torch.no_grad():
            for table in (shape, digit, row, column):
                nn.init.normal_(table.weight, std=0.1)
            shape.weight[1:] *= 0.5  # thumbnail and crop differ a little
            shape.weight[1:] += words[named(list(scenes.SHAPES))].repeat(2, 1)
            colour.weight[:] = words[named([*scenes.COLOURS, *scenes.TINTS])]
            digit.weight[1:] = words[named(list("0123456789"))]

    def forward(self, patches: Tensor) -> Tensor:
        """Class indices (..., skills) to embeddings (..., d)."""
        return torch.stack([t(patches[..., i]) for i, t in enumerate(self.tables)]).sum(0)


def pack(patches: Tensor, newline: Tensor, geo: Geometry) -> Tensor:
    """Patch embeddings (b, v, 49, d) in Hugging Face's order, with newlines: (b, N, d)."""
    b, _, _, d = patches.shape
    source = torch.cat([patches.flatten(1, 2), newline.expand(b, 1, d)], dim=1)
    return source[:, geo.order.to(patches.device)]  # -1 is the newline


@dataclass(frozen=True)
class Dropout:
    """How visual tokens are dropped in training.

    `shares`: how often each scheme is drawn: nothing dropped, random patches, thumbnail only,
    crops only, some views, some rows.  `retentions`: the ranges, one drawn first, from which the
    retention ratio of random patches comes.
    """

    shares: tuple[float, float, float, float, float, float]
    retentions: tuple[tuple[float, float], ...]


# Learning to look up needs answers that can be seen; learning to do without tokens comes later.
GENTLE = Dropout((0.35, 0.15, 0.30, 0.10, 0.05, 0.05), ((0.5, 0.9),))
HARSH = Dropout((0.30, 0.35, 0.10, 0.08, 0.08, 0.09), ((0.05, 0.3), (0.05, 0.9)))


def drop_tokens(geo: Geometry, count: int, rng: np.random.Generator, dropout: Dropout) -> Tensor:
    """Indices (count, K) of the visual tokens that stay, drawn without regard to content.

    One scheme for the batch, random patches anew for every scene.  Newlines stay, as in the
    official code of most methods, or go (20 %).
    """
    order, row = geo.order.numpy(), geo.row.numpy()
    patch = order >= 0
    view = order // PER_VIEW
    scheme = rng.choice(6, p=dropout.shares)
    keep = np.tile(patch, (count, 1))
    if scheme == 1:
        low, high = dropout.retentions[rng.integers(len(dropout.retentions))]
        retention = rng.uniform(low, high)
        noise = np.where(patch, rng.random(keep.shape), 2)
        number = max(4, round(retention * patch.sum()))
        keep = noise.argsort(axis=1).argsort(axis=1) < number
    elif scheme == 2:
        keep &= view == 0
    elif scheme == 3:
        keep &= view != 0
    elif scheme == 4:
        chosen = rng.permutation(geo.views)[: rng.integers(1, geo.views + 1)]
        keep &= np.isin(view, chosen)
    elif scheme == 5:
        rows = row.max() + 1
        chosen = rng.permutation(rows)[: max(2, round(rng.uniform(0.2, 0.9) * rows))]
        keep &= np.isin(row, chosen)
    if scheme == 0 or rng.random() < 0.8:
        keep |= ~patch
    return torch.from_numpy(np.nonzero(keep)[1].reshape(count, -1))


def brief(geo: Geometry, patches: Tensor, rng: np.random.Generator) -> Tensor:
    """Indices (b, K) of the tokens that show an item or a digit, and of some others.

    With true labels (b, v, 49, skills) only: looking up is learnt from short sequences first.
    """
    shown = (patches[..., 0] > 0) | (patches[..., 2] > 0)
    packed = F.pad(shown.flatten(1), (0, 1))[:, geo.order].numpy()
    scores = packed + rng.random(packed.shape)
    best = (-scores).argsort(axis=1)[:, : int(packed.sum(1).max()) + 8]
    return torch.from_numpy(np.sort(best, axis=1))


@dataclass(frozen=True)
class Quiz:
    """Questions on a batch of scenes: `ids` (b, Q, L) tokens of question, cue, answer, eos and
    padding; `target` (b, Q, L) the next token where it is to be learnt, else -100; `answer`
    (b, Q) where the answer is predicted; `kind` (b, Q) index into `KINDS`; `noun` (b, Q) where the
    shape is named, -1 if none is; `facts` (b, Q, 4) what is true of the object so named: present,
    right, bottom and its digit, -100 where that is meaningless."""

    ids: Tensor
    target: Tensor
    answer: Tensor
    kind: Tensor
    noun: Tensor
    facts: Tensor

    def to(self, device: torch.device) -> "Quiz":
        return Quiz(*(getattr(self, field.name).to(device) for field in fields(self)))


# How many questions of each kind are packed behind one scene.
PORTIONS = {"existence": 4, "colour": 1, "count": 1, "position": 4, "digit": 3}


def make_quiz(
    batch: list[Scene],
    rng: np.random.Generator,
    device: torch.device,
    portions: dict[str, int] = PORTIONS,
) -> Quiz:
    """Random questions about scenes, the same number of each kind for every scene."""
    kinds = [kind for kind, number in portions.items() for _ in range(number)]
    asked = [[scenes.ask(scene, kind, rng) for kind in kinds] for scene in batch]
    facts = [[look(s, q) for q, _ in some] for s, some in zip(batch, asked, strict=True)]
    index = [KINDS.index(kind) for kind in kinds]
    return to_quiz(asked, index, facts, build_processor().tokenizer).to(device)


def to_quiz(
    asked: list[list[tuple[str, str]]],
    kinds: list[int],
    facts: list[list[tuple[int, int, int, int]]],
    tokenizer: PreTrainedTokenizerFast,
) -> Quiz:
    """Questions and answers as tensors.

    Args:
        asked: (b, Q) question and answer.
        kinds: (Q,) index of each question's kind.
        facts: (b, Q) as `Quiz.facts`.
        tokenizer: Of the model that is asked.
    """
    texts = [f"{question}<assistant>{answer}</s>" for some in asked for question, answer in some]
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids, length = encoded["input_ids"], encoded["attention_mask"].sum(1)
    at = torch.arange(ids.shape[1])
    # Both the answer and the closing token are learnt.
    learnt = (at >= length[:, None] - 3) & (at < length[:, None] - 1)
    target = torch.where(learnt, ids.roll(-1, dims=1), -100)
    shapes = torch.tensor(tokenizer.convert_tokens_to_ids(list(scenes.SHAPES)))
    named = torch.isin(ids, shapes)
    noun = torch.where(named.any(1), named.int().argmax(1), -1)
    kind = torch.tensor(kinds).repeat(len(asked))
    parts = (ids, target, length - 3, kind, noun, torch.tensor(facts).flatten(0, 1))
    return Quiz(*(part.unflatten(0, (len(asked), -1)) for part in parts))


FACTS = (2, 2, 2, 10)  # classes of present, right, bottom, digit


def look(scene: Scene, question: str) -> tuple[int, int, int, int]:
    """`Quiz.facts` of one question."""
    for item in scene.items:
        if item.name in question:
            height, width = scene.size
            return 1, int(item.x > width / 2), int(item.y > height / 2), int(item.digit)
    return 0, -100, -100, -100


def block_mask(prefix: int, blocks: int, length: int, device: torch.device) -> Tensor:
    """(1, 1, S, S) bool: everything sees the prefix causally, and a question only itself."""
    block = torch.cat(
        [torch.full((prefix,), -1), torch.arange(blocks).repeat_interleave(length)]
    ).to(device)
    causal = torch.ones(len(block), len(block), dtype=torch.bool, device=device).tril()
    return (causal & ((block == block[:, None]) | (block == -1)))[None, None]


def answer_logits(
    model: PreTrainedModel,
    visual: Tensor,
    keep: Tensor,
    quiz: Quiz,
    *,
    compact: bool,
    early: list[Tensor] | None = None,
) -> Tensor:
    """Logits (b, Q, L, vocabulary) of questions that share their scene's visual tokens.

    Args:
        visual: packed visual sequence (b, N, d).
        keep: indices (b, K) of the visual tokens the decoder sees.
        compact: kept tokens are numbered anew, without gaps; else they keep their positions.
        early: gets the states (b, Q, L, d) of the questions after the fourth layer.
    """
    b, questions, length = quiz.ids.shape
    d, device = visual.shape[-1], visual.device
    tokenizer = build_processor().tokenizer
    head = tokenizer("<s><user>", return_tensors="pt").input_ids.to(device)
    embed = model.model.language_model.embed_tokens
    kept = visual.gather(1, repeat(keep, "b k -> b k d", d=d))
    text = embed(rearrange(quiz.ids, "b q l -> b (q l)"))
    inputs = torch.cat([embed(head).expand(b, -1, -1), kept, text], dim=1)

    start = head.shape[1]
    prefix = start + keep.shape[1]
    seen = torch.arange(keep.shape[1], device=device).expand_as(keep) if compact else keep
    after = prefix if compact else start + visual.shape[1]
    positions = torch.cat(
        [
            torch.arange(start, device=device).expand(b, -1),
            start + seen,
            (after + torch.arange(length, device=device)).repeat(questions).expand(b, -1),
        ],
        dim=1,
    )
    out = model.model.language_model(
        inputs_embeds=inputs,
        attention_mask=block_mask(prefix, questions, length, device),
        position_ids=positions,
        use_cache=False,
        output_hidden_states=early is not None,
    )

    def group(hidden: Tensor) -> Tensor:
        return rearrange(hidden[:, prefix:], "b (q l) d -> b q l d", q=questions)

    if early is not None:
        early.append(group(out.hidden_states[4]))
    logits: Tensor = model.lm_head(group(out.last_hidden_state))
    return logits


def build_fact_head() -> nn.Module:
    """From a state (..., d) to the logits of all facts."""
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, sum(FACTS)))


def fact_loss(states: Tensor, head: nn.Module, quiz: Quiz, meter: Meter) -> Tensor:
    """Cross-entropy of what `head` tells about an object at the word that names its shape."""
    asked = quiz.noun >= 0
    at = repeat(quiz.noun.clamp(min=0), "b q -> b q 1 d", d=states.shape[-1])
    guesses = head(states.gather(2, at)[:, :, 0][asked]).split(FACTS, dim=-1)
    loss = states.new_zeros(())
    for name, guess, truth in zip(
        ("present", "right", "bottom", "number"), guesses, quiz.facts[asked].T, strict=True
    ):
        loss = loss + F.cross_entropy(guess, truth)
        meter.add(name, (guess.argmax(-1) == truth)[truth >= 0])
    return loss


def quiz_loss(
    logits: Tensor, quiz: Quiz, meter: Meter, *, intact: bool, weights: dict[str, float]
) -> Tensor:
    """Cross-entropy of answers; accuracies of intact inputs go to the meter.

    `weights` names the kinds in the order of `Quiz.kind` and says how much each counts.
    """
    losses = F.cross_entropy(logits.flatten(0, 2), quiz.target.flatten(), reduction="none")
    losses = losses.view_as(quiz.target).sum(-1)
    weight = losses.new_tensor(list(weights.values()))[quiz.kind]
    if intact:
        at = repeat(quiz.answer, "b q -> b q 1")
        right = logits.argmax(-1).gather(2, at) == quiz.target.gather(2, at)
        for index, kind in enumerate(weights):
            meter.add(kind, right[quiz.kind == index])
    meter.add("loss", losses)
    return (weight * losses).sum() / weight.sum()


def image_weights(count: float) -> dict[str, float]:
    """Counting weighs `count`, the colour, which is easy, one half, everything else one."""
    return {kind: {"colour": 0.5, "count": count}.get(kind, 1.0) for kind in KINDS}


# --- stages 2 to 4 --------------------------------------------------------------------------------


def train_language(run: "Run") -> None:
    model, steps = run.model, run.steps["language"]
    newline = nn.ParameterList([model.model.image_newline])
    # Two look-ups in a row (words to object, object to answer) are slow to appear unless the
    # first is rewarded by itself: half-way up, the noun must tell all about its object.
    fact_head = build_fact_head().to(run.device)
    modules = [model.model.language_model, model.lm_head, run.ideal, newline, fact_head]
    optimisers = Optimisers(modules, 2e-3, steps)
    meter = run.meter("language")
    batches = scene_batches(8, run.seed + 2)
    for step in range(steps):
        batch, rng = next(batches)
        geo = geometry(batch[0].size)
        labels = to_labels(batch, geo, torch.device("cpu"))
        short = step < 0.4 * steps or rng.random() < 0.2
        if short:
            keep = brief(geo, labels.patches, rng)
        else:
            keep = drop_tokens(geo, len(batch), rng, GENTLE)
        keep = keep.to(run.device)
        quiz = make_quiz(batch, rng, run.device)
        visual = run.ideal(labels.patches.to(run.device))
        visual = pack(visual, model.model.image_newline, geo)
        early: list[Tensor] = []
        compact = rng.random() < 0.5
        logits = answer_logits(model, visual, keep, quiz, compact=compact, early=early)
        seen = short or keep.shape[1] == visual.shape[1]
        loss = quiz_loss(logits, quiz, meter, intact=seen, weights=image_weights(2.0))
        loss = loss + 0.5 * fact_loss(early[0], fact_head, quiz, meter)
        optimisers.step(loss)
        meter.tick(step, steps)


def train_projector(run: "Run") -> None:
    model, steps = run.model, run.steps["projector"]
    projector = model.model.multi_modal_projector
    optimisers = Optimisers([projector], 3e-3, steps)
    meter = run.meter("projector")
    batches = scene_batches(16, run.seed + 3)
    for step in range(steps):
        batch, _ = next(batches)
        geo = geometry(batch[0].size)
        labels = to_labels(batch, geo, run.device)
        with torch.no_grad():
            patches, _ = encode(model, to_views(batch, geo, run.device))
            wanted = run.ideal(labels.patches)
        clear = labels.sure[..., 0]
        error = (projector(patches) - wanted)[clear].square().mean()
        error = error / (wanted - wanted.mean((0, 1, 2)))[clear].square().mean()
        meter.add("relative error", error)
        optimisers.step(error)
        meter.tick(step, steps)


def train_joint(run: "Run") -> None:
    model, steps, inner = run.model, run.steps["joint"], run.model.model
    fact_head = build_fact_head().to(run.device)
    newline = nn.ParameterList([inner.image_newline])
    modules = [inner.language_model, model.lm_head, inner.multi_modal_projector, newline, fact_head]
    optimisers = Optimisers(modules, 1e-3, steps)
    meter = run.meter("joint")
    batches = scene_batches(8, run.seed + 4, alike=0.5)
    for step in range(steps):
        batch, rng = next(batches)
        geo = geometry(batch[0].size)
        keep = drop_tokens(geo, len(batch), rng, HARSH).to(run.device)
        quiz = make_quiz(batch, rng, run.device)
        with torch.no_grad():
            patches, _ = encode(model, to_views(batch, geo, run.device))
        visual = pack(inner.multi_modal_projector(patches), inner.image_newline, geo)
        early: list[Tensor] = []
        compact = rng.random() < 0.5
        logits = answer_logits(model, visual, keep, quiz, compact=compact, early=early)
        intact = keep.shape[1] == visual.shape[1]
        loss = quiz_loss(logits, quiz, meter, intact=intact, weights=image_weights(4.0))
        loss = loss + 0.25 * fact_loss(early[0], fact_head, quiz, meter)
        optimisers.step(loss)
        meter.tick(step, steps)


STAGES: dict[str, Callable[["Run"], None]] = {
    "vision": train_vision,
    "language": train_language,
    "projector": train_projector,
    "joint": train_joint,
}
STEPS = {"vision": 1800, "language": 2000, "projector": 300, "joint": 1400}


class Run:
    """A training run: the model, what it learns from, and its folder."""

    stages: ClassVar[dict[str, Callable[[Any], None]]] = STAGES

    def __init__(self, out: Path, device: str, seed: int, steps: dict[str, int]) -> None:
        self.out, self.device, self.seed, self.steps = out, torch.device(device), seed, steps
        self.model: Any = self.build(seed)
        nn.Module.to(self.model, self.device)
        self.ideal = Ideal(self.model.model.language_model.embed_tokens.weight).to(self.device)
        (out / "stages").mkdir(parents=True, exist_ok=True)
        self._meter = Meter("")

    def build(self, seed: int) -> PreTrainedModel:
        return build_model(seed)

    def meter(self, stage: str) -> Meter:
        self._meter = Meter(stage)
        return self._meter

    def parts(self, stage: str) -> dict[str, nn.Module]:
        """What a stage changes, by name."""
        inner = self.model.model
        newline = nn.ParameterList([inner.image_newline])
        language = {
            "language": inner.language_model,
            "head": self.model.lm_head,
            "newline": newline,
        }
        projector = {"projector": inner.multi_modal_projector}
        tower = {"tower": inner.vision_tower}
        return {
            "vision": tower,
            "language": {**language, "ideal": self.ideal},
            "projector": projector,
            "joint": {**language, **projector},
        }[stage]

    def do(self, stage: str) -> None:
        """Load the result of a stage, or train it and save its result."""
        file = self.out / "stages" / f"{stage}.pt"
        if file.exists():
            saved = torch.load(file, map_location=self.device, weights_only=True)
            for name, module in self.parts(stage).items():
                module.load_state_dict(saved[name])
            return
        torch.manual_seed(self.seed)
        self.stages[stage](self)
        state: dict[str, Any] = {n: m.state_dict() for n, m in self.parts(stage).items()}
        partial = file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(file)
        record = {
            "steps": self.steps[stage],
            "seconds": round(time.monotonic() - self._meter.start),
            "threads": torch.get_num_threads(),
            "device": str(self.device),
            "last figures in training": {k: round(v, 4) for k, v in self._meter.last.items()},
        }
        file.with_suffix(".json").write_text(json.dumps(record, indent=2))


# --- figures --------------------------------------------------------------------------------------

Chooser = Callable[[Geometry, Tensor, np.random.Generator], Tensor]
"""From geometry, [CLS] attention to the packed tokens (N,) and chance to the indices that stay."""


def share(geo: Geometry, scores: Tensor, retention: float) -> Tensor:
    """Indices of the best share of the patches, view by view, and all newlines."""
    keep = geo.order < 0
    for view in range(geo.views):
        mine = (geo.order // PER_VIEW == view) & (geo.order >= 0)
        best = scores.masked_fill(~mine, -math.inf).topk(max(1, round(retention * int(mine.sum()))))
        keep[best.indices] = True
    return keep.nonzero().squeeze(1)


def at_random(geo: Geometry, rng: np.random.Generator, retention: float) -> Tensor:
    """Indices of a random share of the patches, and all newlines."""
    patches = (geo.order >= 0).nonzero().squeeze(1)
    chosen = torch.from_numpy(rng.permutation(len(patches))[: round(retention * len(patches))])
    return torch.cat([patches[chosen], (geo.order < 0).nonzero().squeeze(1)]).sort().values


CONDITIONS: dict[str, Chooser] = {
    "full": lambda geo, attention, rng: torch.arange(len(geo.order)),
    "thumbnail only": lambda geo, attention, rng: torch.arange(PER_VIEW),
    "crops only": lambda geo, attention, rng: torch.arange(PER_VIEW, len(geo.order)),
    "image-free": lambda geo, attention, rng: torch.arange(0),
    "random @ 0.25": lambda geo, attention, rng: at_random(geo, rng, 0.25),
    "random @ 0.10": lambda geo, attention, rng: at_random(geo, rng, 0.10),
    "CLS top-k @ 0.25": lambda geo, attention, rng: share(geo, attention, 0.25),
    "CLS top-k @ 0.10": lambda geo, attention, rng: share(geo, attention, 0.10),
}


def cls_attention(model: LlavaNextForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Attention of [CLS] to the patches in the last vision layer, mean of heads: (v, 49)."""
    tower = model.model.vision_tower
    layer = tower.encoder.layers[-1]
    x = layer.layer_norm1(tower(pixels, output_hidden_states=True).hidden_states[-2])
    heads = layer.self_attn.num_heads
    query = rearrange(layer.self_attn.q_proj(x[:, :1]), "v n (h d) -> v h n d", h=heads)
    key = rearrange(layer.self_attn.k_proj(x), "v n (h d) -> v h n d", h=heads)
    weights: Tensor = (query @ key.mT / math.sqrt(key.shape[-1])).softmax(-1)
    return weights[:, :, 0, 1:].mean(1)


def chat(processor: LlavaNextProcessor, question: str) -> str:
    content: Any = [{"type": "image"}, {"type": "text", "text": question}]
    prompt: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return prompt


@torch.inference_mode()
def evaluate(folder: Path, count: int, seed: int, device: str) -> dict[str, dict[str, float]]:
    """Accuracy by condition and kind on `count` fresh held-out questions a kind.

    All through the saved processor and model.  The full model answers by `generate` and must say
    the word and stop; shortened inputs, with compact positions, by the likeliest next token.
    """
    model = LlavaNextForConditionalGeneration.from_pretrained(
        folder, trust_remote_code=False
    ).eval()
    nn.Module.to(model, device)
    processor = LlavaNextProcessor.from_pretrained(folder, trust_remote_code=False)
    asked = scenes.questions(count * len(KINDS), seed=seed)
    right: dict[str, dict[str, list[bool]]] = {
        condition: {kind: [] for kind in KINDS} for condition in CONDITIONS
    }
    for start in range(0, len(asked), len(KINDS)):
        group: list[Question] = asked[start : start + len(KINDS)]
        image = group[0].image
        inputs = processor(
            images=[image] * len(group),
            text=[chat(processor, question.question) for question in group],
            padding=True,
            return_tensors="pt",
        ).to(device)
        ids = model.generate(**inputs)[:, inputs.input_ids.shape[1] :]
        pixels, sizes = inputs.pixel_values[:1], inputs.image_sizes[:1]
        features = model.get_image_features(pixels, sizes).pooler_output[0]
        geo = geometry((image.height, image.width))
        attention = cls_attention(model, pixels[0]).flatten().cpu()[geo.order.clamp(min=0)]
        rng = np.random.default_rng([seed, start])
        for condition, choose in CONDITIONS.items():
            if condition != "full":
                keep = choose(geo, attention, rng).to(device)
                ids = next_ids(model, inputs.input_ids, inputs.attention_mask, features, keep)
            answers = processor.batch_decode(ids, skip_special_tokens=True)
            for question, answer in zip(group, answers, strict=True):
                right[condition][question.kind].append(answer.strip() == question.answer)
    return {c: {k: float(np.mean(r)) for k, r in kinds.items()} for c, kinds in right.items()}


def next_ids(
    model: LlavaNextForConditionalGeneration,
    input_ids: Tensor,
    attention_mask: Tensor,
    features: Tensor,
    keep: Tensor,
) -> Tensor:
    """Likeliest next tokens (b, 1) after prompts (b, S) on one image, of whose packed features
    (N, d) only those at `keep` (K,) are there, with compact positions."""
    visual = input_ids == model.config.image_token_id  # (b, S), N of them in each row
    stay = ~visual
    rank = visual.cumsum(1) - 1
    stay |= visual & torch.isin(rank, keep)
    embeds = model.get_input_embeddings()(input_ids)
    embeds[visual] = features.repeat(len(embeds), 1)
    mask = rearrange(attention_mask[stay], "(b s) -> b s", b=len(embeds))
    logits: Tensor = model(
        inputs_embeds=rearrange(embeds[stay], "(b s) d -> b s d", b=len(embeds)),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
    ).logits
    return logits[:, -1].argmax(-1, keepdim=True)


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share seen in `count` trials (Wilson)."""
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / count / 2) ** 2)
    return middle - half, middle + half


def table(figures: dict[str, dict[str, float]], count: int) -> str:
    """Figures as a Markdown table, with 95 % confidence intervals."""
    lines = [f"| accuracy | mean | {' | '.join(KINDS)} |", "|---|" + "---|" * (len(KINDS) + 1)]
    for condition, by_kind in figures.items():
        cells = [f"{sum(by_kind.values()) / len(by_kind):.3f}"]
        for kind in KINDS:
            low, high = wilson(by_kind[kind], count)
            cells.append(f"{by_kind[kind]:.3f} [{low:.2f}, {high:.2f}]")
        lines.append(f"| {condition} | {' | '.join(cells)} |")
    return "\n".join(lines)


# --- command line ---------------------------------------------------------------------------------


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run, or the model with --evaluate.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves the default.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of weights and training scenes.")] = 0,
    stages: Annotated[str, typer.Option(help="Stages to run, in order.")] = ",".join(STEPS),
    scale: Annotated[float, typer.Option(help="Multiplies the steps of every stage.")] = 1.0,
    questions: Annotated[int, typer.Option(help="Questions a kind for the figures.")] = 400,
    evaluate_only: Annotated[
        bool, typer.Option("--evaluate", help="Only print figures of the model in OUT.")
    ] = False,
    test_seed: Annotated[int, typer.Option(help="Seed of the held-out questions.")] = 1000,
) -> None:
    """Train the testbed model, stage by stage, or print the figures of an existing one."""
    if threads:
        torch.set_num_threads(threads)
    if evaluate_only:
        figures = evaluate(out, questions, test_seed, device)
        print(table(figures, questions))
        return
    run = Run(out, device, seed, {name: max(1, round(n * scale)) for name, n in STEPS.items()})
    wanted = stages.split(",")
    for stage in wanted:
        run.do(stage)
    if "projector" not in wanted:
        return
    folder = out / "model"
    export(run.model, build_processor(), folder)
    figures = evaluate(folder, questions, test_seed, device)
    print(table(figures, questions))
    records = {
        stage: json.loads((out / "stages" / f"{stage}.json").read_text()) for stage in wanted
    }
    record = {
        "seed": seed,
        "test_seed": test_seed,
        "questions_per_kind": questions,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "stages": records,
        "accuracy": figures,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
