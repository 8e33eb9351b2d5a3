"""Images are read as a viewer shows them; expected pixels are computed by hand."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tokenprune.errors import PictureWarning, UserError
from tokenprune.pictures import frames, picture, pixel_limit

RAMP = np.arange(0, 240, 5, dtype=np.uint8).reshape(6, 8)  # (height, width)
COLOURS = np.stack([RAMP, 255 - RAMP, np.full_like(RAMP, 7)], -1)


def stored(image: Image.Image, form: str, **options: Any) -> Image.Image:
    """``image`` as it is read back from a file of the format ``form``."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def pixels(source: Any) -> np.ndarray[Any, Any]:
    shown = picture(source)
    assert shown.mode == "RGB"
    return np.asarray(shown)


def gray(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.stack([values] * 3, -1)


# EXIF orientations 1 to 8: from stored to displayed rows and columns.
_TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}


@pytest.mark.parametrize("orientation", list(_TURNED))
@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP"])
def test_photos_are_turned_upright(orientation: int, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if form == "WEBP" else {}
    photo = stored(Image.fromarray(COLOURS), form, exif=exif, **lossless)
    shown = picture(photo)
    expected = _TURNED[orientation](COLOURS)
    assert np.array_equal(np.asarray(shown), expected)
    assert np.array_equal(pixels(shown), expected), "what is upright is not turned again"


def test_a_gray_photo_of_16_bits_is_turned_as_well() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = stored(Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG", exif=exif)
    assert np.array_equal(pixels(photo), gray(RAMP[::-1].T))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bits_lose_their_lower_byte(form: str) -> None:
    image = Image.fromarray(RAMP.astype(np.uint16) * 257)
    options = {"irreversible": False} if form == "JPEG2000" else {}
    assert np.array_equal(pixels(stored(image, form, **options)), gray(RAMP))


@pytest.mark.filterwarnings("error")
def test_both_byte_orders() -> None:
    big = Image.frombytes("I;16B", (8, 6), (RAMP.astype(">u2") * 257).tobytes())
    assert np.array_equal(pixels(big), gray(RAMP))
    assert np.array_equal(pixels(stored(big, "TIFF")), gray(RAMP))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (RAMP.astype(np.float32) / 255, RAMP),
        (RAMP.astype(np.float32), RAMP),
        (RAMP.astype(np.int32), RAMP),
        (RAMP.astype(np.int32) * 257, RAMP),
        # Neither range: the least (-1000) is black, the greatest (-1000 + 4 * 235 = -60) white.
        (RAMP.astype(np.float32) * 4 - 1000, np.rint(RAMP / 235 * 255).astype(np.uint8)),
        (np.full((2, 3), 7e9, np.float32), np.zeros((2, 3), np.uint8)),
    ],
    ids=["share", "byte", "integers", "16-bit integers", "any", "one value"],
)
def test_guessed_ranges_give_a_warning(values: np.ndarray[Any, Any], expected: Any) -> None:
    image = Image.fromarray(values)
    assert image.mode in "IF"
    with pytest.warns(PictureWarning, match="have no defined range"):
        assert np.array_equal(pixels(image), gray(expected))


def test_nan_and_infinite_pixels_are_refused() -> None:
    values = RAMP.astype(np.float32)
    values[2, 3] = np.nan
    for bad in (values, np.where(np.isnan(values), np.inf, values)):
        with pytest.raises(UserError, match="NaN or infinity"):
            picture(Image.fromarray(bad))
        with pytest.raises(UserError, match="NaN or infinity"):
            picture(bad)


def test_what_is_transparent_is_white() -> None:
    alpha = np.where(RAMP > 100, 255, 0).astype(np.uint8)
    hidden = np.dstack([COLOURS, alpha])
    seen = np.where(alpha[..., None] > 0, COLOURS, 255)
    assert np.array_equal(pixels(Image.fromarray(hidden)), seen)
    assert np.array_equal(pixels(hidden), seen)
    half = np.dstack([gray(np.zeros((1, 1), np.uint8)), np.full((1, 1), 51, np.uint8)])
    assert pixels(half)[0, 0].tolist() == [204, 204, 204], "a fifth of black on white"
    both = np.dstack([RAMP, alpha])
    assert np.array_equal(pixels(both), gray(np.where(alpha > 0, RAMP, 255)))
    with_alpha = Image.fromarray(both)
    assert np.array_equal(pixels(with_alpha.convert("La")), pixels(with_alpha.convert("RGBA")))


