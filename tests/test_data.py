"""Reading questions: what is accepted, and the sentence for everything that is not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tokenprune.errors import UserError
from tokenprune.experiments.data import (
    Picture,
    Question,
    check_placeholders,
    fingerprint,
    held_out,
    normalise,
    read_jsonl,
)


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
    first, second, third = read_jsonl(path)
    assert (first.id, first.kind, first.answer) == ("a", "colour", "red")
    assert (second.id, second.kind, second.answer) == ("line-3", "other", "3")
    assert second.images[0] is first.images[0], "the same file is one picture, however spelt"
    assert third.answer == "0.5"
    assert [p.open().getpixel((0, 0)) for p in third.images] == [(0, 0, 255), (255, 0, 0)]
    assert first.image_id == second.image_id != third.image_id


def test_takes_the_first_questions_and_reads_no_further(folder: Path) -> None:
    path = write(folder, line(id="a"), line(id="b"), "not JSON")
    assert [item.id for item in read_jsonl(path, 2)] == ["a", "b"]


def test_a_byte_order_mark_and_windows_line_ends_are_fine(folder: Path) -> None:
    path = folder / "my.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(line()).encode() + b"\r\n\r\n")
    assert len(read_jsonl(path)) == 1


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
        (line(id="first"), ["line 2", "'first' was given on line 1 already"]),
    ],
)
def test_a_bad_line_is_named(folder: Path, bad: Any, words: list[str]) -> None:
    (folder / "broken.png").write_bytes(b"this is no image")
    whole = (folder / "pictures" / "red.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError) as caught:
        read_jsonl(write(folder, line(id="first"), bad))
    for word in words:
        assert word in str(caught.value)


def test_images_and_videos(folder: Path) -> None:
    both = ["pictures/red.png", "pictures/blue.png"]
    path = write(
        folder, line(), line(image=None, images=both), line(image=None, video=both, kind="motion")
    )
    found = read_jsonl(path)
    assert [item.modality for item in found] == ["image", "multi-image", "video"]
    assert found[1].image_id != found[2].image_id
    assert [item.id for item in read_jsonl(path, modality="video")] == ["line-3"]
    with pytest.raises(UserError, match="no question of the modality video"):
        read_jsonl(write(folder, line()), modality="video")
    texts = {"image": "<image>", "video": "<video>"}
    check_placeholders(found, texts)
    with pytest.raises(UserError, match="is about a video, but this model takes images only"):
        check_placeholders(found, {"image": "<image>"})
    marked = Question("m", found[2].images, "<video> <video>?", "x", video=True)
    with pytest.raises(UserError, match="2 video placeholders '<video>' for 1 video"):
        check_placeholders([marked], texts)
    assert fingerprint(found[1:2]) != fingerprint([replace(found[1], video=True)])


def test_bad_files(folder: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*nothing\.jsonl.*No such file"):
        read_jsonl(folder / "nothing.jsonl")
    with pytest.raises(UserError, match="cannot read"):
        read_jsonl(folder)
    with pytest.raises(UserError, match="holds no question"):
        read_jsonl(write(folder, "", "  "))
    with pytest.raises(UserError, match="holds 1 questions, fewer than the 2 asked for"):
        read_jsonl(write(folder, line()), 2)
    (folder / "latin.jsonl").write_bytes('{"question": "Größe?"}'.encode("latin-1"))
    with pytest.raises(UserError, match="line 1: this is not UTF-8"):
        read_jsonl(folder / "latin.jsonl")


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
    check_placeholders([fine, Question("b", pictures, "Which?", "first")], {"image": "<image>"})
    with pytest.raises(UserError, match="'c' has 1 image placeholders '<image>' for 2 images"):
        check_placeholders(
            [fine, Question("c", pictures, "<image> or?", "first")], {"image": "<image>"}
        )


def test_the_fingerprint_is_of_content(folder: Path) -> None:
    path = write(folder, line())
    before = fingerprint(read_jsonl(path))
    moved = folder.rename(folder.with_name("elsewhere"))
    assert fingerprint(read_jsonl(moved / "my.jsonl")) == before
    Image.new("RGB", (8, 6), "green").save(moved / "pictures" / "red.png")
    assert fingerprint(read_jsonl(moved / "my.jsonl")) != before
    assert fingerprint(read_jsonl(write(moved, line(answer="blue")))) != before


def test_held_out_are_balanced_and_share_images() -> None:
    questions = held_out(20, seed=3)
    assert len({item.id for item in questions}) == 20
    kinds = [item.kind for item in questions]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(set(kinds), 4)
    assert len({id(item.images[0]) for item in questions}) == 4
    assert fingerprint(questions) == fingerprint(held_out(20, seed=3))
    assert fingerprint(questions) != fingerprint(held_out(20, seed=4))
