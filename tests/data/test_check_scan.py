"""What one look at a picture finds: size, faults, hashes; the same on one process and on several."""

import random
import struct
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image

from sdtune.data.check_scan import Look, look_at, look_at_all, looking
from sdtune.data.images import open_rgb
from sdtune.data.sources import Picture
from sdtune.errors import DataError
from tests.drawings import drawing, encoded


def apart(one: Look, other: Look) -> int:
    return (one.hash ^ other.hash).bit_count()


def test_a_look_tells_size_mode_and_format(tmp_path):
    content = encoded(drawing(0))
    (tmp_path / "a.jpg").write_bytes(content)
    look = look_at(str(tmp_path / "a.jpg"))
    assert (look.width, look.height, look.mode, look.format, look.size) == (160, 120, "RGB", "JPEG", len(content))
    assert look.fault == "" and len(look.digest) == 16 and len(look.tint) == 48
    assert look == look_at(content)


def test_size_is_as_seen_and_a_turned_copy_looks_alike():
    picture = drawing(1)
    exif = Image.Exif()
    for orientation, transpose in [(6, Image.Transpose.ROTATE_90), (3, Image.Transpose.ROTATE_180)]:
        exif[0x0112] = orientation
        turned = look_at(encoded(picture.transpose(transpose), exif=exif))
        assert (turned.width, turned.height) == picture.size
        assert apart(turned, look_at(encoded(picture))) <= 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_what_was_reduced_and_saved_anew_looks_alike_and_another_picture_does_not(kind):
    original = look_at(encoded(drawing(2, (400, 300)), quality=95))
    smaller = look_at(encoded(drawing(2, (400, 300)).resize((200, 150), Image.Resampling.LANCZOS), kind))
    assert apart(original, smaller) <= 6 and smaller.digest != original.digest
    assert apart(original, look_at(encoded(drawing(3, (400, 300)), kind))) > 16


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "CMYK"])
def test_all_modes_are_hashed_as_they_are_seen(mode):
    if mode == "I;16":
        grey = np.asarray(drawing(4).convert("L")).astype(np.uint16) * 257
        content = encoded(Image.fromarray(grey), "PNG")
    else:
        content = encoded(drawing(4).convert(mode), "TIFF")
    look = look_at(content)
    assert look.fault == "" and look.mode.startswith(mode[0])
    assert apart(look, look_at(encoded(open_rgb(content), "PNG"))) <= 4


def test_transparent_parts_are_white():
    picture = drawing(5).convert("RGBA")
    picture.paste((255, 0, 0, 0), (0, 0, 80, 120))
    assert apart(look_at(encoded(picture, "PNG")), look_at(encoded(open_rgb(encoded(picture, "PNG")), "PNG"))) <= 4


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}])
def test_a_draft_finds_every_cut_that_decoding_finds(options):
    content = encoded(drawing(6), quality=90, **options)
    lots = random.Random(0)
    for end in sorted(lots.sample(range(len(content)), 60)):
        try:
            open_rgb(content[:end])
            whole = True
        except DataError:
            whole = False
        assert (look_at(content[:end]).fault == "") == whole, end


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_a_look_agrees_with_training_on_damaged_bytes(kind):
    content, lots = encoded(drawing(7), kind), random.Random(1)
    for _ in range(30):
        damaged = bytearray(content)
        for place in lots.sample(range(len(damaged)), 8):
            damaged[place] = lots.randrange(256)
        try:
            open_rgb(bytes(damaged))
            whole = True
        except DataError:
            whole = False
        assert (look_at(bytes(damaged)).fault == "") == whole


def test_faults_are_told_in_words(tmp_path):
    (tmp_path / "empty.png").touch()
    assert look_at(str(tmp_path / "empty.png")).fault == "the file is empty"
    assert look_at(b"no picture at all").fault == "not a picture"
    assert "truncated" in look_at(encoded(drawing(8))[:900]).fault
    assert look_at(str(tmp_path / "none.png")).fault == "No such file or directory"
    bomb = encoded(Image.new("1", (8, 8)), "PNG")
    header = bomb[:16] + struct.pack(">II", 100_000, 100_000) + bomb[24:29]
    header += struct.pack(">I", zlib.crc32(header[12:29]))
    assert "decompression bomb" in look_at(header + bomb[33:]).fault


def test_several_processes_answer_as_one(tmp_path):
    pictures = []
    for number in range(70):  # more than two chunks
        (tmp_path / f"{number}.jpg").write_bytes(encoded(drawing(number, (40, 30))))
        pictures.append(Picture(f"{number}.jpg", ("x",), 1.0, str(tmp_path / f"{number}.jpg").__str__))
    pictures[3] = Picture("bytes", ("x",), 1.0, lambda: encoded(drawing(3, (40, 30))))

    def refused() -> bytes:
        raise DataError("row 5 has no picture")

    pictures[5] = Picture("refused", ("x",), 1.0, refused)
    one, two = list(look_at_all(pictures, processes=1)), list(look_at_all(pictures, processes=2))
    assert one == two and len(one) == 70
    assert [number for number, look in enumerate(one) if look.fault] == [5] and "row 5" in one[5].fault


def test_files_that_are_begun_early_are_looked_at_as_others(tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(70)]
    for number, file in enumerate(files):
        file.write_bytes(encoded(drawing(number, (24, 20)), "PNG") if number != 40 else b"no picture")
    pictures = [Picture(file.name, (), 1.0, partial(str, file), str(tmp_path)) for file in reversed(files)]
    stream = Picture("stream", (), 1.0, files[3].read_bytes)
    with looking([*map(str, files), str(tmp_path / "gone.png")], processes=2) as look:
        assert list(look([*pictures, stream])) == list(look_at_all([*pictures, stream], processes=1))
