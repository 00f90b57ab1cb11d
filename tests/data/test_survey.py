"""Before a run begins all broken pictures are found, good ones left alone, and the sizes of all known."""

import io
import os
import time

import numpy as np
import pytest
from PIL import Image

from sdtune.data import images
from sdtune.data import survey as module
from sdtune.data.picture import Picture
from sdtune.data.sources import Source, load_source
from sdtune.data.survey import survey, survey_all
from sdtune.errors import DataError


def broken(pictures, **options):
    return [fault for look in survey_all(pictures, **options) for fault in look.broken]


def encoded(kind: str, **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def mixed(tmp_path):
    """Good pictures of many kinds, among them some that end oddly, and broken ones; -> (folder, broken names)."""
    kinds = {name: encoded(name) for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")}
    good = {f"good.{name.lower()}": content for name, content in kinds.items()}
    good["motion.jpg"] = kinds["JPEG"] + b"a film behind the picture" * 9
    good["padded.jpg"] = kinds["JPEG"] + bytes(200)
    good["noted.png"] = kinds["PNG"] + b"a note behind the picture"
    bad = {f"cut.{name.lower()}": content[: len(content) // 2] for name, content in kinds.items()}
    bad |= {"empty.jpg": b"", "page.jpg": b"<html>404 Not Found</html>", "head.png": kinds["PNG"][:20]}
    for name, content in (good | bad).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path, set(bad)


@pytest.mark.parametrize("few", [500, 3])
def test_the_broken_ones_are_found_and_no_others(mixed, few, monkeypatch):
    monkeypatch.setattr(module, "FEW", few)
    folder, bad = mixed
    found = dict(broken(load_source(path=folder, prompt="x").pictures))
    assert {os.path.relpath(name, folder) for name in found} == bad
    assert found[os.path.join(folder, "page.jpg")] == found[os.path.join(folder, "empty.jpg")] == "not a picture"
    assert "truncated" in found[os.path.join(folder, "cut.jpeg")]


def test_all_are_told_in_one_paragraph(mixed, tmp_path):
    folder, bad = mixed
    source = load_source(path=folder, prompt="x")
    with pytest.raises(DataError) as fault:
        survey([source, source])  # a folder that is used twice is looked at once
    text = str(fault.value)
    assert text.startswith(f"{len(bad)} pictures cannot be read: {folder}") and f" and {len(bad) - 5} more; " in text
    assert "\n" not in text and text.count("cut.") == 5
    one = Source(tuple(picture for picture in source.pictures if picture.name == "page.jpg"))
    with pytest.raises(DataError, match=r"^1 picture cannot be read: .*page\.jpg \(not a picture\); replace it, or"):
        survey([one])
    survey([Source(tuple(picture for picture in source.pictures if picture.name not in bad))])


def test_pictures_that_are_not_files(monkeypatch, tmp_path):
    """Those of a data set or an archive are looked at as files are."""

    def read(number: int) -> bytes:
        return encoded("PNG")[: -40 if number == 1 else None] if number else b"nothing"

    pictures = [Picture(f"{n:08d}", ("x",), 1.0, lambda n=n: read(n), "user/set:train") for n in range(20)]
    few = broken(pictures)
    assert [name for name, _ in few] == ["user/set:train: 00000000", "user/set:train: 00000001"]
    monkeypatch.setattr(module, "FEW", 3)
    (tmp_path / "bad.png").write_bytes(b"x")
    many = broken([*pictures, *load_source(path=tmp_path, prompt="x").pictures])
    assert many == [*few, (str(tmp_path / "bad.png"), "not a picture")]


def test_a_picture_that_went_away(tmp_path):
    gone = Picture("a.png", ("x",), 1.0, lambda: str(tmp_path / "a.png"), str(tmp_path))
    assert broken([gone]) == [(str(tmp_path / "a.png"), "No such file or directory")]


def test_many_pictures_take_little_time(tmp_path):
    content = encoded("JPEG")
    for number in range(800):
        (tmp_path / f"{number}.jpg").write_bytes(content)
    pictures = load_source(path=tmp_path, prompt="x").pictures
    start = time.process_time()
    assert broken(pictures) == []
    assert time.process_time() - start < 4


@pytest.mark.parametrize("few", [500, 3])
def test_sizes_are_those_that_training_sees(tmp_path, few, monkeypatch):
    monkeypatch.setattr(module, "FEW", few)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        for orientation in (1, 3, 6, 8):
            exif = Image.Exif()
            exif[images.ORIENTATION] = orientation
            (tmp_path / f"{orientation}.{kind.lower()}").write_bytes(encoded(kind, exif=exif))
    (tmp_path / "plain.bmp").write_bytes(encoded("BMP"))
    (source,) = survey([load_source(path=tmp_path, prompt="x")])
    for picture in source.pictures:
        seen = images.open_rgb(picture.read())
        assert picture.size == (seen.height, seen.width), picture.name
    assert {picture.size for picture in source.pictures} == {(48, 64), (64, 48)}


def test_a_picture_of_two_sources_is_looked_at_once(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    reads = []
    picture = Picture("a.png", ("x",), 1.0, lambda: reads.append(1) or str(tmp_path / "a.png"), "here")
    sources = survey([Source((picture,)), Source((picture, picture), role="class")])
    assert [p.size for source in sources for p in source.pictures] == [(48, 64)] * 3 and len(reads) == 1
    assert [source.role for source in sources] == ["instance", "class"]
