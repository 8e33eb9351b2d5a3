"""Train `testbed-next`, the embedded LLaVA-NeXT of 1.7 million parameters.

    python -m tokenprune.experiments.training.testbed_next --start OLD --out runs/testbed-next

It starts from the first version of the model (7 x 7 tokens a view).  Patch and position embeddings
are resampled to views of 12 x 12 tokens, as FlexiViT does (Beyer et al., 2023); the language model
already knows the task.  Each stage trains one skill:

1. vision     the vision encoder labels every patch (shape, colour, digit, place); its [CLS] token
              learns to match captions of the views;
2. language   the decoder answers from *ideal* patch embeddings made of the true labels;
3. projector  the projector learns to map vision features to those ideal embeddings;
4. joint      projector and decoder answer from pixels.

In stages 2 and 4 two small heads, which are thrown away, make look-up and counting emerge: from
middle layers they must tell facts about the object that a question names (`fact_loss`), and which
visual token is the first of its object (`marker_loss`).  Most batches drop visual tokens
(`drop_tokens`), with compact and with original position ids.  No method's score plays a part.

`OUT/stages` keeps finished stages, and the state of the running stage every 100 steps: the same
command continues after an interruption.  Stages 1 and 2 are independent and may run in parallel
(`--stages`).
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
import transformers
import typer
from einops import rearrange
from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration, PreTrainedModel

from tokenprune.experiments.training.captions import CaptionLoss, captions
from tokenprune.experiments.training.evaluate import evaluate, table
from tokenprune.experiments.training.geometry import (
    SKILLS,
    THINGS,
    Geometry,
    Labels,
    geometry,
    to_labels,
    to_views,
)
from tokenprune.experiments.training.loop import Recipe, save, steps_of
from tokenprune.experiments.training.model import (
    PATCH,
    SIDE,
    WIDTH,
    build_model,
    build_processor,
    export,
)
from tokenprune.experiments.training.optim import Meter, Optimisers
from tokenprune.experiments.training.quiz import (
    DRILL,
    GENTLE,
    HARSH,
    PORTIONS,
    answer_logits,
    brief,
    build_fact_head,
    build_marker,
    drop_tokens,
    fact_loss,
    image_weights,
    make_quiz,
    marker_loss,
    openers,
    quiz_loss,
    visible,
)
from tokenprune.models.testbed import scenes
from tokenprune.models.testbed.drawing import check_photographs

# --- stage 1: the vision encoder ------------------------------------------------------------------


def encode(model: LlavaNextForConditionalGeneration, views: Tensor) -> tuple[Tensor, Tensor]:
    """Patch features for the projector, (b, v, 144, d), and pooled CLS tokens, (b, v, d)."""
    b = len(views)
    out = model.model.vision_tower(views.flatten(0, 1), output_hidden_states=True)
    patches = out.hidden_states[model.config.vision_feature_layer][:, 1:]
    return patches.unflatten(0, (b, -1)), out.pooler_output.unflatten(0, (b, -1))


def skill_loss(guesses: Tensor, labels: Labels, meter: Meter) -> Tensor:
    """Cross-entropy of `guesses` (b, v, 144, classes of all skills) at the patches; a scalar."""
    loss = guesses.new_zeros(())
    logits = guesses.split(list(SKILLS.values()), dim=-1)
    for index, (skill, guess) in enumerate(zip(SKILLS, logits, strict=True)):
        sure, truth = labels.sure[..., index], labels.patches[..., index]
        guess, truth = guess[sure], truth[sure]
        losses = F.cross_entropy(guess, truth, reduction="none")
        # Few patches show an object or a digit, so patches with and without are averaged apart.
        shown = truth > 0 if skill in ("shape", "digit") else torch.ones_like(truth) > 0
        weight = 2.0 if skill in ("shape", "digit") else 0.5
        loss = loss + weight * losses[shown].mean()
        if not shown.all():
            loss = loss + losses[~shown].mean()
        meter.add(skill, (guess.argmax(-1) == truth)[shown])
    return loss


def train_vision(run: "TrainingRun") -> None:
    model = run.model
    skill_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, sum(SKILLS.values())))
    modules = {**run.parts("vision"), "skills": skill_head, "captions": CaptionLoss()}
    for module in modules.values():
        module.to(run.device)
    optimisers = Optimisers(modules.values(), 2e-3, run.steps["vision"], fall=0.6)
    meter = run.meter("vision")
    recipe = Recipe(6, items=(2, 6), sign=0.7)
    for rng in steps_of(run, "vision", modules, optimisers):
        batch = recipe.draw(rng)
        geo = geometry(batch[0].size)
        labels = to_labels(batch, geo, run.device)
        patches, pooled = encode(model, to_views(batch, geo, run.device))
        loss = skill_loss(skill_head(patches), labels, meter)
        sentences = captions(batch, labels, rng)
        contrast, found = modules["captions"](pooled.flatten(0, 1), sentences)
        meter.add("captions", found)
        meter.add("loss", loss)
        optimisers.step(loss + contrast)


# --- answering packed questions -------------------------------------------------------------------


class Ideal(nn.Module):
    """Ideal patch embeddings: the sum of one learnt vector per true label.

    Labels with a name start at the embedding of their word, so that one circuit, "find the patches
    that resemble these words", serves all colours and shapes.
    """

    def __init__(self, words: Tensor) -> None:
        super().__init__()
        tables = [nn.Embedding(n, WIDTH) for n in SKILLS.values()]
        self.tables = nn.ModuleList(tables)
        shape, colour, digit = tables[:3]
        named = build_processor().tokenizer.convert_tokens_to_ids
        with torch.no_grad():
            for table in tables:
                nn.init.normal_(table.weight, std=0.1)
            shape.weight[1:] *= 0.5  # thumbnail and crop differ a little
            shape.weight[1:] += words[named(list(THINGS))].repeat(2, 1)
            colour.weight[:-1] = words[named([*scenes.COLOURS, *scenes.TINTS])]
            digit.weight[1:] = words[named(list("0123456789"))]

    def forward(self, patches: Tensor) -> Tensor:
        """Class indices (..., skills) to embeddings (..., d)."""
        return torch.stack([t(patches[..., i]) for i, t in enumerate(self.tables)]).sum(0)


def pack(patches: Tensor, newline: Tensor, geo: Geometry) -> Tensor:
    """Packed sequence (b, N, d) of patch embeddings (b, v, 144, d), in Hugging Face's order."""
    b, _, _, d = patches.shape
    source = torch.cat([patches.flatten(1, 2), newline.expand(b, 1, d)], dim=1)
    return source[:, geo.order.to(patches.device)]  # -1 is the separator


