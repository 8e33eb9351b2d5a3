"""Train `testbed-onevision`, the embedded LLaVA-OneVision, starting from `testbed-next`.

    python -m tokenprune.experiments.training.testbed_onevision --out runs/testbed-onevision

The first testbed already recognises and looks up objects.  This one starts from its weights and
learns what is new: a vision encoder without CLS token and without normalised embeddings (SigLIP),
biases in the attention of the decoder (Qwen2), several images, and videos.

1. vision   the vision encoder labels patches and pooled frames, and the projector learns to
            reproduce the embeddings of the first testbed;
2. joint    projector and decoder answer questions about images, pairs of images and videos.

In stage 2 most batches drop visual tokens as in the first testbed (`drop_tokens`), with compact and
with original position ids.  No method's score plays a part.  An interrupted run continues from its
last state.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import typer
from einops import rearrange
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

from tokenprune.experiments.training import model, quiz
from tokenprune.experiments.training import testbed_next as first
from tokenprune.experiments.training.geometry import (
    SKILLS,
    Geometry,
    Labels,
    geometry,
    to_labels,
    to_views,
)
from tokenprune.experiments.training.loop import Recipe, steps_of
from tokenprune.experiments.training.measure import evaluate
from tokenprune.experiments.training.model import PATCH, PER_VIEW, SIDE, WIDTH, build_tokenizer
from tokenprune.experiments.training.optim import Meter, Optimisers
from tokenprune.experiments.training.quiz import (
    Dropout,
    Quiz,
    answer_logits,
    drop_tokens,
    fact_loss,
    marker_loss,
    openers,
    quiz_loss,
    to_quiz,
    visible,
)
from tokenprune.experiments.training.testbed_next import pack, skill_loss
from tokenprune.models import testbed
from tokenprune.models.testbed import scenes
from tokenprune.models.testbed.drawing import check_photographs
from tokenprune.models.testbed.scenes import MODALITIES, VIEW, Modality, Scene

POOLED = math.ceil(SIDE / 2)  # tokens along a frame


PER_FRAME = POOLED * POOLED


LAYERS = 4  # of the encoder; the projector of the first testbed reads the fourth of five layers


# --- the model and its processor ------------------------------------------------------------------


@cache
def build_processor() -> LlavaOnevisionProcessor:
    """The LLaVA-OneVision processor with a word-level tokenizer of lower-case words."""
    size = {"height": VIEW, "width": VIEW}
    colours: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=size,
            image_grid_pinpoints=[list(pinpoint) for pinpoint in scenes.GRID_PINPOINTS],
            **colours,
        ),
        tokenizer=build_tokenizer(*MODALITIES),
        video_processor=LlavaOnevisionVideoProcessor(size=size, **colours),
        num_image_tokens=PER_VIEW,
        vision_feature_select_strategy="full",
        chat_template=model.CHAT_TEMPLATE,
    )


def build_model(seed: int) -> LlavaOnevisionForConditionalGeneration:
    """The model, with the weights of `testbed-next` where shapes agree."""
    torch.manual_seed(seed)
    tokenizer = build_processor().tokenizer
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        image_size=VIEW,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        **tokens,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[list(pinpoint) for pinpoint in scenes.GRID_PINPOINTS],
        tie_word_embeddings=False,
        dtype="float32",
        **tokens,
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**tokens, max_new_tokens=4, do_sample=False)
    warm_start(model, teacher())
    return model


@cache
def teacher() -> LlavaNextForConditionalGeneration:
    """The model `testbed-next`."""
    folder = testbed.path("testbed-next")
    model: LlavaNextForConditionalGeneration
    model = LlavaNextForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    model.eval()
    return model


@torch.no_grad()
def warm_start(
    model: LlavaOnevisionForConditionalGeneration, source: LlavaNextForConditionalGeneration
) -> None:
    """Copy weights of equal shape; new biases start at zero, new words at random."""
    old, new = source.state_dict(), model.state_dict()
    copied = {
        name: value
        for name, value in old.items()
        if value.shape == getattr(new.get(name), "shape", None)
    }
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        words = old[name]
        rows = words.mean(0) + words.std() * torch.randn_like(new[name])
        rows[: len(words)] = words  # the first words have the same ids
        copied[name] = rows
    tower = "model.vision_tower.embeddings"
    patches = f"{tower}.patch_embedding.weight"
    # SigLIP does not normalise its embeddings: scale them like the normalised ones of CLIP.
    scale = old["model.vision_tower.pre_layrnorm.weight"].mean() / (
        old[patches].std() * math.sqrt(3 * PATCH * PATCH)
    )
    copied[patches] = scale * old[patches]
    copied[f"{tower}.position_embedding.weight"] = (
        scale * old[f"{tower}.position_embedding.weight"][1:]
    )
    zeros = {n: torch.zeros_like(v) for n, v in new.items() if n.endswith("_proj.bias")}
    missing = model.load_state_dict({**zeros, **copied}, strict=False).missing_keys
    unexpected = [name for name in missing if "post_layernorm" not in name]
    if unexpected != [f"{tower}.patch_embedding.bias"]:
        raise RuntimeError(f"testbed-next lacks weights for {unexpected}")
    model.model.vision_tower.embeddings.patch_embedding.bias.zero_()


# --- clips and pairs as tensors -------------------------------------------------------------------


# A frame, or an image of a pair: one view of the size of a crop.  Its thumbnail, view 0 of every
# geometry, shows the same and is not used.
ONE_VIEW = Geometry((1, 1), (0, 0), torch.arange(2 * PER_VIEW), torch.arange(2 * PER_VIEW) // SIDE)


def sequence(views: int, side: int, *, newlines: bool) -> Geometry:
    """The geometry of views of `side` x `side` tokens in a row, for `drop_tokens`.

    Args:
        views: Frames of a video, or images of a pair.
        side: Tokens along a view.
        newlines: Whether a separator follows every view (images) or only the last one (video).
    """
    index, end = corner(side), torch.tensor([-1])
    rows = index // SIDE
    order, row = [], []
    for view in range(views):
        order += [view * PER_VIEW + index, end] if newlines else [view * PER_VIEW + index]
        row += [view * side + rows, view * side + rows[-1:]] if newlines else [view * side + rows]
    if not newlines:
        order, row = [*order, end], [*row, row[-1][-1:]]
    return Geometry((1, views - 1), (0, 0), torch.cat(order), torch.cat(row))


def corner(side: int) -> Tensor:
    """Indices (side * side,) of the patches in the upper left corner of a view."""
    line = torch.arange(side)
    return (line[:, None] * SIDE + line).flatten()


def encode(model: LlavaOnevisionForConditionalGeneration, views: Tensor) -> Tensor:
    """Patch features for the projector, (b, v, 144, d)."""
    out = model.model.vision_tower(views.flatten(0, 1), output_hidden_states=True)
    patches: Tensor = out.hidden_states[model.config.vision_feature_layer]
    patches = patches.unflatten(0, (len(views), -1))
    return patches


def one_view(batch: list[Scene], device: torch.device) -> Tensor:
    """Pixels (b, 3, 60, 60) of scenes of one view."""
    views: Tensor = to_views(batch, ONE_VIEW, device)[:, 1]
    return views


def pool(frames: Tensor) -> Tensor:
    """Pool the tokens (..., 144, d) of frames as LLaVA-OneVision does: (..., 36, d)."""
    grid = rearrange(frames.flatten(0, -3), "n (r c) d -> n d r c", r=SIDE)
    small = F.interpolate(grid, size=(POOLED, POOLED), mode="bilinear")
    pooled: Tensor = rearrange(small, "n d r c -> n (r c) d").unflatten(0, frames.shape[:-2])
    return pooled


def pooled_truth(batch: list[Scene]) -> tuple[Tensor, Tensor]:
    """True labels of the pooled tokens of one-view scenes.

    Returns:
        (b, 36, 3) shape, colour and digit of the object, -1 for none; and (b, 36) bool, whether
        the label is certain.
    """
    most = max(1, *(len(scene.items) for scene in batch))
    owner = torch.from_numpy(np.stack([scene.owner for scene in batch]))
    masks = (owner[:, None] == torch.arange(most)[:, None, None]).float()
    cover = F.interpolate(F.avg_pool2d(masks, PATCH), size=(POOLED, POOLED), mode="bilinear")
    share, which = cover.flatten(2).max(dim=1)
    table = torch.full((len(batch), most, 3), -1)
    for i, scene in enumerate(batch):
        for j, item in enumerate(scene.items):
            colour = list(scenes.COLOURS).index(item.colour)
            table[i, j] = torch.tensor([scenes.SHAPES.index(item.shape), colour, item.digit])
    truth = table.gather(1, which[..., None].expand(-1, -1, 3))
    truth[share < 0.3] = -1
    return truth, (share < 0.05) | (share >= 0.3)


# --- stage 1: the vision encoder ------------------------------------------------------------------

POOLED_CLASSES = (len(scenes.SHAPES) + 1, len(scenes.COLOURS) + 1, 11)


def train_vision(run: "OnevisionRun") -> None:
    model = run.model
    skill_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, sum(SKILLS.values())))
    pooled_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, sum(POOLED_CLASSES)))
    modules = {**run.parts("vision"), "skills": skill_head, "pooled": pooled_head}
    for module in modules.values():
        module.to(run.device)
    optimisers = Optimisers(modules.values(), 2e-3, run.steps["vision"], fall=0.6)
    meter = run.meter("vision")
    recipe = Recipe(6, items=(2, 6), sign=0.7)
    source = teacher()
    nn.Module.to(source, run.device)
    for rng in steps_of(run, "vision", modules, optimisers):
        batch = recipe.draw(rng)
        geo = geometry(batch[0].size)
        views = to_views(batch, geo, run.device)
        labels = to_labels(batch, geo, run.device)
        patches = encode(model, views)
        loss = skill_loss(skill_head(patches), labels, meter)
        with torch.no_grad():
            wanted = source.model.multi_modal_projector(first.encode(source, views)[0])
        clear = labels.sure[..., 0]
        error = (model.model.multi_modal_projector(patches) - wanted)[clear].square().mean()
        error = error / (wanted - wanted.mean((0, 1, 2)))[clear].square().mean()
        meter.add("relative error", error)
        loss = loss + 2 * error

        alone = [scene for _ in range(6) for scene in scenes.render_clip(rng).frames[1::2]]
        alone += [scene for _ in range(4) for scene in scenes.render_pair(rng).scenes]
        seen = encode(model, one_view(alone, run.device)[:, None])
        truth = to_labels(alone, ONE_VIEW, run.device)
        crops = Labels(truth.patches[:, 1:], truth.sure[:, 1:], truth.shown[:, 1:])
        loss = loss + skill_loss(skill_head(seen), crops, meter)
        loss = loss + pooled_loss(pooled_head(pool(seen)[:, 0]), alone, meter)
        meter.add("loss", loss)
        optimisers.step(loss)


def pooled_loss(guesses: Tensor, batch: list[Scene], meter: Meter) -> Tensor:
    """Cross-entropy of the logits (b, 36, classes) of pooled tokens for the object they show."""
    truth, sure = (x.to(guesses.device) for x in pooled_truth(batch))
    loss = guesses.new_zeros(())
    for index, part in enumerate(guesses.split(POOLED_CLASSES, dim=-1)):
        label = truth[..., index] + 1
        losses = F.cross_entropy(part[sure], label[sure], reduction="none")
        shown = label[sure] > 0
        loss = loss + 2 * losses[shown].mean() + 0.5 * losses[~shown].mean()
        name = ("pooled shape", "pooled colour", "pooled digit")[index]
        meter.add(name, (part[sure].argmax(-1) == label[sure])[shown])
    return loss


# --- stage 2: answering ---------------------------------------------------------------------------

# Number of questions of each kind that are packed after one image, clip or pair.
PORTIONS: dict[Modality, dict[str, int]] = {
    "image": quiz.PORTIONS,
    "video": {"existence": 2, "digit": 3, "first": 2, "last": 2, "motion": 4},
    "multi-image": {"existence": 3, "digit": 3, "which": 3, "both": 3},
}


WEIGHTS: dict[Modality, dict[str, float]] = {
    "image": quiz.image_weights(3.0),
    "video": dict.fromkeys(MODALITIES["video"], 1.0),
    "multi-image": dict.fromkeys(MODALITIES["multi-image"], 1.0),
}


SHARES: dict[Modality, float] = {"image": 0.35, "video": 0.45, "multi-image": 0.2}


# Shares of `quiz.SCHEMES`.
DROPOUT: dict[Modality, Dropout] = {
    "image": quiz.HARSH,
    "video": Dropout((0.25, 0.20, 0.0, 0.0, 0.10, 0.10, 0.35), ((0.05, 0.3), (0.05, 0.9))),
    "multi-image": Dropout((0.25, 0.25, 0.0, 0.0, 0.0, 0.15, 0.35), ((0.1, 0.4), (0.1, 0.9))),
}


@dataclass(frozen=True)
class Batch:
    """Images, clips or pairs, with questions.

    Attributes:
        modality: Of all of them.
        views: (b, v, 3, 60, 60) pixels.
        geo: How their tokens are packed.
        shown: (b, N) bool, whether a token shows an object, the sign or a digit.
        quiz: The questions.
        patches: True labels of the patches of images.
    """

    modality: Modality
    views: Tensor
    geo: Geometry
    shown: Tensor
    quiz: Quiz
    patches: Tensor | None = None


IMAGES = Recipe(8, alike=0.5, related=True)


def draw(modality: Modality, rng: np.random.Generator, device: torch.device) -> Batch:
    """Draw images of one size, clips of one length, or pairs, with questions."""
    if modality == "image":
        return draw_images(rng, device)
    count, portions = IMAGES.count, PORTIONS[modality]
    kinds = [kind for kind, number in portions.items() for _ in range(number)]
    index = [list(WEIGHTS[modality]).index(kind) for kind in kinds]
    if modality == "video":
        length = int(rng.integers(4, 9))
        clips = [scenes.render_clip(rng, frames=length) for _ in range(count)]
        asked = [[scenes.ask_clip(clip, kind, rng) for kind in kinds] for clip in clips]
        views = [scene for clip in clips for scene in clip.frames]
        things = [[track.item for track in clip.tracks] for clip in clips]
        geo = sequence(length, POOLED, newlines=False)
        objects = pooled_truth(views)[0][..., 0] >= 0
        shown = torch.zeros(len(views), PER_VIEW, dtype=torch.bool)
        shown[:, corner(POOLED)] = objects
    else:
        pairs = [scenes.render_pair(rng) for _ in range(count)]
        asked = [[scenes.ask_pair(pair, kind, rng) for kind in kinds] for pair in pairs]
        views = [scene for pair in pairs for scene in pair.scenes]
        things = [
            [item for s in pair.scenes for item in s.items if item.name != pair.shared]
            for pair in pairs
        ]
        geo = sequence(2, SIDE, newlines=True)
        labels = to_labels(views, ONE_VIEW, torch.device("cpu")).patches[:, 1]
        shown = (labels[..., 0] > 0) | (labels[..., 2] > 0)
    facts = [[known(i, *one) for one in some] for i, some in zip(things, asked, strict=True)]
    return Batch(
        modality,
        one_view(views, device).unflatten(0, (count, -1)),
        geo,
        F.pad(shown.unflatten(0, (count, -1)).flatten(1), (0, 1))[:, geo.order],
        to_quiz(asked, index, facts, build_processor().tokenizer).to(device),
    )


def draw_images(rng: np.random.Generator, device: torch.device) -> Batch:
    """Draw images of one size with questions."""
    kinds = [kind for kind, number in PORTIONS["image"].items() for _ in range(number)]
    index = [list(WEIGHTS["image"]).index(kind) for kind in kinds]
    batch = IMAGES.draw(rng)
    asked = [[scenes.ask(scene, kind, rng) for kind in kinds] for scene in batch]
    facts = [[quiz.look(s, q) for q, _ in some] for s, some in zip(batch, asked, strict=True)]
    geo = geometry(batch[0].size)
    patches = to_labels(batch, geo, torch.device("cpu")).patches
    return Batch(
        "image",
        to_views(batch, geo, device),
        geo,
        visible(geo, patches),
        to_quiz(asked, index, facts, build_processor().tokenizer).to(device),
        patches,
    )


def known(items: list[scenes.Item], question: str, answer: str) -> tuple[int, ...]:
    """`Quiz.facts` of a question about a clip or pair; only a moving object has a side."""
    facts = dict.fromkeys(quiz.FACTS, quiz.UNKNOWN)
    named = [item for item in items if item.name in question]
    if named:
        facts |= {"present": 1, "its digit": named[0].digit}
        if "move" in question:
            facts["right"] = int(answer == "right")
    elif "both" not in question:
        facts["present"] = 0
    return tuple(facts.values())


def visual(model: LlavaOnevisionForConditionalGeneration, batch: Batch) -> Tensor:
    """The packed sequence (b, N, d), packed as the model does."""
    inner = model.model
    with torch.no_grad():
        patches = encode(model, batch.views)
    projected, newline = inner.multi_modal_projector(patches), inner.image_newline
    if batch.modality != "video":
        return pack(projected, newline, batch.geo)
    return torch.cat([pool(projected).flatten(1, 2), newline.expand(len(projected), 1, -1)], dim=1)


def train_joint(run: "OnevisionRun") -> None:
    model = run.model
    modules = {**run.parts("joint"), **first.heads(run)}
    optimisers = Optimisers(modules.values(), 1e-3, run.steps["joint"])
    meter = run.meter("joint")
    for rng in steps_of(run, "joint", modules, optimisers):
        names = list(SHARES)
        modality = names[rng.choice(len(names), p=list(SHARES.values()))]
        batch = draw(modality, rng, run.device)
        kept = drop_tokens(batch.geo, batch.shown, rng, DROPOUT[modality])
        tokens = visual(model, batch)
        early: list[Tensor] = []
        compact = rng.random() < 0.5
        logits = answer_logits(
            model, tokens, kept.to(run.device), batch.quiz, compact=compact, early=early
        )
        weights = {f"{modality} {kind}": value for kind, value in WEIGHTS[modality].items()}
        loss = quiz_loss(logits, batch.quiz, meter, intact=kept.intact, weights=weights)
        loss = loss + 0.25 * fact_loss(early, modules["facts"], batch.quiz, meter)
        if batch.patches is not None:
            opens = openers(batch.geo, batch.patches, kept).to(run.device)
            valid = kept.valid.to(run.device)
            loss = loss + 0.25 * marker_loss(early, modules["marker"], opens, valid, meter)
        optimisers.step(loss)


STAGES: dict[str, Callable[["OnevisionRun"], None]] = {"vision": train_vision, "joint": train_joint}


STEPS = {"vision": 400, "joint": 1500}


class OnevisionRun(first.TrainingRun):
    """A training run of the second testbed."""

    stages: ClassVar[dict[str, Callable[[Any], None]]] = STAGES

    def build(self, seed: int) -> LlavaOnevisionForConditionalGeneration:
        return build_model(seed)

    def parts(self, stage: str) -> dict[str, nn.Module]:
        inner = self.model.model
        projector = {"projector": inner.multi_modal_projector}
        if stage == "vision":
            return {"tower": inner.vision_tower, **projector}
        newline = nn.ParameterList([inner.image_newline])
        language = {"language": inner.language_model, "head": self.model.lm_head}
        return {**language, **projector, "newline": newline}


# --- command line ---------------------------------------------------------------------------------


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run, or the model with --evaluate.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves the default.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of training scenes and new weights.")] = 0,
    scale: Annotated[float, typer.Option(help="Factor on the steps of every stage.")] = 1.0,
    questions: Annotated[int, typer.Option(help="Questions of each kind for the figures.")] = 300,
    evaluate_only: Annotated[
        bool, typer.Option("--evaluate", help="Only print figures of the model in OUT.")
    ] = False,
    test_seed: Annotated[int, typer.Option(help="Seed of the held-out questions.")] = 1000,
) -> None:
    """Train the second testbed from the first, or print the figures of an existing one."""
    if threads:
        torch.set_num_threads(threads)
    if evaluate_only:
        evaluate(out, questions, test_seed, device)
        return
    check_photographs()
    started = time.monotonic()
    steps = {name: max(1, round(n * scale)) for name, n in STEPS.items()}
    run = OnevisionRun(out, device, seed, steps)
    for stage in STAGES:
        run.do(stage)
    folder = out / "model"
    model.export(run.model, build_processor(), folder)
    print(f"trained in {time.monotonic() - started:.0f} s", flush=True)
    record = {
        "seed": seed,
        "test_seed": test_seed,
        "questions_per_kind": questions,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "warm start": "testbed-next",
        "stages": {
            stage: json.loads((out / "stages" / f"{stage}.json").read_text()) for stage in STAGES
        },
        "accuracy": evaluate(folder, questions, test_seed, device),
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
