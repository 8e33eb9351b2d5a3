"""Train `testbed-qwen`, the embedded Qwen2.5-VL of two million parameters.

    python -m tokenprune.experiments.training.testbed_qwen --start OLD --out runs/testbed-qwen

Images enter at their native resolution: no thumbnail, no crops, one token for 6 x 6 pixels.  The
decoder starts from the weights of `testbed-onevision`.  The vision encoder starts from that of the
earlier version of the model (8 x 8 pixels a token), or at random without `--start`; at random it
needs three times the steps.

1. language   the decoder learns 3-D position ids on *ideal* embeddings made of the true labels;
2. vision     the vision encoder labels every token (shape, colour, digit, row, column);
3. projector  the merger learns to map vision features to the ideal embeddings;
4. joint      merger and decoder answer from pixels.

In stages 1 and 4 most batches drop visual tokens (`drop_tokens`).  The kept share of tokens that
show an object and the kept share of the others are drawn independently of each other, from the
true scenes.  No method's score plays a part.  `OUT/stages` keeps finished stages, and the state of
the running stage every 100 steps: the same command continues after an interruption.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import transformers
import typer
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.vision_utils import get_vision_window_index

from tokenprune.experiments.training import model as common
from tokenprune.experiments.training import testbed_next as first
from tokenprune.experiments.training.geometry import (
    SKILLS,
    Labels,
    legible,
    masks_of,
    named,
    written,
)
from tokenprune.experiments.training.loop import Recipe, steps_of
from tokenprune.experiments.training.measure import evaluate_images, table
from tokenprune.experiments.training.model import SIDE, WIDTH
from tokenprune.experiments.training.optim import Optimisers
from tokenprune.experiments.training.quiz import (
    Quiz,
    build_fact_head,
    fact_loss,
    image_weights,
    make_quiz,
    packed_logits,
    quiz_loss,
)
from tokenprune.models import testbed
from tokenprune.models.testbed.drawing import check_photographs
from tokenprune.models.testbed.scenes import MODALITIES, Scene

PATCH = 3
MERGE = 2
TOKEN = PATCH * MERGE  # pixels along the square that one visual token shows
LAYERS = 4
WINDOW = 24  # pixels along the windows of layers without global attention
GLOBAL = (1, 3)  # layers with global attention

CHAT_TEMPLATE = common.CHAT_TEMPLATE.replace(
    "'<' + part.type + '>'", "'<|vision_start|><' + part.type + '><|vision_end|>'"
)


# --- the model and its processor ------------------------------------------------------------------


@cache
def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of testbed-onevision and the two marks around an image."""
    marks = {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    return common.build_tokenizer(*MODALITIES, marks=marks)


@cache
def build_processor() -> Qwen2_5_VLProcessor:
    """The Qwen2.5-VL processor with a word-level tokenizer of lower-case words."""
    options: dict[str, Any] = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "size": {"shortest_edge": 30 * 30, "longest_edge": 192 * 192},
    }
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**options),
        tokenizer=build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**options),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """The model; its decoder has the weights of `testbed-onevision`, new words are random."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    named: Any = tokenizer.convert_tokens_to_ids
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": LAYERS,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": WINDOW,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": list(GLOBAL),
        "initializer_range": 0.06,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        # Sixteen frequencies of a head: four for time, six for rows, six for columns.  The base is
        # small because columns, which get the lowest frequencies, number twenty and not hundreds.
        "rope_parameters": {"rope_type": "default", "rope_theta": 20.0, "mrope_section": [4, 6, 6]},
        **tokens,
    }
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=named("<image>"),
        video_token_id=named("<video>"),
        vision_start_token_id=named("<|vision_start|>"),
        vision_end_token_id=named("<|vision_end|>"),
        tie_word_embeddings=False,
        dtype="float32",
        **tokens,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(**tokens, max_new_tokens=4, do_sample=False)
    warm_start(model)
    return model


@torch.no_grad()
def warm_start(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Copy the decoder of `testbed-onevision`; new words start at random."""
    source = LlavaOnevisionForConditionalGeneration.from_pretrained(
        testbed.path("testbed-onevision"), dtype=torch.float32, trust_remote_code=False
    )
    new = model.state_dict()
    copied = {
        name: value
        for name, value in source.state_dict().items()
        if "language_model" in name or "lm_head" in name
    }
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        words = copied[name]
        rows = words.mean(0) + words.std() * torch.randn_like(new[name])
        rows[: len(words)] = words  # the first words have the same ids
        copied[name] = rows
    missing = model.load_state_dict(copied, strict=False).missing_keys
    unexpected = [name for name in missing if ".visual." not in name]
    if unexpected:
        raise RuntimeError(f"testbed-onevision lacks weights for {unexpected}")