# --- stages 2 to 4 --------------------------------------------------------------------------------


def heads(run: "TrainingRun") -> dict[str, nn.Module]:
    """What tells facts and the first tokens of objects, in training alone."""
    made = {"facts": build_fact_head(), "marker": build_marker()}
    return {name: head.to(run.device) for name, head in made.items()}


def train_language(run: "TrainingRun") -> None:
    model, steps = run.model, run.steps["language"]
    # Two look-ups in a row (words to object, object to answer) emerge slowly unless the first has
    # its own loss: the noun's state in a middle layer must predict all facts about its object.
    modules = {**run.parts("language"), **heads(run)}
    optimisers = Optimisers(modules.values(), 1.5e-3, steps)
    meter = run.meter("language")
    recipe = Recipe(8, alike=0.3, related=True)
    for rng in steps_of(run, "language", modules, optimisers):
        batch = recipe.draw(rng)
        geo = geometry(batch[0].size)
        labels = to_labels(batch, geo, torch.device("cpu"))
        shown = visible(geo, labels.patches)
        short = optimisers.done < 0.5 * steps or rng.random() < 0.3
        kept = brief(shown, rng) if short else drop_tokens(geo, shown, rng, GENTLE)
        quiz = make_quiz(batch, rng, run.device)
        visual = pack(run.ideal(labels.patches.to(run.device)), model.model.image_newline, geo)
        early: list[Tensor] = []
        logits = answer_logits(
            model, visual, kept.to(run.device), quiz, compact=rng.random() < 0.5, early=early
        )
        loss = quiz_loss(
            logits, quiz, meter, intact=short or kept.intact, weights=image_weights(2.0)
        )
        loss = loss + 0.5 * fact_loss(early, modules["facts"], quiz, meter)
        first = openers(geo, labels.patches, kept).to(run.device)
        valid = kept.valid.to(run.device)
        loss = loss + 0.5 * marker_loss(early, modules["marker"], first, valid, meter)
        optimisers.step(loss)


