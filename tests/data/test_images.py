"""Pictures of every kind come out as a person sees them."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from sdtune.data.images import open_rgb, prepare, to_float
from sdtune.errors import DataError

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def half_transparent(mode: str, colour) -> Image.Image:
    """The left half has the colour, the right half is transparent."""
    picture = Image.new(mode, (4, 2), colour)
    picture.putalpha(Image.new("L", (4, 2), 255))
    picture.paste((*picture.getpixel((0, 0))[:-1], 0), (2, 0, 4, 2))
    return picture


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF", "JPEG2000"])
def test_file_formats(kind, tmp_path):
    picture = Image.new("RGB", (8, 8), RED)
    (tmp_path / "picture").write_bytes(encoded(picture, kind))
    for source in [tmp_path / "picture", str(tmp_path / "picture"), encoded(picture, kind)]:
        opened = open_rgb(source)
        assert opened.mode == "RGB" and opened.size == (8, 8)
        assert np.abs(np.array(opened).astype(int) - RED).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation):
    upright = Image.new("RGB", (16, 8))
    upright.paste(RED, (0, 0, 8, 4))  # the top left quarter
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_rgb(encoded(stored, exif=exif))
    assert np.array_equal(np.array(opened), np.array(upright))


def test_damaged_exif_does_not_matter():
    opened = open_rgb(encoded(Image.new("RGB", (8, 8), RED), "PNG", exif=b"Exif\x00\x00not a TIFF header at all"))
    assert opened.getpixel((0, 0)) == RED


@pytest.mark.parametrize(("mode", "colour", "shown"), [("RGB", RED, RED), ("L", 90, (90, 90, 90))])
def test_alpha_lies_on_the_background(mode, colour, shown):
    content = encoded(half_transparent(mode, colour))
    assert Image.open(io.BytesIO(content)).mode in ("RGBA", "LA")
    opened = open_rgb(content)
    assert opened.getpixel((0, 0)) == shown and opened.getpixel((3, 0)) == WHITE
    assert open_rgb(content, background="#00ff00").getpixel((3, 0)) == (0, 255, 0)


def test_half_alpha_is_mixed():
    opened = open_rgb(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128))))
    assert opened.getpixel((0, 0)) == (127, 127, 127)


def test_palettes():
    palette = Image.new("RGB", (4, 4), RED).quantize(8)
    assert palette.mode == "P"
    assert open_rgb(encoded(palette)).getpixel((0, 0)) == RED
    transparent = Image.new("P", (4, 2), 0)
    transparent.putpalette([255, 0, 0, 0, 0, 255])
    transparent.paste(1, (2, 0, 4, 2))
    for kind in ["PNG", "GIF"]:
        opened = open_rgb(encoded(transparent, kind, transparency=1))
        assert opened.getpixel((0, 0)) == RED and opened.getpixel((3, 0)) == WHITE


@pytest.mark.parametrize(("mode", "colour"), [("L", 200), ("RGB", (200, 200, 200))])
def test_one_transparent_colour(mode, colour):
    picture = Image.new(mode, (4, 2), colour)
    picture.paste(0, (0, 0, 2, 2))
    opened = open_rgb(encoded(picture, transparency=0 if mode == "L" else (0, 0, 0)))
    assert opened.getpixel((0, 0)) == WHITE and opened.getpixel((3, 0)) == (200, 200, 200)


def test_grey_black_and_white_and_cmyk():
    assert open_rgb(encoded(Image.new("L", (2, 2), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert open_rgb(encoded(Image.new("1", (2, 2), 1))).getpixel((0, 0)) == WHITE
    for kind in ["JPEG", "TIFF"]:
        opened = open_rgb(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind))
        assert np.abs(np.array(opened).astype(int) - RED).max() <= 6


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_spread_not_cut(kind):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    picture = Image.fromarray(ramp)
    assert picture.mode == "I;16"
    opened = np.array(open_rgb(encoded(picture, kind)))
    assert np.abs(opened[..., 0].astype(int) - np.arange(256).reshape(16, 16)).max() <= 1


def test_32_bit_grey_and_floats():
    whole = Image.fromarray(np.array([[0, 65535]], dtype=np.int32))
    assert np.array(open_rgb(encoded(whole, "TIFF")))[..., 0].tolist() == [[0, 255]]
    unit = Image.fromarray(np.array([[0.0, 1.0]], dtype=np.float32))
    assert np.array(open_rgb(encoded(unit, "TIFF")))[..., 0].tolist() == [[0, 255]]
    byte = Image.fromarray(np.array([[0.0, 200.0]], dtype=np.float32))
    assert np.array(open_rgb(encoded(byte, "TIFF")))[..., 0].tolist() == [[0, 200]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in [RED, (0, 255, 0), (0, 0, 255)]]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert np.abs(np.array(open_rgb(content)).astype(int) - RED).max() <= 3


def test_what_is_not_a_picture_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(noise))
    contents = {
        "empty.png": b"",
        "text.jpg": b"not a picture at all",
        "cut.png": whole[: len(whole) // 2],
        "cut.jpg": encoded(Image.fromarray(noise), "JPEG")[:700],
        "cut.webp": encoded(Image.fromarray(noise), "WEBP")[:200],
        "cut.gif": encoded(Image.fromarray(noise), "GIF")[:900],
        "header.png": whole[:20],
        "damaged.png": whole[:200] + bytes(200) + whole[400:],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} cannot be read as a picture"):
            open_rgb(tmp_path / name)
        with pytest.raises(DataError, match="row 7 of set cannot be read"):
            open_rgb(content, name="row 7 of set")
    with pytest.raises(DataError, match="none.png does not exist"):
        open_rgb(tmp_path / "none.png")
    with pytest.raises(DataError, match="cannot be read"):
        open_rgb(tmp_path)


def test_a_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("RGB", (30, 30)).save(tmp_path / "bomb.png")
    with pytest.raises(DataError, match=r"bomb\.png"):
        open_rgb(tmp_path / "bomb.png")


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green grows downwards."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None, :]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (17, 31), (7, 5), (16, 16), (1, 100)])
@pytest.mark.parametrize("frame", [(16, 16), (16, 24), (24, 8)])
def test_prepared_pictures_fill_the_frame(size, frame):
    for crop in ["center", "random"]:
        for offset in [(0.0, 0.0), (0.999999, 0.999999)]:
            pixels = prepare(gradient(*size), *frame, crop, False, offset)
            assert pixels.shape == (3, *frame) and pixels.dtype == torch.uint8 and pixels.is_contiguous()


def test_the_shorter_side_fits_and_the_middle_is_taken():
    pixels = prepare(gradient(64, 32), 16, 16)  # resized to 32 x 16: columns 8 to 24 are left
    assert 60 < pixels[0, 0, 0] < 75 and 180 < pixels[0, 0, -1] < 195
    assert pixels[1, 0].max() < 10 and pixels[1, -1].min() > 245
    same = gradient(16, 16)
    assert np.array_equal(prepare(same, 16, 16).permute(1, 2, 0).numpy(), np.array(same))


def test_random_crops_reach_from_edge_to_edge():
    picture = gradient(64, 32)
    left, right = (prepare(picture, 16, 16, "random", False, (u, 0.3)) for u in (0.0, 0.99999))
    assert left[0, 0, 0] < 5 and right[0, 0, -1] > 250
    up, down = (prepare(gradient(32, 64), 16, 16, "random", False, (0.3, v)) for v in (0.0, 0.99999))
    assert up[1, 0, 0] < 5 and down[1, -1, 0] > 250


def test_flip_mirrors_the_frame():
    picture, offset = gradient(64, 32), (0.1, 0.9)
    for crop in ["center", "random"]:
        plain, flipped = (prepare(picture, 16, 16, crop, flip, offset) for flip in (False, True))
        assert torch.equal(flipped, plain.flip(-1)) and not torch.equal(flipped, plain)


def test_to_float_covers_minus_one_to_one():
    pixels = to_float(torch.arange(256, dtype=torch.uint8))
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, torch.linspace(-1, 1, 256))