@torch.no_grad()
def grow_encoder(model: Qwen2_5_VLForConditionalGeneration, folder: Path) -> None:
    """Copy the vision encoder of the earlier version, for patches of `PATCH` pixels."""
    source = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    old = source.model.visual.state_dict()
    kernel = old["patch_embed.proj.weight"]  # (d, 3, 2 images, p, p)
    flat = first.resampled_patches(kernel.flatten(1, 2), PATCH)
    old["patch_embed.proj.weight"] = flat.unflatten(1, kernel.shape[1:3])
    model.model.visual.load_state_dict(old)


# --- scenes as tensors ----------------------------------------------------------------------------


def to_patches(batch: list[Scene], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixels (patches of all scenes, C * 2 * 3 * 3) and grids (b, 3), as the processor makes them.

    The scenes have one size.
    """
    images = torch.from_numpy(np.stack([scene.pixels for scene in batch])).to(device)
    pixels = (images.float() / 255 - 0.5) / 0.25
    patches = rearrange(
        pixels,
        "b (R m p) (C n q) c -> (b R C m n) c p q",
        m=MERGE,
        n=MERGE,
        p=PATCH,
        q=PATCH,
    )
    patches = repeat(patches, "s c p q -> s (c t p q)", t=2)
    height, width = batch[0].size
    grid = torch.tensor([1, height // PATCH, width // PATCH], device=device)
    return patches, grid.expand(len(batch), 3)


def token_labels(batch: list[Scene], device: torch.device) -> Labels:
    """True labels of the visual tokens of scenes of one size, as one view (b, 1, N, skills).

    Rows and columns are counted in twelfths of the image.
    """
    rows, columns = (side // TOKEN for side in batch[0].size)
    cover = F.avg_pool2d(masks_of(batch), TOKEN).flatten(2)[:, :, None]
    which, shape, colour, clear = named(batch, cover)
    inked, share = (part.flatten(1)[:, None] for part in written(batch, (rows, columns), TOKEN))
    read, sure = legible(share)
    place = torch.arange(rows * columns).expand_as(shape)
    row, column = SIDE * (place // columns) // rows, SIDE * (place % columns) // columns
    patches = torch.stack([shape, colour, torch.where(read, inked, 0), row, column], dim=-1)
    certain = torch.stack([clear, clear, sure, clear | True, clear | True], dim=-1)
    things = torch.arange(cover.shape[1])[:, None, None]
    shown = (which[:, None] == things).any(-1).transpose(1, 2)
    return Labels(*(x.to(device) for x in (patches, certain, shown)))


def features(
    model: Qwen2_5_VLForConditionalGeneration, batch: list[Scene], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Vision features (b, N, 4 d) in front of the merger, and embeddings (b, N, d)."""
    pixels, grid = to_patches(batch, device)
    visual = model.model.visual
    out = visual(pixels, grid_thw=grid)
    window_index, _ = get_vision_window_index(
        grid, spatial_merge_size=MERGE, window_size=WINDOW, patch_size=PATCH
    )
    patches = rearrange(out.last_hidden_state, "(t m) d -> t (m d)", m=MERGE * MERGE)
    patches = patches[window_index.argsort()]
    b = len(batch)
    return patches.unflatten(0, (b, -1)), out.pooler_output.unflatten(0, (b, -1))


# --- answering packed questions -------------------------------------------------------------------


def drop_tokens(shown: Tensor, grid: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """Indices (b, K) of the kept visual tokens.

    The batch shares one scheme: nothing dropped (30 %), random tokens (20 %), whole rows or
    columns (10 %), or a fixed number of tokens of which each scene draws by itself how large a
    share of its objects is kept first (40 %; all of it in two fifths of the scenes).  Seven in ten
    retention ratios are below one half.

    Args:
        shown: (b, N) bool, whether a token shows an object or a digit.
        grid: Rows and columns of the tokens.
        rng: Source of all randomness.
    """
    b, number = shown.shape
    scheme = rng.choice(4, p=(0.3, 0.2, 0.1, 0.4))
    noise = rng.random((b, number))
    low, high = ((0.05, 0.4), (0.05, 0.9))[int(rng.integers(2))]
    count = max(4, round(rng.uniform(low, high) * number))
    if scheme == 0:
        count = number
    elif scheme == 2:
        line = np.arange(number) // grid[1] if rng.random() < 0.5 else np.arange(number) % grid[1]
        lines = int(line.max()) + 1
        kept = rng.permutation(lines)[: max(2, round(rng.uniform(0.2, 0.9) * lines))]
        inside = np.isin(line, kept)
        noise, count = noise - 2 * inside, int(inside.sum())
    elif scheme == 3:
        share = np.where(rng.random((b, 1)) < 0.4, 1.0, rng.random((b, 1)))
        chosen = shown.cpu().numpy() & (rng.random((b, number)) < share)
        noise = noise - chosen
    best = np.sort(noise.argsort(axis=1)[:, :count], axis=1)
    return torch.from_numpy(best)


def answer_logits(
    model: Qwen2_5_VLForConditionalGeneration,
    visual: Tensor,
    keep: Tensor,
    grid: tuple[int, int],
    quiz: Quiz,
    early: list[Tensor],
) -> Tensor:
    """Logits (b, Q, L, vocabulary); kept tokens keep their 3-D position ids.

    Args:
        visual: (b, N, d) embeddings.
        keep: (b, K) indices of the kept visual tokens.
        grid: Rows and columns of the tokens.
        quiz: Questions about the scenes.
        early: Receives the states (b, Q, L, d) of the questions after the layers `EARLY`.
    """
    b, questions, length = quiz.ids.shape
    device = visual.device
    ids = build_tokenizer()("<s><user><|vision_start|><|vision_end|>", return_tensors="pt")
    marks = model.model.language_model.embed_tokens(ids.input_ids.to(device)).expand(b, -1, -1)
    kept = visual.gather(1, repeat(keep, "b k -> b k d", d=visual.shape[-1]))
    start = torch.cat([marks[:, :3], kept, marks[:, 3:]], dim=1)

    image = torch.stack([torch.zeros_like(keep), keep // grid[1], keep % grid[1]])
    after = 3 + max(grid)

    def text(first: int, count: int, times: int = 1) -> Tensor:
        line = (first + torch.arange(count, device=device)).repeat(times)
        return line.expand(3, b, -1)

    parts = [text(0, 3), 3 + image, text(after, 1), text(after + 1, length, questions)]
    seen = torch.ones(start.shape[:2], dtype=torch.bool, device=device)
    return packed_logits(model, start, seen, quiz, torch.cat(parts, dim=2), early)


# --- stages ---------------------------------------------------------------------------------------


def grid_of(batch: list[Scene]) -> tuple[int, int]:
    """Rows and columns of the visual tokens of scenes of one size."""
    height, width = batch[0].size
    return height // TOKEN, width // TOKEN


def train_language(run: "QwenRun") -> None:
    model, fact_head = run.model, build_fact_head().to(run.device)
    modules = {**run.parts("language"), "facts": fact_head}
    optimisers = Optimisers(modules.values(), 1.5e-3, run.steps["language"])
    meter = run.meter("language")
    for rng in steps_of(run, "language", modules, optimisers):
        batch = Recipe(8, alike=0.3, related=True).draw(rng)
        labels = token_labels(batch, run.device).patches[:, 0]
        shown = (labels[..., 0] > 0) | (labels[..., 2] > 0)
        keep = drop_tokens(shown, grid_of(batch), rng).to(run.device)
        quiz = make_quiz(batch, rng, run.device)
        early: list[Tensor] = []
        logits = answer_logits(model, run.ideal(labels), keep, grid_of(batch), quiz, early)
        intact = keep.shape[1] == labels.shape[1]
        loss = quiz_loss(logits, quiz, meter, intact=intact, weights=image_weights(3.0))
        loss = loss + 0.5 * fact_loss(early, fact_head, quiz, meter)
        optimisers.step(loss)


def train_vision(run: "QwenRun") -> None:
    skill_head = nn.Sequential(
        nn.LayerNorm(WIDTH * MERGE**2), nn.Linear(WIDTH * MERGE**2, sum(SKILLS.values()))
    ).to(run.device)
    modules = {**run.parts("vision"), "skills": skill_head}
    optimisers = Optimisers(modules.values(), 2e-3, run.steps["vision"], fall=0.6)
    meter = run.meter("vision")
    for rng in steps_of(run, "vision", modules, optimisers):
        batch = Recipe(6, items=(2, 6), sign=0.7).draw(rng)
        labels = token_labels(batch, run.device)
        patches, _ = features(run.model, batch, run.device)
        loss = first.skill_loss(skill_head(patches)[:, None], labels, meter)
        meter.add("loss", loss)
        optimisers.step(loss)


def train_projector(run: "QwenRun") -> None:
    merger = run.model.model.visual.merger
    modules = run.parts("projector")
    optimisers = Optimisers(modules.values(), 3e-3, run.steps["projector"])
    meter = run.meter("projector")
    for rng in steps_of(run, "projector", modules, optimisers):
        batch = Recipe(12).draw(rng)
        labels = token_labels(batch, run.device)
        with torch.no_grad():
            patches, _ = features(run.model, batch, run.device)
            wanted = run.ideal(labels.patches[:, 0])
        made = merger(rearrange(patches, "b n (m d) -> (b n m) d", d=WIDTH)).view_as(wanted)
        clear = labels.sure[:, 0, :, 0]
        error = (made - wanted)[clear].square().mean()
        error = error / (wanted - wanted.mean((0, 1)))[clear].square().mean()
        meter.add("relative error", error)
        optimisers.step(error)


def train_joint(run: "QwenRun") -> None:
    model, fact_head = run.model, build_fact_head().to(run.device)
    merger = model.model.visual.merger
    modules = {**run.parts("joint"), "facts": fact_head}
    optimisers = Optimisers(modules.values(), 1e-3, run.steps["joint"])
    meter = run.meter("joint")
    for rng in steps_of(run, "joint", modules, optimisers):
        batch = Recipe(8, alike=0.5, related=True).draw(rng)
        labels = token_labels(batch, run.device).patches[:, 0]
        shown = (labels[..., 0] > 0) | (labels[..., 2] > 0)
        keep = drop_tokens(shown, grid_of(batch), rng).to(run.device)
        quiz = make_quiz(batch, rng, run.device)
        with torch.no_grad():
            patches, _ = features(model, batch, run.device)
        visual = merger(rearrange(patches, "b n (m d) -> (b n m) d", d=WIDTH))
        visual = visual.unflatten(0, (len(batch), -1))
        early: list[Tensor] = []
        logits = answer_logits(model, visual, keep, grid_of(batch), quiz, early)
        intact = keep.shape[1] == visual.shape[1]
        loss = quiz_loss(logits, quiz, meter, intact=intact, weights=image_weights(3.0))
        loss = loss + 0.25 * fact_loss(early, fact_head, quiz, meter)
        optimisers.step(loss)


STAGES: dict[str, Callable[["QwenRun"], None]] = {
    "language": train_language,
    "vision": train_vision,
    "projector": train_projector,
    "joint": train_joint,
}

STEPS = {"language": 600, "vision": 2500, "projector": 200, "joint": 1000}


class QwenRun(first.TrainingRun):
    """A training run of the third testbed."""

    stages: ClassVar[dict[str, Callable[[Any], None]]] = STAGES

    def build(self, seed: int) -> Qwen2_5_VLForConditionalGeneration:
        return build_model(seed)

    def grow(self, start: Path) -> None:
        grow_encoder(self.model, start)

    def tick(self, step: int, steps: int) -> None:
        """Count a step, and print the figures of the last ones now and then."""
        self._meter.tick(step, steps)

    def parts(self, stage: str) -> dict[str, nn.Module]:
        inner = self.model.model
        language = {"language": inner.language_model, "head": self.model.lm_head}
        projector = {"projector": inner.visual.merger}
        tower = {"patches": inner.visual.patch_embed, "tower": inner.visual.blocks}
        return {
            "language": {**language, "ideal": self.ideal},
            "vision": tower,
            "projector": projector,
            "joint": {**language, **projector},
        }[stage]


# --- command line ---------------------------------------------------------------------------------


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run, or the model with --evaluate.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves the default.")] = 0,
    start: Annotated[Path | None, typer.Option(help="Folder of the earlier version.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of new weights and training scenes.")] = 0,
    stages: Annotated[
        str, typer.Option(help="Stages to run, in order, separated by commas.")
    ] = ",".join(STEPS),
    scale: Annotated[float, typer.Option(help="Factor on the steps of every stage.")] = 1.0,
    questions: Annotated[int, typer.Option(help="Questions of each kind for the figures.")] = 300,
    evaluate_only: Annotated[
        bool, typer.Option("--evaluate", help="Only print figures of the model in OUT.")
    ] = False,
    test_seed: Annotated[int, typer.Option(help="Seed of the held-out questions.")] = 1000,
) -> None:
    """Train the third testbed, or print the figures of an existing one."""
    if threads:
        torch.set_num_threads(threads)
    if evaluate_only:
        print(table(evaluate_images(out, questions, test_seed, device), questions))
        return
    check_photographs()
    steps = {name: max(1, round(n * scale)) for name, n in STEPS.items()}
    run = QwenRun(out, device, seed, steps, start)
    wanted = stages.split(",")
    for stage in wanted:
        run.do(stage)
    if "joint" not in wanted:
        return
    folder = out / "model"
    common.export(run.model, build_processor(), folder)
    figures = evaluate_images(folder, questions, test_seed, device)
    print(table(figures, questions))
    record = {
        "seed": seed,
        "test_seed": test_seed,
        "questions_per_kind": questions,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "warm start": "testbed-onevision",
        "stages": {
            stage: json.loads((out / "stages" / f"{stage}.json").read_text()) for stage in STEPS
        },
        "accuracy": figures,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
