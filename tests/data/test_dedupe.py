"""`sdtune dedupe`: shows pictures that look alike and keeps the largest of each."""

import json
import shutil

import pytest
from PIL import Image

from sdtune.data.dedupe import command
from sdtune.errors import DataError, UsageError
from tests.drawings import drawing, encoded


@pytest.fixture
def photos(tmp_path):
    """One picture in three sizes, another twice, and two alone."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for name, seed, size in [
        ("small.jpg", 0, (96, 80)),
        ("large.jpg", 0, (192, 160)),
        ("more/middle.png", 0, (144, 120)),
        ("b.jpg", 1, (96, 80)),
        ("alone.jpg", 2, (96, 80)),
        ("alone.png", 3, (96, 80)),
    ]:
        picture = drawing(seed, (192, 160)).resize(size, Image.Resampling.LANCZOS)
        (folder / name).write_bytes(encoded(picture, "PNG" if name.endswith("png") else "JPEG"))
    shutil.copy(folder / "b.jpg", folder / "copy of b.jpg")
    (folder / "broken.jpg").write_bytes(b"x")
    return folder


GROUPS = [["large.jpg", "more/middle.png", "small.jpg"], ["b.jpg", "copy of b.jpg"]]


def test_groups_are_shown_and_nothing_is_written(photos, capsys):
    before = sorted(photos.rglob("*"))
    assert command(str(photos)) == 0
    shown = capsys.readouterr()
    assert "keep      192 x 160" in shown.out and "large.jpg" in shown.out and "copy of b.jpg  (equal)" in shown.out
    assert shown.out.endswith("8 pictures: 2 groups of pictures that look alike, 3 pictures could go\n")
    assert "1 picture cannot be read, left out: broken.jpg" in shown.err
    assert sorted(photos.rglob("*")) == before


def test_the_kept_ones_are_written_with_their_captions(photos, tmp_path, capsys):
    names = ["small.jpg", "large.jpg", "alone.jpg", "b.jpg", "copy of b.jpg"]
    rows = [{"file_name": name, "text": f"caption of {name}", "year": 7} for name in names]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert command(str(photos), out=tmp_path / "kept", as_json=True) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["groups"] == GROUPS and values["dropped"] == 3 and values["broken"] == ["broken.jpg"]
    kept = {path.name for path in (tmp_path / "kept").rglob("*") if path.is_file()}
    assert kept == {"large.jpg", "b.jpg", "alone.jpg", "alone.png", "metadata.jsonl"}
    written = [json.loads(line) for line in (tmp_path / "kept" / "metadata.jsonl").read_text().splitlines()]
    assert written == [rows[1], rows[2], rows[3]]
    with pytest.raises(UsageError, match="exists already"):
        command(str(photos), out=tmp_path / "kept")


def test_the_threshold_counts_bits(photos, capsys):
    assert command(str(photos), threshold=0, as_json=True) == 0
    assert ["b.jpg", "copy of b.jpg"] in json.loads(capsys.readouterr().out)["groups"]
    with pytest.raises(UsageError, match="--threshold: got 17, expected a number of bits from 0 to 16"):
        command(str(photos), threshold=17)


def test_a_sheet_shows_the_groups(photos, tmp_path, capsys):
    command(str(photos), sheet=tmp_path / "alike.png")
    with Image.open(tmp_path / "alike.png") as sheet:
        assert sheet.size == (8 + 3 * 136, 8 + 2 * 168)
        assert sheet.getpixel((8 + 2 * 136 + 64, 8 + 168 + 64)) == (255, 255, 255)  # the second row has two only
    locked = tmp_path / "locked"
    locked.write_text("no folder")
    with pytest.raises(DataError, match="cannot be written"):
        command(str(photos), sheet=locked / "alike.png")
    for name, why in [("alike.png", "exists already"), ("alike.doc", "is no kind of picture")]:
        with pytest.raises(UsageError, match=why):
            command(str(photos), sheet=tmp_path / name)


def test_a_folder_without_pictures(tmp_path):
    with pytest.raises(DataError, match="holds no pictures"):
        command(str(tmp_path))


def test_all_splits_are_looked_at_and_kept(photos, tmp_path, capsys):
    for split, names in {"train": ["large.jpg", "alone.jpg"], "test": ["small.jpg", "alone.png"]}.items():
        for name in names:
            (tmp_path / "set" / split).mkdir(parents=True, exist_ok=True)
            shutil.copy(photos / name, tmp_path / "set" / split / name)
    assert command(str(tmp_path / "set"), out=tmp_path / "kept", as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["groups"] == [["train: large.jpg", "test: small.jpg"]]
    kept = sorted(str(path.relative_to(tmp_path / "kept")) for path in (tmp_path / "kept").rglob("*.*"))
    assert kept == ["test/alone.png", "train/alone.jpg", "train/large.jpg"]


def test_tables_of_any_columns(photos, capsys):
    import pyarrow
    import pyarrow.parquet

    rows = [{"img": (photos / name).read_bytes()} for name in ("large.jpg", "small.jpg", "alone.jpg")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), photos.parent / "a.parquet")
    assert command(str(photos.parent / "a.parquet"), image_column="img", as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["groups"] == [["a.parquet/0-000000", "a.parquet/0-000001"]]
