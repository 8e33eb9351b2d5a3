"""Training batches of the testbeds equal the result of processor and model."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tokenprune as tp
from tokenprune.experiments.training import loop, model, quiz
from tokenprune.experiments.training import testbed_next as first
from tokenprune.experiments.training import testbed_onevision as onevision
from tokenprune.experiments.training import testbed_qwen as qwen
from tokenprune.experiments.training.captions import captions
from tokenprune.experiments.training.geometry import geometry, to_labels
from tokenprune.experiments.training.quiz import make_quiz
from tokenprune.models.testbed import scenes

CPU = torch.device("cpu")
SCENES = onevision.IMAGES.count


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tp.load("testbed-onevision")


def _images(batch: list[scenes.Scene]) -> list[Image.Image]:
    return [Image.fromarray(scene.pixels) for scene in batch]


@pytest.mark.parametrize("modality", scenes.MODALITIES)
@torch.no_grad()
def test_training_batches_are_what_the_model_packs(pipe: Any, modality: scenes.Modality) -> None:
    """Pixels through the real processor, features through the model, order by its layout."""
    rng = np.random.default_rng(3)
    state = rng.bit_generator.state
    batch = onevision.draw(modality, rng, CPU)
    ours = onevision.visual(pipe.model, batch)
    rng.bit_generator.state = state
    if modality == "video":
        count = int(rng.integers(4, 9))
        clips = [scenes.render_clip(rng, frames=count) for _ in range(SCENES)]
        tokens = pipe.encode_videos([_images(list(clip.frames)) for clip in clips])
    elif modality == "multi-image":
        pairs = [scenes.render_pair(rng) for _ in range(SCENES)]
        encoded = [pipe.encode(_images(list(p.scenes)), same_prompt=True) for p in pairs]
        tokens = [torch.cat([part.features for part in some]) for some in encoded]
    else:
        tokens = pipe.encode(_images(onevision.IMAGES.draw(rng)))
    for mine, theirs in zip(ours, tokens, strict=True):
        features = theirs if isinstance(theirs, torch.Tensor) else theirs.features
        # Thumbnails are resized by different code, which rounds differently here and there.
        resized = 144 if modality == "image" else 0
        torch.testing.assert_close(mine[resized:], features[resized:], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(mine[:resized], features[:resized], atol=0.2, rtol=0)
    geo = batch.geo
    newline = pipe.adapter.base.image_newline
    assert torch.equal((ours[0] == newline).all(-1), geo.order < 0)
    if modality != "multi-image":
        layout = tokens[0].layout
        assert torch.equal(layout.view, torch.where(geo.order < 0, -1, geo.order // 144))


def test_the_first_words_have_the_same_ids_in_both_testbeds() -> None:
    first, second = (
        tokenizer.get_vocab()
        for tokenizer in (model.build_tokenizer("image"), onevision.build_processor().tokenizer)
    )
    assert first.items() <= second.items()
    assert (
        model.build_tokenizer("image").get_vocab()
        == tp.load("testbed-next").processor.tokenizer.get_vocab()
    )


def test_the_warm_start_sees_and_speaks_as_the_first_testbed() -> None:
    source, model = onevision.teacher(), onevision.build_model(0)
    ours, theirs = model.model.language_model, source.model.language_model
    embeds = torch.randn(1, 9, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            ours(inputs_embeds=embeds).last_hidden_state,
            theirs(inputs_embeds=embeds).last_hidden_state,
        )
    words = len(source.lm_head.weight)
    assert torch.equal(model.lm_head.weight[:words], source.lm_head.weight)


def test_quizzes_have_true_answers() -> None:
    rng = np.random.default_rng(0)
    tokenizer = onevision.build_processor().tokenizer
    for modality, kinds in scenes.MODALITIES.items():
        quiz = onevision.draw(modality, rng, CPU).quiz
        for ids, target in zip(quiz.ids.flatten(0, 1), quiz.target.flatten(0, 1), strict=True):
            text, learnt = tokenizer.decode(ids), tokenizer.decode(target[target >= 0])
            assert learnt.endswith("</s>")
            assert f"<assistant> {learnt}" in text, text
        assert int(quiz.kind.max()) == len(kinds) - 1


# -- clips and pairs -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_clips_keep_their_rules(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(20):
        clip = scenes.render_clip(rng)
        frames, tracks = clip.frames, clip.tracks
        assert 4 <= len(frames) <= 8
        assert [track.start for track in tracks] == sorted({track.start for track in tracks})
        assert sum(track.dx != 0 for track in tracks) == 1
        for index, frame in enumerate(frames):
            shown = {t.item.name for t in tracks if t.start <= index < t.stop}
            assert {item.name for item in frame.items} == shown
            assert set(np.unique(frame.owner)) <= {-1, *range(len(frame.items))}
            for item in frame.items:  # no object hides another
                assert all(
                    max(abs(item.x - other.x), abs(item.y - other.y)) > 11
                    for other in frame.items
                    if other is not item
                )
        mover = next(track for track in tracks if track.dx)
        start, end = mover.item.x, mover.at(mover.stop - 1).x
        assert (start < 30) != (end < 30)
        question, answer = scenes.ask_clip(clip, "motion", rng)
        assert mover.item.name in question
        assert answer == ("right" if end > start else "left")
        assert scenes.ask_clip(clip, "last", rng)[1] == str(tracks[-1].item.digit)


def test_pairs_keep_their_rules() -> None:
    rng = np.random.default_rng(0)
    shared = 0
    for _ in range(200):
        pair = scenes.render_pair(rng)
        names = [{item.name for item in scene.items} for scene in pair.scenes]
        assert names[0] & names[1] == ({pair.shared} if pair.shared else set())
        assert names[0] ^ names[1]
        shared += bool(pair.shared)
        question, answer = scenes.ask_pair(pair, "which", rng)
        owner = [any(name in question for name in some) for some in names]
        assert owner == [answer == "first", answer == "second"]
    assert 80 < shared < 120


@pytest.mark.parametrize("modality", ["video", "multi-image"])
def test_questions_of_other_modalities(modality: scenes.Modality) -> None:
    asked = scenes.questions(60, seed=1, modality=modality)
    again = scenes.questions(11, seed=1, modality=modality)
    assert [item.question for item in again] == [item.question for item in asked[:11]]
    kinds = scenes.MODALITIES[modality]
    assert [item.kind for item in asked[: len(kinds)]] == list(kinds)
    assert len({item.image_id for item in asked}) == -(-60 // len(kinds))
    words = set(scenes.vocabulary(("image", modality)))
    for item in asked:
        assert set(item.question.lower().replace("?", " ?").split()) <= words
        assert set(item.answer.split()) <= words
    other = scenes.questions(5, seed=1, split="train", modality=modality)
    assert other[0].images[0].tobytes() != asked[0].images[0].tobytes()
    with pytest.raises(ValueError, match="no modality is called"):
        scenes.questions(1, seed=0, modality="audio")  # type: ignore[arg-type]


# -- native resolution ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def native() -> Any:
    return tp.load("testbed-qwen", dtype="float32")


@pytest.mark.parametrize("size", [(120, 120), (90, 120), (180, 60)])
@torch.no_grad()
def test_native_batches_are_what_the_model_packs(native: Any, size: scenes.Size) -> None:
    rng = np.random.default_rng(5)
    batch = [scenes.render(rng, size=size) for _ in range(2)]
    _, ours = qwen.features(native.model, batch, CPU)
    for mine, theirs in zip(ours, native.encode(_images(batch)), strict=True):
        torch.testing.assert_close(mine, theirs.features, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_native_questions_have_the_position_ids_and_logits_of_the_model(native: Any) -> None:
    """One prompt through processor and model, against the packed questions of training."""
    rng = np.random.default_rng(6)
    batch = [scenes.render(rng, size=(60, 120), sign=True)]
    quiz = make_quiz(batch, rng, CPU)
    _, visual = qwen.features(native.model, batch, CPU)
    keep = torch.arange(visual.shape[1])[None]
    logits = qwen.answer_logits(native.model, visual, keep, (10, 20), quiz, [])
    ids = quiz.ids[0, 3]
    length = int((ids > 0).sum())
    text = native.processor.tokenizer.decode(ids[:length]).partition("<assistant>")[0]
    inputs = native.prepare(_images(batch), [text])
    theirs = native.model(**inputs).logits[0, -1]
    cue = native.processor.tokenizer.convert_tokens_to_ids("<assistant>")
    mine = logits[0, 3, int((ids == cue).int().argmax())]
    torch.testing.assert_close(mine, theirs, atol=1e-3, rtol=1e-3)


def test_native_labels_name_what_a_token_shows() -> None:
    rng = np.random.default_rng(7)
    batch = [scenes.render(rng, size=(120, 60)) for _ in range(4)]
    labels = qwen.token_labels(batch, CPU).patches[:, 0]
    for scene, found in zip(batch, labels, strict=True):
        for item in scene.items:
            token = int(item.y) // 6 * 10 + int(item.x) // 6
            shape, colour, _, row, column = found[token].tolist()
            assert shape == 1 + scenes.SHAPES.index(item.shape)
            assert colour == list(scenes.COLOURS).index(item.colour)
            assert (row, column) == (int(item.y) // 6 * 12 // 20, int(item.x) // 6 * 12 // 10)


def test_dropping_keeps_sorted_tokens_and_sometimes_only_objects() -> None:
    rng = np.random.default_rng(8)
    shown = torch.rand(3, 200, generator=torch.Generator().manual_seed(0)) < 0.2
    shares = []
    for _ in range(200):
        keep = qwen.drop_tokens(shown, (10, 20), rng)
        assert (keep.diff(dim=1) > 0).all()
        assert keep.min() >= 0
        assert keep.max() < 200
        if keep.shape[1] < 200:
            shares += (shown.gather(1, keep).sum(1) / shown.sum(1)).tolist()
    assert min(shares) < 0.1
    assert shares.count(1.0) > 20


def test_an_interrupted_stage_continues_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "EVERY", 2)

    class Stop(Exception):
        pass

    def run(name: str, stop: int) -> dict[str, Any]:
        steps = {"language": 1, "vision": 1, "projector": 4, "joint": 1}
        training = qwen.QwenRun(tmp_path / name, "cpu", 0, steps)
        tick = training.tick

        def ticking(step: int, steps: int) -> None:
            if step == stop:
                raise Stop
            tick(step, steps)

        training.tick = ticking  # type: ignore[method-assign]
        with contextlib.suppress(Stop):
            training.do("projector")
        return training.model.model.visual.merger.state_dict()

    whole = run("whole", -1)
    run("parts", 3)
    resumed = run("parts", -1)
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]), key


# -- what a scene is, and what is left of it -----------------------------------------------------


def _beside(scene: scenes.Scene, item: scenes.Item, way: str) -> list[scenes.Item]:
    """The objects in the quadrant around a direction."""
    found = []
    for other in scene.items:
        dx, dy = other.x - item.x, other.y - item.y
        along = {"right of": dx, "left of": -dx, "below": dy, "above": -dy}[way]
        aside = abs(dy) if way in ("right of", "left of") else abs(dx)
        if other is not item and along >= 12 and aside <= along:
            found.append(other)
    return found


def test_relations_name_the_only_object_in_a_direction() -> None:
    rng = np.random.default_rng(2)
    known = 0
    for _ in range(100):
        scene = scenes.render(rng)
        pairs = {(one.name, way): other for one, way, other in scenes.relations(scene)}
        known += len(pairs)
        for item in scene.items:
            for way in scenes.DIRECTIONS:
                there = _beside(scene, item, way)
                if (item.name, way) in pairs:
                    assert there == [pairs[item.name, way]]
                    apart = sorted((abs(there[0].x - item.x), abs(there[0].y - item.y)))
                    assert apart[0] <= 10
                    assert apart[1] >= 20
    assert known > 100


def test_the_fact_that_a_question_asks_for_is_its_answer() -> None:
    rng = np.random.default_rng(3)
    places = {name: place for place, name in enumerate(quiz.FACTS)}
    for _ in range(50):
        scene = loop.Recipe(1, related=True).draw(rng)[0]
        asked, answer = scenes.ask(scene, "relation", rng)
        facts = quiz.look(scene, asked)
        assert quiz.NAMES[facts[places["asked"]]] == answer
        way = next(way for way in scenes.DIRECTIONS if way in asked)
        assert facts[places[way]] == facts[places["asked"]]
        asked, answer = scenes.ask(scene, "digit", rng)
        facts = quiz.look(scene, asked)
        assert (facts[places["its digit"]], facts[places["asked"]]) == (int(answer), quiz.UNKNOWN)


def _batch(seed: int) -> tuple[list[scenes.Scene], Any, torch.Tensor]:
    batch = loop.Recipe(4).draw(np.random.default_rng(seed))
    geo = geometry(batch[0].size)
    return batch, geo, to_labels(batch, geo, CPU).patches


def test_as_many_openers_as_objects_are_left() -> None:
    """Against a loop over the kept tokens, by what the labels say of each."""
    rng = np.random.default_rng(4)
    for seed in range(4):
        batch, geo, patches = _batch(seed)
        kept = quiz.drop_tokens(geo, quiz.visible(geo, patches), rng, quiz.HARSH)
        found = quiz.openers(geo, patches, kept)
        for row, scene in enumerate(batch):
            names, flat = set(), patches[row].flatten(0, 1)
            for place, index in enumerate(kept.index[row].tolist()):
                token, first = int(geo.order[index]), False
                if bool(kept.valid[row, place]) and token >= 0 and flat[token, 0] > 0:
                    things = (*scenes.SHAPES, "sign")
                    thing = things[(int(flat[token, 0]) - 1) % len(things)]
                    name = (thing, int(flat[token, 1]))
                    first = thing != "sign" and name not in names
                    names.add(name)
                assert bool(found[row, place]) == first
            assert int(found[row].sum()) <= len(scene.items)
        whole = quiz.Kept.of(np.ones((len(batch), len(geo.order)), dtype=bool))
        assert quiz.openers(geo, patches, whole).sum(1).tolist() == [len(s.items) for s in batch]


def test_content_is_kept_independently_of_the_number_of_objects() -> None:
    """The shares of foreground and of background that stay, over many batches."""
    content = quiz.Dropout((0, 0, 0, 0, 0, 0, 1), ((0.05, 0.9),))
    rng = np.random.default_rng(5)
    shares, objects = [], []
    for seed in range(40):
        batch, geo, patches = _batch(seed)
        shown = quiz.visible(geo, patches)
        kept = quiz.drop_tokens(geo, shown, rng, content)
        mask = torch.zeros_like(shown)
        for row in range(len(batch)):
            mask[row, kept.index[row][kept.valid[row]]] = True
        patch = geo.order >= 0
        for row, scene in enumerate(batch):
            front, back = shown[row] & patch, ~shown[row] & patch
            shares.append([float(mask[row, some].float().mean()) for some in (front, back)])
            objects.append(len(scene.items))
    front, back = np.array(shares).T
    assert 0.3 < (front > 0.999).mean() < 0.55, "all of the foreground in two fifths"
    assert (front < 0.3).mean() > 0.1
    assert (back < 0.3).mean() > 0.5
    for share in (front, back):
        assert abs(np.corrcoef(share, objects)[0, 1]) < 0.3
    assert abs(np.corrcoef(front, back)[0, 1]) < 0.3


def test_a_resampled_patch_embedding_sees_the_resized_patch() -> None:
    draw = torch.Generator().manual_seed(6)
    old, patch = torch.randn(7, 3, 8, 8, generator=draw), torch.rand(2, 3, 5, 5, generator=draw)
    new = first.resampled_patches(old, 5)
    resized = torch.nn.functional.interpolate(patch, size=(8, 8), mode="bilinear")
    wanted = torch.einsum("dcpq,bcpq->bd", old, resized)
    torch.testing.assert_close(torch.einsum("dcpq,bcpq->bd", new, patch), wanted)


def test_captions_name_what_a_view_shows() -> None:
    rng = np.random.default_rng(7)
    batch = loop.Recipe(4, sign=1.0).draw(rng)
    geo = geometry(batch[0].size)
    labels = to_labels(batch, geo, CPU)
    said = captions(batch, labels, rng)
    assert len(said) == len(batch) * geo.views
    for index, scene in enumerate(batch):
        views = said[index * geo.views : (index + 1) * geo.views]
        assert all(item.name in views[0] for item in scene.items), "the thumbnail shows all"
        assert "a sign" in views[0]
        for item in scene.items:
            assert any(item.name in view for view in views[1:])
        for text in views:
            named = [name for name in quiz.NAMES if f"a {name}" in text]
            assert set(named) <= {item.name for item in scene.items}
            assert text.endswith(f"{scene.tint} background") or "background" not in text


def test_testbed_qwen_grows_out_of_larger_patches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vision encoder is copied; a patch of 3 px is embedded as the same patch at 4 px."""
    monkeypatch.setattr(qwen, "PATCH", 4)
    old = qwen.build_model(1)
    old.save_pretrained(tmp_path)
    monkeypatch.setattr(qwen, "PATCH", 3)
    new = qwen.QwenRun(tmp_path / "run", "cpu", 0, dict(qwen.STEPS), tmp_path).model
    patch = torch.rand(1, 3, 2, 3, 3)
    large = torch.nn.functional.interpolate(patch[0], size=(4, 4), mode="bilinear")[None]
    seen = new.model.visual.patch_embed(patch.flatten(1))
    wanted = old.model.visual.patch_embed(large.flatten(1))
    assert torch.allclose(seen, wanted, atol=1e-5)
    for (name, block), (_, before) in zip(
        new.model.visual.blocks.named_parameters(),
        old.model.visual.blocks.named_parameters(),
        strict=True,
    ):
        assert torch.equal(block, before), name
