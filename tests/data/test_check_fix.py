"""The cleaned copy: training takes it, nothing good is lost, and the source stays as it was."""

import json
import os
import shutil
from functools import partial

import pytest
from PIL import Image

from sdtune.data import fix
from sdtune.data.check import check
from sdtune.data.check_entries import Entry
from sdtune.data.check_sizes import Frame
from sdtune.data.fix import write_fixed
from sdtune.data.sources import Picture, Source, load_source
from sdtune.errors import DataError, UsageError
from tests.drawings import drawing, encoded

ROWS = [
    {"file_name": "a.jpg", "text": "one", "year": 1999, "mask_file_name": "masks/a.png"},
    {"file_name": "a.jpg", "text": " "},
    {"file_name": "broken.jpg", "text": "broken"},
    {"file_name": "missing.jpg", "text": "missing"},
    {"file_name": "blank.jpg", "text": ""},
    {"file_name": "../outside.jpg", "text": "outside"},
    {"file_name": "sub/copy.jpg", "text": "two", "weight": 1.0},
    {"file_name": "turned.jpg", "text": "turned", "weight": 2.0},
]


@pytest.fixture
def photos(tmp_path):
    """A folder with every fault that can be mended."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    (folder / "masks").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "a.jpg").write_bytes(encoded(drawing(0)))
    (folder / "masks" / "a.png").write_bytes(encoded(drawing(0).convert("L"), "PNG"))
    (folder / "sub" / "copy.jpg").write_bytes(encoded(drawing(0)))
    (folder / "broken.jpg").write_bytes(encoded(drawing(1))[:900])
    (folder / "blank.jpg").write_bytes(encoded(drawing(2)))
    (folder / "unnamed.jpg").write_bytes(encoded(drawing(3)))
    (folder / "turned.jpg").write_bytes(encoded(drawing(4), exif=exif))
    (tmp_path / "outside.jpg").write_bytes(encoded(drawing(5)))
    lines = [*map(json.dumps, ROWS), "{ no json"]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def look_through(folder, **options):
    return check([Entry(partial(load_source, path=folder, **options), path=folder, **options)], Frame(64, 64))


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_copy_is_clean_and_the_source_untouched(photos, tmp_path):
    before = content(photos)
    written = write_fixed(look_through(photos), tmp_path / "new" / "clean")
    out = tmp_path / "new" / "clean"
    assert written == {"kept": 2, "dropped": 4} and content(photos) == before
    assert list(content(out)) == ["a.jpg", "masks/a.png", "metadata.jsonl", "turned.jpg"]
    assert all(content(out)[name] == before[name] for name in ("a.jpg", "masks/a.png", "turned.jpg"))
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert rows == [ROWS[0], {**ROWS[0], "text": "two"}, ROWS[7]]  # the copy's caption is kept with the picture
    captions = {picture.name: picture.captions for picture in load_source(path=out).pictures}
    assert captions == {"a.jpg": ("one", "two"), "turned.jpg": ("turned",)}
    assert [finding.level for finding in look_through(out).findings if finding.level == "fatal"] == []
    assert [path.name for path in out.parent.iterdir()] == ["clean"]


def test_pictures_are_hard_links_or_else_copies(photos, tmp_path, monkeypatch):
    report = look_through(photos)
    write_fixed(report, tmp_path / "linked")
    assert os.path.samefile(photos / "a.jpg", tmp_path / "linked" / "a.jpg")

    def no_links(*arguments, **options):
        raise OSError("no links on this disk")

    monkeypatch.setattr(fix.os, "link", no_links)
    write_fixed(report, tmp_path / "copied")
    assert content(tmp_path / "linked") == content(tmp_path / "copied")
    assert not os.path.samefile(photos / "a.jpg", tmp_path / "copied" / "a.jpg")


def test_one_prompt_for_all_is_written_out(photos, tmp_path):
    (photos / "metadata.jsonl").unlink()
    shutil.rmtree(photos / "masks")
    write_fixed(look_through(photos, prompt="a photo"), tmp_path / "clean")
    captions = {picture.name: picture.captions for picture in load_source(path=tmp_path / "clean").pictures}
    assert captions == dict.fromkeys(["a.jpg", "blank.jpg", "turned.jpg", "unnamed.jpg"], ("a photo",))


def test_pictures_that_are_no_files(tmp_path):
    pictures = (
        Picture("00000000", ("one", "uno"), 1.0, lambda: encoded(drawing(0), "PNG"), "set"),
        Picture("shard/1", ("two",), 2.0, lambda: encoded(drawing(1)), "set"),
        Picture("00000002", ("three",), 1.0, lambda: b"broken", "set"),
    )
    report = check([Entry(lambda: Source(pictures))], Frame(64, 64))
    assert report.findings[0].names == ("00000002 (not a picture)",)
    assert write_fixed(report, tmp_path / "clean") == {"kept": 2, "dropped": 1}
    assert list(content(tmp_path / "clean")) == ["000000.png", "000001.jpg", "metadata.jsonl"]
    again = load_source(path=tmp_path / "clean").pictures
    assert [(picture.captions, picture.weight) for picture in again] == [(("one", "uno"), 1.0), (("two",), 2.0)]


def test_nothing_is_overwritten_and_nothing_half_done_is_left(photos, tmp_path, monkeypatch):
    report = look_through(photos)
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="there' exists already and is not overwritten"):
        write_fixed(report, tmp_path / "there")
    with pytest.raises(UsageError, match="lies in '.*photos', which is not touched"):
        write_fixed(report, photos / "clean")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fix, "link_or_copy", full)
    with pytest.raises(DataError, match="No space left on device; make room"):
        write_fixed(report, tmp_path / "clean")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside.jpg", "photos", "there"]


def test_nothing_good_is_no_data_set(photos, tmp_path):
    (photos / "metadata.jsonl").write_text('{"file_name": "broken.jpg", "text": "x"}')
    for name in ("a.jpg", "sub/copy.jpg", "blank.jpg", "unnamed.jpg", "turned.jpg"):
        (photos / name).unlink()
    with pytest.raises(DataError, match="no picture would be left"):
        write_fixed(look_through(photos), tmp_path / "clean")
    assert not (tmp_path / "clean").exists()