def train_projector(run: "TrainingRun") -> None:
    model, modules = run.model, run.parts("projector")
    projector = model.model.multi_modal_projector
    optimisers = Optimisers(modules.values(), 3e-3, run.steps["projector"])
    meter = run.meter("projector")
    for rng in steps_of(run, "projector", modules, optimisers):
        batch = Recipe(10).draw(rng)
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


DRILLED = 0.4  # share of the steps of stage 4 that are about counting and numbers alone


def train_joint(run: "TrainingRun") -> None:
    model, inner = run.model, run.model.model
    modules = {**run.parts("joint"), **heads(run)}
    optimisers = Optimisers(modules.values(), 1e-3, run.steps["joint"])
    meter = run.meter("joint")
    usual, drill = Recipe(8, alike=0.5, related=True), Recipe(16, alike=0.3)
    for rng in steps_of(run, "joint", modules, optimisers):
        # Counting and reading a number emerge late.  A part of the steps is about them alone, and
        # about more scenes, of which little else is left.
        short = rng.random() < DRILLED
        batch = (drill if short else usual).draw(rng)
        geo = geometry(batch[0].size)
        patches = to_labels(batch, geo, torch.device("cpu")).patches
        shown = visible(geo, patches)
        kept = brief(shown, rng) if short else drop_tokens(geo, shown, rng, HARSH)
        first, kept = openers(geo, patches, kept).to(run.device), kept.to(run.device)
        quiz = make_quiz(batch, rng, run.device, DRILL if short else PORTIONS)
        with torch.no_grad():
            patches, _ = encode(model, to_views(batch, geo, run.device))
        visual = pack(inner.multi_modal_projector(patches), inner.image_newline, geo)
        early: list[Tensor] = []
        logits = answer_logits(model, visual, kept, quiz, compact=rng.random() < 0.5, early=early)
        intact = short or kept.intact
        loss = quiz_loss(logits, quiz, meter, intact=intact, weights=image_weights(3.0))
        loss = loss + 0.25 * fact_loss(early, modules["facts"], quiz, meter)
        loss = loss + 0.25 * marker_loss(early, modules["marker"], first, kept.valid, meter)
        optimisers.step(loss)


STAGES: dict[str, Callable[["TrainingRun"], None]] = {
    "vision": train_vision,
    "language": train_language,
    "projector": train_projector,
    "joint": train_joint,
}


STEPS = {"vision": 2400, "language": 1900, "projector": 300, "joint": 4100}