def test_one_value_or_palette_entry_may_be_transparent() -> None:
    white = gray(np.where(RAMP == 50, 255, RAMP))
    assert np.array_equal(pixels(stored(Image.fromarray(RAMP), "PNG", transparency=50)), white)
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    assert np.array_equal(pixels(stored(deep, "PNG", transparency=50 * 257)), white)
    key = tuple(COLOURS[1, 2].tolist())
    keyed = stored(Image.fromarray(COLOURS), "PNG", transparency=key)
    expected = COLOURS.copy()
    expected[1, 2] = 255
    assert np.array_equal(pixels(keyed), expected)
    palette = Image.fromarray(RAMP // 80).convert("P")
    palette.putpalette([9, 8, 7, 1, 2, 3, 200, 100, 0])
    shown = np.array([[9, 8, 7], [255, 255, 255], [200, 100, 0]], np.uint8)[RAMP // 80]
    for form in ("PNG", "GIF"):
        assert np.array_equal(pixels(stored(palette, form, transparency=1)), shown)


def test_other_modes() -> None:
    bits = RAMP > 90
    assert np.array_equal(pixels(Image.fromarray(bits)), gray(np.where(bits, 255, 0)))
    ink = np.zeros((1, 2, 4), np.uint8)
    ink[0, 0] = [255, 0, 0, 0]  # all cyan: no red
    shown = pixels(Image.frombytes("CMYK", (2, 1), ink.tobytes()))
    assert shown.tolist() == [[[0, 255, 255], [255, 255, 255]]]
    bright = Image.fromarray(COLOURS).convert("YCbCr")
    assert np.abs(pixels(bright).astype(int) - COLOURS).max() <= 3


# --- where pictures come from ---------------------------------------------------------------------


def test_paths_files_urls_and_arrays_are_one_picture(tmp_path: Path) -> None:
    path = tmp_path / "a picture.png"
    Image.fromarray(COLOURS).save(path)
    deep = COLOURS.astype(np.uint16) * 257
    with path.open("rb") as file:
        assert np.array_equal(pixels(file), COLOURS)
    tensor = torch.from_numpy(COLOURS).permute(2, 0, 1)
    for source in (
        path,
        str(path),
        path.as_uri(),
        io.BytesIO(path.read_bytes()),
        COLOURS,
        COLOURS.transpose(2, 0, 1),
        deep,
        COLOURS / 255,
        (COLOURS / 255).astype(np.float32),
        tensor,
        tensor.permute(1, 2, 0),
        tensor / 255,
        (tensor / 255).requires_grad_(),
        Image.fromarray(COLOURS),
    ):
        assert np.array_equal(pixels(source), COLOURS), type(source)
    half = tensor.to(torch.bfloat16) / 256
    assert np.abs(pixels(half).astype(int) - COLOURS).max() <= 1
    for flat in (RAMP, RAMP[..., None], RAMP[None], torch.from_numpy(RAMP)[None]):
        assert np.array_equal(pixels(flat), gray(RAMP))


def test_ambiguous_tensors_have_the_channels_first() -> None:
    both = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert np.array_equal(pixels(both), both)
    assert np.array_equal(pixels(torch.from_numpy(both)), both.transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "None is not an image; give a PIL image, a path"),
        (7, "an object of type int"),
        (b"\x89PNG", "io.BytesIO makes a file of bytes"),
        (io.StringIO("x"), "an object of type StringIO"),
        ("nowhere.png", "there is no image 'nowhere.png'"),
        ("https://example.org/a.png", "download it"),
        ("a\0b.png", "cannot decode the image 'a\\x00b.png'"),
        ("x" * 5000, "cannot decode the image"),
        ("/dev/null", "a pipe or a device, not a regular file"),
        (".", "a folder, not a regular file"),
        (io.BytesIO(b"nothing"), "no image that Pillow knows"),
        (Image.new("RGB", (0, 5)), "an image of 0 x 5 pixels"),
        (np.zeros((0, 5, 3), np.uint8), "has no pixels"),
        (np.zeros((5, 6, 7), np.uint8), "no axis of 1 to 4 channels"),
        (np.zeros((2, 4, 5, 3), np.uint8), "of shape (2, 4, 5, 3) is no image"),
        (np.zeros(9, np.uint8), "of shape (9,) is no image"),
        (np.zeros((4, 5), complex), "of complex128"),
        (np.full((4, 5, 3), -2.0), "has no known range"),
        (torch.empty(3, 4, 5, device="meta"), "meta device"),
    ],
)
def test_inputs_that_are_not_images_are_refused(source: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        picture(source)
    assert words in str(caught.value)


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    done = threading.Event()

    def read() -> None:
        with pytest.raises(UserError, match="a pipe or a device"):
            picture(tmp_path / "pipe.png")
        done.set()

    threading.Thread(target=read, daemon=True).start()
    assert done.wait(5)


def test_images_above_the_limit_are_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.new("1", (9000, 8000)).save(path)
    head = path.read_bytes()[:200]  # does not decode
    path.write_bytes(head)
    for source in (path, io.BytesIO(head), Image.open(path)):
        with pytest.raises(UserError, match=r"9000 x 8000 pixels.*limit of 64,000,000"):
            picture(source)
    with pixel_limit(72_000_000), pytest.raises(UserError, match="cannot decode"):
        picture(path)  # now it was tried
    with pixel_limit(47), pytest.raises(UserError, match="limit of 47"):
        picture(stored(Image.fromarray(COLOURS), "PNG"))


def test_a_raised_limit_is_not_stopped_by_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # Pillow raises above twice that number
    with pytest.raises(UserError, match="cannot decode"):
        picture(tmp_path / "a.png")
    with pixel_limit(48):
        assert picture(tmp_path / "a.png").size == (8, 6)
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("form", ["PNG", "GIF", "TIFF", "WEBP", "JPEG2000", "ICO", "TGA", "DDS"])
def test_damaged_files_of_any_format_are_sentences(form: str) -> None:
    """Each of the first 200 bytes set to 255, or the file cut there: an image or a refusal."""
    buffer = io.BytesIO()
    Image.fromarray(np.tile(COLOURS, (3, 3, 1))).save(buffer, form)
    whole = buffer.getvalue()
    for place in range(0, min(200, len(whole)), 3):
        for broken in (whole[:place], whole[:place] + b"\xff" + whole[place + 1 :]):
            try:
                picture(io.BytesIO(broken))
            except UserError as error:
                assert str(error).endswith((".", ")"))  # noqa: PT017  # or no error at all


# --- videos ---------------------------------------------------------------------------------------

CLIP = np.stack([COLOURS, 255 - COLOURS, COLOURS // 2])


def test_videos_of_every_kind_are_the_same_frames(tmp_path: Path) -> None:
    images = [Image.fromarray(frame) for frame in CLIP]
    for name, image in zip("cab", [images[2], images[0], images[1]], strict=True):
        image.save(tmp_path / f"{name}.png")
    moving = tmp_path / "moving" / "clip.webp"
    moving.parent.mkdir()
    images[0].save(moving, save_all=True, append_images=images[1:], lossless=True)
    tensor = torch.from_numpy(CLIP).permute(0, 3, 1, 2)
    for source in (
        images,
        tuple(images),
        [np.asarray(image) for image in images],
        [tmp_path / f"{name}.png" for name in "abc"],
        CLIP,
        CLIP / 255,
        CLIP.transpose(0, 3, 1, 2),
        tensor,
        tensor / 255,
        moving,
        str(moving),
        io.BytesIO(moving.read_bytes()),
        Image.open(moving),
        tmp_path,
    ):
        assert np.array_equal(frames(source), CLIP), type(source)
    assert np.array_equal(pixels(moving), CLIP[0]), "asked for an image: the first frame"
    assert np.array_equal(
        frames(np.dstack([RAMP] * 2).transpose(2, 0, 1)[..., None])[1], gray(RAMP)
    )


def test_frames_lie_on_white_and_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    photo = stored(Image.fromarray(COLOURS), "PNG", exif=exif)
    clear = Image.new("RGBA", (8, 6), (1, 2, 3, 0))
    assert np.array_equal(frames([photo, clear]), [COLOURS[::-1, ::-1], np.full((6, 8, 3), 255)])


def test_a_dark_frame_has_the_range_of_its_video() -> None:
    clip = np.stack([RAMP.astype(np.float64), np.full(RAMP.shape, 0.5)])[..., None]
    with pytest.warns(PictureWarning, match="0 and 255"):
        assert frames(clip)[1].max() == 0, "half a level of 255, not half of all"


def test_invalid_videos_are_refused() -> None:
    with pytest.raises(UserError, match="at least one frame"):
        frames([])
    with pytest.raises(UserError, match=r"of one size, got \[\(3, 2\), \(8, 6\)\]"):
        frames([Image.new("RGB", (3, 2)), Image.fromarray(COLOURS)])
    with pytest.raises(UserError, match=r"of shape \(6, 8, 3\) is no video"):
        frames(COLOURS)
    with pytest.raises(UserError, match="a video is a list of images"):
        frames(io.BytesIO(b"\0\0\0\x18ftypmp42"))
    buffer = io.BytesIO()
    Image.fromarray(CLIP[0]).save(
        buffer, "GIF", save_all=True, append_images=[Image.fromarray(CLIP[1])]
    )
    gif = Image.open(buffer)
    with pytest.raises(UserError, match="is animated"):
        frames([gif, gif])  # as a loop over its frames returns it: one image, twice
