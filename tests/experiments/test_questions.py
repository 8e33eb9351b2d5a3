"""Reading questions: accepted and refused files."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from tokenprune.errors import UserError
from tokenprune.experiments.common.questions import (
    Picture,
    Question,
    check_placeholders,
    fingerprint,
    held_out,
    normalise,
)
from tokenprune.experiments.datasets.files import read_data
from tokenprune.prompts import chat_prompt


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for name, colour in (("red", "red"), ("blue", "blue")):
        Image.new("RGB", (8, 6), colour).save(tmp_path / "pictures" / f"{name}.png")
    return tmp_path


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "my.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def line(**changes: Any) -> dict[str, Any]:
    plain = {"image": "pictures/red.png", "question": "What colour?", "answer": "red"}
    return {key: value for key, value in (plain | changes).items() if value is not None}


def model(*modalities: str) -> Any:
    """A model that takes ``modalities`` and has no chat template."""
    texts = {name: f"<{name}>" for name in modalities}

    def prompt(question: str, images: int, videos: int = 0) -> str:
        counts = {"image": images, "video": videos}
        return chat_prompt(question, SimpleNamespace(), counts, texts)

    return SimpleNamespace(adapter=SimpleNamespace(modalities=texts), prompt=prompt)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (" Yes. ", "yes"),
        ("“Two  dogs!”", "two dogs"),
        ("(left)", "left"),
        ("-5", "-5"),
        ("5 %", "5 %"),
        ("U.S.", "u.s"),
        ("?", "?"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
    ],
)
def test_normalise(given: str, expected: str) -> None:
    assert normalise(given) == expected


def test_reads_every_field_and_shares_pictures(folder: Path) -> None:
    path = write(
        folder,
        line(kind="colour", id="a", source="ignored"),
        "",
        line(image="./pictures/../pictures/red.png", answer=3),
        line(image=None, images=["pictures/blue.png", "pictures/red.png"], answer=0.5),
    )
    first, second, third = read_data(path)
    assert (first.id, first.kind, first.answer) == ("a", "colour", "red")
    assert (second.id, second.kind, second.answer) == ("line-3", "other", "3")
    assert second.images[0] is first.images[0], "the same file is one picture, however spelt"
    assert third.answer == "0.5"
    assert [p.open().getpixel((0, 0)) for p in third.images] == [(0, 0, 255), (255, 0, 0)]
    assert first.image_id == second.image_id != third.image_id


def test_takes_the_first_questions_and_reads_no_further(folder: Path) -> None:
    path = write(folder, line(id="a"), line(id="b"), "not JSON")
    assert [item.id for item in read_data(path, count=2)] == ["a", "b"]


def test_a_byte_order_mark_and_windows_line_ends_are_fine(folder: Path) -> None:
    path = folder / "my.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(line()).encode() + b"\r\n\r\n")
    assert len(read_data(path)) == 1


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{", ["line 2", "not JSON", "column"]),
        ("[1, 2]", ["line 2", "expected an object, got list"]),
        (line(answer=None), ["line 2", "field 'answer' is missing"]),
        (line(image=None, question=None), ["line 2", "fields 'image' and 'question' are missing"]),
        (line(images=["pictures/red.png"]), ["line 2", "one of 'image', 'images' and"]),
        (line(video=["pictures/red.png"]), ["line 2", "one of 'image', 'images' and"]),
        (line(image=None, video="pictures"), ["line 2", "non-empty list of paths"]),
        (line(image=None, images=[]), ["line 2", "non-empty list of paths"]),
        (line(image=7), ["line 2", "must be a path"]),
        (line(question=" "), ["line 2", "'question' must be a non-empty text"]),
        (line(answer=True), ["line 2", "'answer' must be", "got True"]),
        (line(answer=["red"]), ["line 2", "'answer' must be"]),
        (line(image="nowhere.png"), ["line 2", "there is no image", "nowhere.png"]),
        (line(image="broken.png"), ["line 2", "cannot decode", "broken.png"]),
        (line(image="cut.png"), ["line 2", "cannot decode", "cut.png"]),
        (line(image="pictures"), ["line 2", "cannot decode", "pictures"]),
        (line(kind="overall"), ["line 2", "'overall' stands for all questions"]),
        (line(id="first"), ["line 2", "'first' is already used on line 1"]),
        (line(question="a\ud800b"), ["line 2", "'question' has half a character", "a\\ud800b"]),
        (line(answer="\udfff"), ["line 2", "'answer' has half a character"]),
        (line(kind="\ud800"), ["line 2", "'kind' has half a character"]),
        (line(id="\ud800"), ["line 2", "'id' has half a character"]),
        (line(image="\ud800.png"), ["line 2", "a path has half a character"]),
        (line(question="a\x1b[2Jb"), ["line 2", "'question' has a control character", "\\x1b"]),
        (line(answer="a\x9bb"), ["line 2", "'answer' has a control character", "\\x9b"]),
        (line(kind="two\nlines"), ["line 2", "'kind' has a control character"]),
        (line(id="a\tb"), ["line 2", "'id' has a control character"]),
        (line(image="a\0.png"), ["line 2", "a path has a control character", "\\x00"]),
        (line(image="pipe.png"), ["line 2", "pipe.png", "a pipe or a device"]),
        (line(image="/dev/zero"), ["line 2", "/dev/zero", "a pipe or a device"]),
        (line(image="large.png"), ["line 2", "large.png", "9000 x 8000 pixels", "64,000,000"]),
        (
            line(image=None, video=["pictures/red.png", "small.png"]),
            ["line 2", "the frames of a video must be of one size", "(3, 3), (8, 6)"],
        ),
        ("[" * 100_000, ["line 2", "nested too deeply"]),
        ('{"a": ' * 100_000, ["line 2", "nested too deeply"]),
        ('{"question": ' + "9" * 5000 + "}", ["line 2", "more digits than can be read"]),
        ('{"question": NaN}', ["line 2", "NaN is no JSON"]),
        ('{"answer": -Infinity}', ["line 2", "-Infinity is no JSON"]),
        (json.dumps(line()).replace('"red"', "1e999"), ["line 2", "finite number, got inf"]),
        (line(answer=[[["x"] * 99] * 9] * 9), ["line 2", "'answer' must be", "..."]),
    ],
)
def test_a_bad_line_is_named(folder: Path, bad: Any, words: list[str]) -> None:
    os.mkfifo(folder / "pipe.png")
    if "large.png" in str(bad):
        Image.new("1", (9000, 8000)).save(folder / "large.png")
    Image.new("RGB", (3, 3)).save(folder / "small.png")
    (folder / "broken.png").write_bytes(b"this is no image")
    whole = (folder / "pictures" / "red.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError) as caught:
        read_data(write(folder, line(id="first"), bad))
    for word in words:
        assert word in str(caught.value)
    assert len(str(caught.value)) < 600


def test_texts_may_have_several_lines(folder: Path) -> None:
    (item,) = read_data(write(folder, line(question="One:\n\ttwo?\r\n", answer=10**300)))
    assert item.question == "One:\n\ttwo?\r\n"
    assert item.answer == "1" + 300 * "0"


def test_a_path_through_a_symbolic_link_is_what_the_system_opens(folder: Path) -> None:
    elsewhere = folder / "far" / "inside"
    elsewhere.mkdir(parents=True)
    (folder / "link").symlink_to(elsewhere)
    Image.new("RGB", (2, 2), "lime").save(folder / "far" / "a.png")
    Image.new("RGB", (2, 2), "red").save(folder / "a.png")
    path = write(
        folder, line(image="link/../a.png"), line(image="far/../a.png"), line(image="a.png")
    )
    found = read_data(path)
    colours = [item.images[0].open().getpixel((0, 0)) for item in found]
    assert colours == [(0, 255, 0), (255, 0, 0), (255, 0, 0)]
    assert found[0].image_id != found[1].image_id == found[2].image_id


def test_names_with_spaces_do_not_run_together(folder: Path) -> None:
    """Encoded images are found by name, so names of images must be unique."""
    red = (folder / "pictures" / "red.png").read_bytes()
    for name in ("a", "b", "a b", "video a", '"a b"'):
        (folder / name).write_bytes(red)
    both, one = line(image=None, images=["a", "b"]), line(image="a b")
    clip, odd = line(image=None, video=["a"]), line(image="video a")
    names = [item.image_id for item in read_data(write(folder, both, one, clip, odd))]
    assert len(set(names)) == 4
    assert names[0] == "a b", "plain names are joined by a space"


def test_images_and_videos(folder: Path) -> None:
    both = ["pictures/red.png", "pictures/blue.png"]
    path = write(
        folder, line(), line(image=None, images=both), line(image=None, video=both, kind="motion")
    )
    found = read_data(path)
    assert [item.modality for item in found] == ["image", "multi-image", "video"]
    assert found[1].image_id != found[2].image_id
    assert [item.id for item in read_data(path, modality="video")] == ["line-3"]
    with pytest.raises(UserError, match="no question of the modality video"):
        read_data(write(folder, line()), modality="video")
    check_placeholders(found, model("image", "video"))
    with pytest.raises(UserError, match="is about a video, but this model takes images only"):
        check_placeholders(found, model("image"))
    marked = Question("m", found[2].images, "<video> <video>?", "x", video=True)
    with pytest.raises(UserError, match=r"'m' cannot be asked: .* 2 '<video>' .* but 1 videos"):
        check_placeholders([marked], model("image", "video"))
    assert fingerprint(found[1:2]) != fingerprint([replace(found[1], video=True)])


def test_bad_files(folder: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*nothing\.jsonl.*No such file"):
        read_data(folder / "nothing.jsonl")
    os.mkfifo(folder / "pipe.jsonl")
    for bad in (folder / "pipe.jsonl", Path("/dev/zero"), Path("a\0"), Path("x" * 5000)):
        with pytest.raises(UserError, match="cannot read"):
            read_data(bad)
    with pytest.raises(UserError, match="holds no question"):
        read_data(write(folder, "", "  "))
    with pytest.raises(UserError, match="holds 1 questions, fewer than the 2 asked for"):
        read_data(write(folder, line()), count=2)
    for coding in ("latin-1", "utf-16"):
        (folder / "other.jsonl").write_bytes('{"question": "Größe?"}'.encode(coding))
        with pytest.raises(UserError, match="line 1: this is not UTF-8"):
            read_data(folder / "other.jsonl")


def test_images_are_turned_upright_and_made_rgb(tmp_path: Path) -> None:
    image = Image.new("L", (8, 6), 255)
    exif = image.getexif()
    exif[0x0112] = 6  # the camera was held on its side
    image.save(tmp_path / "side.jpg", exif=exif)
    opened = Picture("side", tmp_path / "side.jpg").open()
    assert (opened.size, opened.mode) == ((6, 8), "RGB")


def test_placeholders_must_match_images() -> None:
    pictures = tuple(Picture(str(i), Image.new("RGB", (2, 2))) for i in range(2))
    fine = Question("a", pictures, "<image> or <image>?", "first")
    check_placeholders([fine, Question("b", pictures, "Which?", "first")], model("image"))
    odd = Question("c", pictures, "<image> or?", "first")
    with pytest.raises(UserError, match=r"'c' cannot be asked: .* 1 '<image>' .* but 2 images"):
        check_placeholders([fine, odd], model("image"))


def test_the_fingerprint_is_of_content(folder: Path) -> None:
    path = write(folder, line())
    before = fingerprint(read_data(path))
    moved = folder.rename(folder.with_name("elsewhere"))
    assert fingerprint(read_data(moved / "my.jsonl")) == before
    Image.new("RGB", (8, 6), "green").save(moved / "pictures" / "red.png")
    assert fingerprint(read_data(moved / "my.jsonl")) != before
    assert fingerprint(read_data(write(moved, line(answer="blue")))) != before


def test_the_fingerprint_does_not_block_on_a_pipe(folder: Path) -> None:
    """A page about a run reads the images of a data file that may have changed since."""
    os.mkfifo(folder / "pipe.png")
    found = read_data(write(folder, line(image="pipe.png")), check_images=False)
    with pytest.raises(OSError, match="not a regular file"):
        fingerprint(found)


def test_held_out_are_balanced_and_share_images() -> None:
    questions = held_out(32, seed=3)
    assert len({item.id for item in questions}) == 32
    kinds = [item.kind for item in questions]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(set(kinds), 4)
    assert len({id(item.images[0]) for item in questions}) == 4
    assert fingerprint(questions) == fingerprint(held_out(32, seed=3))
    assert fingerprint(questions) != fingerprint(held_out(32, seed=4))


def test_a_question_has_one_answer_or_several() -> None:
    shown = held_out(1, 0)[0].images
    assert Question("a", shown, "What?", "yes").answers == ("yes",)
    assert Question("a", shown, "What?", "").answers == ()
    several = Question("a", shown, "What?", "yes", answers=("yes", "yes", "no"))
    assert replace(several, kind="other").answers == several.answers
    with pytest.raises(ValueError, match="'no' is not the first"):
        Question("a", shown, "What?", "no", answers=("yes", "no"))


def test_answers_and_choices_are_in_the_fingerprint_and_the_metric_is_not() -> None:
    item = held_out(1, 0)[0]
    several = replace(item, answers=(item.answer, "other"))
    offered = replace(item, choices=(item.answer, "other"))
    assert len({fingerprint([one]) for one in (item, several, offered)}) == 3
    assert fingerprint([replace(item, metric="contains")]) == fingerprint([item])
