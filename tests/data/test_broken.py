"""Broken pictures are all found before a run begins, and good ones are left alone."""

import io
import os
import time

import numpy as np
import pytest
from PIL import Image

from sdtune.data import broken as module
from sdtune.data.broken import broken, refuse_broken
from sdtune.data.picture import Picture
from sdtune.data.sources import Source, load_source
from sdtune.errors import DataError


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
        refuse_broken([source, source])  # a folder that is used twice is looked at once
    text = str(fault.value)
    assert text.startswith(f"{len(bad)} pictures cannot be read: {folder}") and f" and {len(bad) - 5} more; " in text
    assert "\n" not in text and text.count("cut.") == 5
    one = Source(tuple(picture for picture in source.pictures if picture.name == "page.jpg"))
    with pytest.raises(DataError, match=r"^1 picture cannot be read: .*page\.jpg \(not a picture\); replace it, or"):
        refuse_broken([one])
    refuse_broken([Source(tuple(picture for picture in source.pictures if picture.name not in bad))])


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