@torch.no_grad()
def warm_start(model: PreTrainedModel, folder: Path) -> None:
    """Copy the weights of the first version, with its embeddings resampled to the finer grid.

    Words that it does not know keep their random embeddings.
    """
    source = LlavaNextForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    )
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    ids = build_processor().tokenizer.get_vocab()
    known = [word for word in vocabulary if word in ids]
    new, copied = model.state_dict(), source.state_dict()
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        words = copied[name]
        rows = words.mean(0) + words.std() * torch.randn_like(new[name])
        rows[[ids[word] for word in known]] = words[[vocabulary[word] for word in known]]
        copied[name] = rows
    tower = "model.vision_tower.embeddings"
    name = f"{tower}.patch_embedding.weight"
    copied[name] = resampled_patches(copied[name], PATCH)
    name = f"{tower}.position_embedding.weight"
    cls, table = copied[name][:1], copied[name][1:]
    side = math.isqrt(len(table))
    grid = rearrange(table, "(r c) d -> 1 d r c", r=side)
    grid = F.interpolate(grid, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    copied[name] = torch.cat([cls, rearrange(grid, "1 d r c -> (r c) d")])
    copied = {key: value for key, value in copied.items() if "position_ids" not in key}
    model.load_state_dict(copied)


def resampled_patches(weight: Tensor, side: int) -> Tensor:
    """Patch embedding (d, 3, p, p) for patches of `side` pixels (FlexiViT, section 3.4).

    The embedding of a patch equals that of the patch resized to the old side.
    """
    old = weight.shape[-1]
    basis = torch.eye(side * side).view(-1, 1, side, side)
    resize = F.interpolate(basis, size=(old, old), mode="bilinear", align_corners=False)
    matrix = resize.flatten(1)  # (side * side, old * old)
    new: Tensor = (weight.flatten(2) @ matrix.T).unflatten(-1, (side, side))
    return new


class TrainingRun:
    """A training run: the model, its ideal embeddings and its folder."""

    stages: ClassVar[dict[str, Callable[[Any], None]]] = STAGES

    def __init__(
        self, out: Path, device: str, seed: int, steps: dict[str, int], start: Path | None = None
    ) -> None:
        self.out, self.device, self.seed, self.steps = out, torch.device(device), seed, steps
        self.model: Any = self.build(seed)
        if start is not None:
            self.grow(start)
        nn.Module.to(self.model, self.device)
        self.ideal = Ideal(self.model.model.language_model.embed_tokens.weight).to(self.device)
        (out / "stages").mkdir(parents=True, exist_ok=True)
        self._meter = Meter("")

    def build(self, seed: int) -> PreTrainedModel:
        return build_model(seed)

    def tick(self, step: int, steps: int) -> None:
        """Count a step, and print the figures of the last ones now and then."""
        self._meter.tick(step, steps)

    def meter(self, stage: str) -> Meter:
        self._meter = Meter(stage)
        return self._meter

    def parts(self, stage: str) -> dict[str, nn.Module]:
        """The modules that a stage trains, by name."""
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

    def grow(self, start: Path) -> None:
        """Start from the earlier version in the folder ``start``."""
        warm_start(self.model, start)

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
        save(state, file)
        file.with_suffix(".progress").unlink(missing_ok=True)
        record = {
            "steps": self.steps[stage],
            "seconds": round(time.monotonic() - self._meter.start),
            "threads": torch.get_num_threads(),
            "device": str(self.device),
            "last figures in training": {k: round(v, 4) for k, v in self._meter.last.items()},
        }
        file.with_suffix(".json").write_text(json.dumps(record, indent=2))


# --- command line ---------------------------------------------------------------------------------


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run, or the model with --evaluate.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves the default.")] = 0,
    start: Annotated[Path | None, typer.Option(help="Folder of the first version.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and training scenes.")] = 0,
    stages: Annotated[
        str, typer.Option(help="Stages to run, in order, separated by commas.")
    ] = ",".join(STEPS),
    scale: Annotated[float, typer.Option(help="Factor on the steps of every stage.")] = 1.0,
    questions: Annotated[int, typer.Option(help="Questions of each kind for the figures.")] = 400,
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
    check_photographs()
    steps = {name: max(1, round(n * scale)) for name, n in STEPS.items()}
    run = TrainingRun(out, device, seed, steps, start)
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
