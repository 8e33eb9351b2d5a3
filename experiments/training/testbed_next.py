"""Train `testbed-next`, the embedded LLaVA-NeXT of 1.7 million parameters, from scratch.

    python -m tokenprune.experiments.training.testbed_next --out runs/testbed-next

End-to-end training from random weights stalls, so each stage trains one skill:

1. vision     the vision encoder labels every patch (shape, colour, digit, place) and tags the view;
2. language   the decoder answers from *ideal* patch embeddings made of the true labels;
3. projector  the projector learns to map vision features to those ideal embeddings;
4. joint      projector and decoder answer from pixels.

From the middle of stage 2 on, most batches drop visual tokens (`drop_tokens`): random subsets,
single views, whole rows, whole crops, with compact and with original position ids.  Saliency plays
no part in it, so that no method is favoured.  `OUT/stages` keeps finished stages, which are not
repeated; stages 1 and 2 are independent and may run in parallel (`--stages`).
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
import transformers
import typer
from torch import Tensor, nn
from transformers import LlavaNextForConditionalGeneration, PreTrainedModel

from tokenprune.experiments.training.evaluate import evaluate, table
from tokenprune.experiments.training.geometry import (
    SKILLS,
    TAGS,
    Geometry,
    Labels,
    geometry,
    scene_batches,
    to_labels,
    to_views,
)
from tokenprune.experiments.training.model import WIDTH, build_model, build_processor, export
from tokenprune.experiments.training.optim import Meter, Optimisers
from tokenprune.experiments.training.quiz import (
    GENTLE,
    HARSH,
    answer_logits,
    brief,
    build_fact_head,
    drop_tokens,
    fact_loss,
    image_weights,
    make_quiz,
    quiz_loss,
)
from tokenprune.models.testbed import scenes

# --- stage 1: the vision encoder ------------------------------------------------------------------


def encode(model: LlavaNextForConditionalGeneration, views: Tensor) -> tuple[Tensor, Tensor]:
    """Patch features for the projector, (b, v, 49, d), and pooled CLS tokens, (b, v, d)."""
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
        # Few patches show an object or a digit, so patches with and without are averaged apart.
        shown = truth > 0 if skill in ("shape", "digit") else torch.ones_like(truth) > 0
        weight = 2.0 if skill in ("shape", "digit") else 0.5
        loss = loss + weight * losses[shown].mean()
        if not shown.all():
            loss = loss + losses[~shown].mean()
        meter.add(skill, (guess.argmax(-1) == truth)[shown])
    return loss


def train_vision(run: "TrainingRun") -> None:
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

    Labels with a name start at the embedding of their word, so that one circuit, "find the patches
    that resemble these words", serves all colours and shapes.
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
    """Packed sequence (b, N, d) of patch embeddings (b, v, 49, d), in Hugging Face's order."""
    b, _, _, d = patches.shape
    source = torch.cat([patches.flatten(1, 2), newline.expand(b, 1, d)], dim=1)
    return source[:, geo.order.to(patches.device)]  # -1 is the separator


# --- stages 2 to 4 --------------------------------------------------------------------------------


def train_language(run: "TrainingRun") -> None:
    model, steps = run.model, run.steps["language"]
    newline = nn.ParameterList([model.model.image_newline])
    # Two look-ups in a row (words to object, object to answer) emerge slowly unless the first has
    # its own loss: the noun's state in a middle layer must predict all facts about its object.
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


def train_projector(run: "TrainingRun") -> None:
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


def train_joint(run: "TrainingRun") -> None:
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


STAGES: dict[str, Callable[["TrainingRun"], None]] = {
    "vision": train_vision,
    "language": train_language,
    "projector": train_projector,
    "joint": train_joint,
}


STEPS = {"vision": 1800, "language": 2000, "projector": 300, "joint": 1400}


class TrainingRun:
    """A training run: the model, its ideal embeddings and its folder."""

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


# --- command line ---------------------------------------------------------------------------------


def main(
    out: Annotated[Path, typer.Option(help="Folder of the run, or the model with --evaluate.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves the default.")] = 0,
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
    steps = {name: max(1, round(n * scale)) for name, n in STEPS.items()}
    run = TrainingRun(out, device, seed, steps)
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
