"""`sdtune caption` from a folder to captions: what is written where, what is kept, what is rejected."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from data_tools.caption import command
from sdtune.data.sources import load_source
from sdtune.errors import DataError, SdtuneError, UsageError

STAMPS = Path("/usr/share/tuxpaint/stamps")


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def texts(folder: Path) -> dict[str, str]:
    return {row["file_name"]: row["text"] for row in rows(folder)}


def rejected(folder: Path) -> dict[str, str]:
    lines = (folder / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["file_name"]: row["reason"] for row in map(json.loads, lines)}


def test_captions_beside_the_pictures(fill, blip, capsys):
    photos = fill("b.png", "a.jpg", "sub/deep er/c.webp")
    (photos / "notes.doc").write_text("no picture by its name")
    assert command(photos, model=str(blip), max_tokens=5) == 0
    assert [row["file_name"] for row in rows(photos)] == ["a.jpg", "b.png", "sub/deep er/c.webp"]
    assert all(row.keys() == {"file_name", "text"} and row["text"].strip() for row in rows(photos))
    assert capsys.readouterr().out == f"3 captioned, 0 kept, 0 rejected: {photos / 'metadata.jsonl'}\n"
    assert sorted(path.name for path in photos.iterdir()) == [
        *("a.jpg", "b.png", "captions.json", "metadata.jsonl", "notes.doc", "sub")
    ]


def test_the_command_line(fill, blip):
    from sdtune.cli import app

    photos = fill("a.png")
    arguments = ["caption", str(photos), "--out", str(photos.parent / "set"), "--model", str(blip), "--json"]
    arguments += ["--trigger", "sks dog", "--max-tokens", "3", "--num-beams", "2", "--batch-size", "1"]
    arguments += ["--workers", "1"]
    answer = CliRunner().invoke(app, arguments)
    assert answer.exit_code == 0, answer.stderr
    result = json.loads(answer.stdout)
    assert result.items() >= {"captioned": 1, "kept": 0, "rejected": 0, "rejected_file": None}.items()
    assert result["out"] == str(photos.parent / "set" / "metadata.jsonl")
    assert texts(photos.parent / "set")["a.png"].startswith("sks dog, ")
    assert CliRunner().invoke(app, ["caption", str(photos), "--captions=0"]).exit_code == 2


def test_another_folder_links_to_the_pictures_and_opens_everywhere(fill, blip, tmp_path):
    import datasets

    photos, out = fill("a.png", "sub/b.png"), tmp_path / "set"
    (photos / "bad.png").write_bytes(b"")
    assert command(photos, out=out, model=str(blip), captions=2) == 1
    assert os.path.samefile(photos / "sub/b.png", out / "sub/b.png")
    assert not any(path.exists() for path in (photos / "metadata.jsonl", out / "bad.png", out / ".caption"))
    assert [row["file_name"] for row in rows(out)] == ["a.png"] * 2 + ["sub/b.png"] * 2
    opened = datasets.load_dataset("imagefolder", data_dir=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert opened["text"] == [row["text"] for row in rows(out)] and opened[3]["image"].size == (40, 30)
    assert [picture.captions for picture in load_source(path=str(out)).pictures] == [
        tuple(row["text"] for row in rows(out) if row["file_name"] == name) for name in ("a.png", "sub/b.png")
    ]


def opened(folder: Path, cache: Path) -> dict[str, set[str]]:
    """Captions by split, as HF datasets reads them."""
    import datasets

    found = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(cache))
    return {split: set(rows["text"]) for split, rows in found.items()}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("beside", [True, False])
def test_splits_keep_their_captions(fill, blip, tmp_path, beside, kind):
    photos = fill("train/a.png", "train/b.png", "test/test_1.png")
    out = photos if beside else tmp_path / "set"
    assert command(photos, out=out, model=str(blip), max_tokens=8, kind=kind) == 0
    last = "test_1.png" if beside else "xtest_1.png"
    found = {split: load_source(path=out, split=split).pictures for split in ("train", "test")}
    assert [[picture.name for picture in pictures] for pictures in found.values()] == [["a.png", "b.png"], [last]]
    assert opened(out, tmp_path / "cache") == {
        split: {text for picture in pictures for text in picture.captions} for split, pictures in found.items()
    }
    fill("train/a.png", "train/b.png", "test/test_1.png", "test/c.png")
    assert command(photos, out=out, model=str(blip), max_tokens=8, kind=kind) == 0  # the first three are kept
    again = load_source(path=out).pictures
    assert [picture.captions for picture in again] == [picture.captions for picture in found["train"]]
    assert len(load_source(path=out, split="test").pictures) == 2


def test_a_list_of_captions_is_several(fill, blip):
    photos = fill("a.png")
    (photos / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ["one", "two"]}', encoding="utf-8")
    command(photos, out=photos.parent / "set", model=str(blip), kind="txt")
    assert (photos.parent / "set" / "a.txt").read_text(encoding="utf-8") == "one\ntwo\n"


def test_names_like_those_of_splits(fill, blip, tmp_path, capsys):
    photos = fill("test_1.png", "b.png", "dev/c.png")
    (photos / "b.txt").write_text("mine", encoding="utf-8")
    for _ in range(2):
        assert command(photos, out=tmp_path / "set", model=str(blip), max_tokens=8) == 0
    assert capsys.readouterr().out.startswith("2 captioned, 1 kept, 0 rejected")
    assert texts(tmp_path / "set").keys() == {"b.png", "xdev/c.png", "xtest_1.png"}
    assert opened(tmp_path / "set", tmp_path / "cache") == {"train": set(texts(tmp_path / "set").values())}
    assert len(load_source(path=tmp_path / "set").pictures) == 3
    assert command(photos, model=str(blip), max_tokens=8) == 0
    assert "2 pictures, such as 'dev/c.png', have a name that HF datasets takes for a split" in capsys.readouterr().err
    fill("test_1.png", "xtest_1.png")
    with pytest.raises(DataError, match="'test_1.png' and 'xtest_1.png' would both be called 'xtest_1.png'"):
        command(photos, out=tmp_path / "new", model=str(blip))


def test_a_sub_folder_with_rows_of_its_own_keeps_them(fill, blip, tmp_path):
    photos = fill("dogs/a.png", "dogs/b.png", "c.png")
    (photos / "dogs" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "mine"}', encoding="utf-8")
    assert command(photos, model=str(blip), max_tokens=8) == 0
    assert texts(photos / "dogs").keys() == {"a.png", "b.png"} and texts(photos / "dogs")["a.png"] == "mine"
    assert texts(photos).keys() == {"c.png"}
    expected = {*texts(photos).values(), *texts(photos / "dogs").values()}
    assert opened(photos, tmp_path / "cache") == {"train": expected}
    assert len(load_source(path=photos).pictures) == 3


def test_text_files_and_parquet(fill, blip, tmp_path):
    import datasets

    photos = fill("a.png", "sub/b.png")
    assert command(photos, out=tmp_path / "set", model=str(blip)) == 0
    expected = texts(tmp_path / "set")
    assert command(photos, out=tmp_path / "columns", model=str(blip), kind="parquet") == 0
    fill("a0.png")
    assert command(photos, out=tmp_path / "columns", model=str(blip), kind="parquet") == 0  # goes on with its own
    (photos / "a0.png").unlink()
    opened = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "columns"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert opened["text"][:2] == list(expected.values()) and len(opened) == 3
    assert command(photos, model=str(blip), kind="txt") == 0
    assert (photos / "sub/b.txt").read_text(encoding="utf-8") == expected["sub/b.png"] + "\n"
    assert not (photos / "metadata.jsonl").exists()
    shutil.copy(photos / "a.png", photos / "a.jpg")
    with pytest.raises(DataError, match=r"'a.jpg' and 'a.png' would share a.txt; rename"):
        command(photos, model=str(blip), kind="txt")


def test_captions_that_are_there_are_kept(fill, blip, capsys):
    photos = fill("a.png", "b.png", "c.png", "d.png", "mask.png")
    given = [
        {"file_name": "c.png", "text": "mine", "weight": 2.0},
        {"file_name": "c.png", "text": "mine too"},
        {"file_name": "a.png", "weight": 3.0, "mask_file_name": "mask.png"},
    ]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, given)), encoding="utf-8")
    (photos / "b.txt").write_text("from a text file\n", encoding="utf-8")
    assert command(photos, out=photos.parent / "set", model=str(blip), as_json=True) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["captioned"], result["kept"]) == (2, 2)
    for folder in (photos.parent / "set", photos):
        command(photos, out=folder, model=str(blip))
        found = rows(folder)
        assert found[:2] == given[:2]
        assert [row["file_name"] for row in found] == ["c.png", "c.png", "a.png", "b.png", "d.png"]
        assert found[2].pop("text") and found[2] == given[2] and found[3]["text"] == "from a text file"
        assert folder == photos or os.path.samefile(folder / "mask.png", photos / "mask.png")
    runs = json.loads((photos / "captions.json").read_text())["runs"]
    assert command(photos, model="no/such-model") == 0  # nothing to do: no model is needed
    assert json.loads((photos / "captions.json").read_text())["runs"] == runs
    assert command(photos, model=str(blip), overwrite=True) == 0
    new = rows(photos)
    assert [row["file_name"] for row in new] == ["c.png", "a.png", "b.png", "d.png"] and new[0]["weight"] == 2.0
    assert "mine" not in texts(photos).values()


def test_new_pictures_join_an_earlier_result(fill, blip, tmp_path, capsys):
    photos, out = fill("b.png"), tmp_path / "set"
    command(photos, out=out, model=str(blip))
    command(photos, out=out, model=str(blip))
    assert "other settings" not in capsys.readouterr().err
    before = rows(out)
    fill("a.png")
    command(photos, out=out, model=str(blip), prompt="a picture of")
    assert (
        "the captions that are kept were written with other settings (prompt: '' before, 'a picture of' now); with "
        "--overwrite all are written anew\n" in capsys.readouterr().err
    )
    assert rows(out)[0] == before[0] and [row["file_name"] for row in rows(out)] == ["b.png", "a.png"]
    runs = json.loads((out / "captions.json").read_text())["runs"]
    assert [(run["prompt"], run["captioned"]) for run in runs] == [("", 1), ("a picture of", 1)]
    assert runs[0]["model"] == str(blip) and runs[0]["num_beams"] == 3 and runs[0]["versions"]["transformers"]
    assert runs[0]["precision"] == "fp32" and runs[0]["started"] < runs[1]["started"]


def test_bad_pictures_are_told_and_the_rest_goes_on(fill, blip, monkeypatch, capsys):
    photos = fill("good.png", "tiny.png", "cut.jpg", "huge.png", "rotated.jpg")
    Image.new("RGB", (1, 3)).save(photos / "tiny.png")
    content = (photos / "cut.jpg").read_bytes()
    (photos / "cut.jpg").write_bytes(content[: len(content) // 2])
    (photos / "empty.png").write_bytes(b"")
    (photos / "text.gif").write_text("not a picture")
    Image.new("RGB", (300, 300)).save(photos / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)  # a bomb has more than twice as many
    bad = {"cut.jpg", "empty.png", "text.gif", "huge.png"}
    if hasattr(os, "mkfifo"):
        os.mkfifo(photos / "pipe.png")
        bad.add("pipe.png")
    if os.name == "posix":
        Path(os.fsdecode(os.fsencode(photos) + b"/latin-\xe9.png")).write_bytes(b"")
        (photos / "back\\slash.png").write_bytes(b"")
        (photos / "gone.png").symlink_to("nowhere.png")
        bad |= {"latin-\\udce9.png", "back\\slash.png", "gone.png"}
    (photos / "metadata.jsonl").write_text(
        '{"file_name": "../secret.png", "text": "x"}\n{"file_name": "lost.png", "text": "y"}\n', encoding="utf-8"
    )
    bad |= {"../secret.png", "lost.png"}
    out = photos.parent / "set"
    assert command(photos, out=out, model=str(blip)) == 1
    assert rejected(out).keys() == bad
    assert "bomb" in rejected(out)["huge.png"] and "cannot be read as a picture" in rejected(out)["cut.jpg"]
    assert texts(out).keys() == {"good.png", "tiny.png", "rotated.jpg"}
    assert f"3 captioned, 0 kept, {len(bad)} rejected (see {out / 'rejected.jsonl'})" in capsys.readouterr().out
    assert not (photos.parent / "secret.png").exists()


def test_a_mended_folder_has_no_list_of_rejected_pictures(fill, blip):
    photos = fill("a.png", "b.png")
    (photos / "b.png").write_bytes(b"")
    assert command(photos, model=str(blip)) == 1 and rejected(photos).keys() == {"b.png"}
    fill("b.png", folder="photos")
    assert command(photos, model=str(blip)) == 0
    assert texts(photos).keys() == {"a.png", "b.png"} and not (photos / "rejected.jsonl").exists()


def test_a_picture_that_the_model_says_nothing_about(fill, blip, monkeypatch):
    from data_tools.captioner import Captioner

    photos = fill("a.png", "b.png")
    monkeypatch.setattr(Captioner, "write", lambda self, prepared, names, size: [["", "a dog"], [""]])
    assert command(photos, model=str(blip), trigger="sks") == 1
    assert texts(photos) == {"a.png": "sks, a dog"}
    assert rejected(photos) == {"b.png": "the model wrote nothing about it"}


def test_a_full_gpu_is_told_and_loses_nothing(fill, blip, monkeypatch):
    import torch

    from data_tools.captioner import Captioner

    photos, write = fill("a.png", "b.png"), Captioner.write

    def second_time(self: Captioner, prepared: Any, names: Any, size: int) -> Any:
        if names == ["b.png"]:
            raise torch.OutOfMemoryError
        return write(self, prepared, names, size)

    monkeypatch.setattr(Captioner, "write", second_time)
    with pytest.raises(SdtuneError, match="the GPU's memory is full; try --batch-size 1.*is kept"):
        command(photos, model=str(blip), batch_size=1)
    assert (photos / ".caption/done-0.jsonl").read_bytes().count(b"\n") == 1


def test_names_of_every_kind(fill, blip):
    names = ["ümläut 日本.png", "[glob]*?.png" if os.name == "posix" else "[glob].png", "quote'\".png", "UPPER.PNG"]
    names = [name for name in names if os.name == "posix" or '"' not in name]
    photos = fill(*names)
    assert command(photos, model=str(blip)) == 0
    assert texts(photos).keys() == set(names)
    assert {picture.name for picture in load_source(path=str(photos)).pictures} == set(names)


def test_where_it_cannot_work(fill, blip, tmp_path):
    photos = fill("a.png")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="'.*none' holds no pictures; expected files that end in .avif, "):
        command(tmp_path / "none", model=str(blip))
    with pytest.raises(DataError, match="missing' does not exist; expected a folder"):
        command(tmp_path / "missing")
    with pytest.raises(DataError, match="a.png' is a file; expected a folder"):
        command(photos / "a.png")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious.txt").write_text("x")
    with pytest.raises(UsageError, match="has things in it that do not come from sdtune caption"):
        command(photos, out=tmp_path / "full", model=str(blip))
    with pytest.raises(UsageError, match="is a file; expected a folder"):
        command(photos, out=tmp_path / "full/precious.txt", model=str(blip))
    with pytest.raises(UsageError, match="--format: got 'xml', expected one of jsonl, txt, parquet"):
        command(photos, kind="xml")
    (photos / "metadata.csv").write_text("file_name,text,weight\na.png,mine,2\n")
    with pytest.raises(UsageError, match="metadata.csv' has captions already.*--out"):
        command(photos, model=str(blip))
    with pytest.raises(UsageError, match="inside' lies in '.*photos', whose pictures would stand there twice"):
        command(photos, out=photos / "inside", model=str(blip))
    with pytest.raises(UsageError, match="--temperature: got nan, expected more than 0"):
        command(photos, out=tmp_path / "set", model=str(blip), sample=True, temperature=float("nan"))
    assert command(photos, out=tmp_path / "set", model=str(blip)) == 0
    assert rows(tmp_path / "set") == [{"file_name": "a.png", "text": "mine", "weight": 2.0}]


def test_without_links_pictures_are_copied(fill, blip, tmp_path, monkeypatch):
    def refuse(*arguments: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    photos = fill("a.png")
    command(photos, out=tmp_path / "set", model=str(blip))
    copy = tmp_path / "set/a.png"
    assert copy.read_bytes() == (photos / "a.png").read_bytes() and not os.path.samefile(copy, photos / "a.png")


def test_threads_decode_ahead_of_the_model(fill, blip, monkeypatch):
    import threading

    from data_tools import caption
    from data_tools.captioner import Captioner

    names = [f"{number:02d}.png" for number in range(12)]
    photos, read, ahead = fill(*names), set(), []
    prepare, write = Captioner.prepare, Captioner.write

    def note_read(self: Captioner, picture: Image.Image) -> Any:
        read.add(threading.current_thread().name)
        return prepare(self, picture)

    def note_write(self: Captioner, prepared: Any, names: Any, size: int) -> Any:
        assert len(prepared) <= size == 2
        ahead.append(len(prepared))
        return write(self, prepared, names, size)

    monkeypatch.setattr(Captioner, "prepare", note_read)
    monkeypatch.setattr(Captioner, "write", note_write)
    assert caption.command(photos, model=str(blip), batch_size=2, workers=3) == 0
    assert any(name.startswith("decode") for name in read) and ahead == [2] * 6


@pytest.mark.skipif(not STAMPS.is_dir(), reason=f"{STAMPS} is absent (Debian's tuxpaint-stamps-default)")
def test_drawings_of_every_mode_and_size(blip, tmp_path):
    stamps = sorted(path.relative_to(STAMPS).as_posix() for path in STAMPS.rglob("*.png"))
    part = tmp_path / "stamps"
    for name in stamps[::16]:
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(STAMPS / name, part / name)
    assert command(part, out=tmp_path / "set", model=str(blip), max_tokens=4, num_beams=1) == 0
    assert list(texts(tmp_path / "set")) == sorted(stamps[::16]) and len(stamps) > 700
