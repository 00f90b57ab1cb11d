"""WebDataset shards, parquet files and .txt files beside pictures: found, read in place, and told of when damaged."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdtune.data.check import check
from sdtune.data.check_entries import data_set_entries
from sdtune.data.check_sizes import Frame
from sdtune.data.fix import write_fixed
from sdtune.data.layouts import archives
from sdtune.data.sources import load_source
from sdtune.errors import DataError, HubError
from sdtune.run import Run
from tests.factories import make_recipe


def png(number: int, size: int = 64) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (size, size), (number * 7 % 256, 90, number * 31 % 256)).save(content, "PNG")
    return content.getvalue()


def make_shard(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def make_parquet(file: Path, rows: list[dict[str, Any]], group: int = 2) -> Path:
    import pyarrow
    from pyarrow.parquet import write_table

    file.parent.mkdir(parents=True, exist_ok=True)
    write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=group)
    return file


def contents(source: Any) -> list[Any]:
    return [picture.read() for picture in source.pictures]


def img2dataset(folder: Path) -> Path:
    """Two shards with the .txt, .json and .parquet files that img2dataset writes, and one failed download."""
    for shard in (0, 1):
        members: dict[str, bytes] = {}
        for number in (2 * shard, 2 * shard + 1):
            key = f"{shard:05d}{number:04d}"
            members[f"{key}.png"] = png(number)
            members[f"{key}.txt"] = f" a dog {number}\n".encode()
            members[f"{key}.json"] = json.dumps({"caption": f"a dog {number}", "alt": f"alt {number}"}).encode()
        members[f"{shard:05d}0009.json"] = b'{"status": "failed_to_download"}'
        make_shard(folder / f"{shard:05d}.tar", members)
        make_parquet(folder / f"{shard:05d}.parquet", [{"url": "x", "caption": "y"}])
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    return folder


def test_shards_are_read_in_place(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path / "shards")
    source = load_source(path=folder)
    assert [picture.captions for picture in source.pictures] == [(f"a dog {i}",) for i in range(4)]
    assert contents(source) == [png(i) for i in range(4)]
    assert len({(picture.origin, picture.name) for picture in source.pictures}) == 4
    alt = load_source(path=folder, text_column="alt")
    assert [picture.captions for picture in alt.pictures] == [(f"alt {i}",) for i in range(4)]
    one = load_source(path=folder / "00001.tar")
    assert contents(one) == contents(load_source(path=str(folder / "*1.tar"))) == [png(2), png(3)]
    with pytest.raises(DataError, match="no .tar or .parquet file matches"):
        load_source(path=folder / "*2.tar")
    prompt = load_source(path=folder, prompt="sks")
    assert {picture.captions for picture in prompt.pictures} == {("sks",)}


def test_a_relative_pattern_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    img2dataset(tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    assert contents(load_source(path="shards/*.tar")) == [png(i) for i in range(4)]


def test_a_blank_text_file_does_not_hide_the_caption_in_the_json(tmp_path: Path) -> None:
    texts = {"a.txt": b" \n", "a.json": b'{"text": "", "caption": "from json"}'}
    make_shard(tmp_path / "0.tar", {"a.png": png(0), **texts})
    assert load_source(path=tmp_path / "0.tar").pictures[0].captions == ("from json",)


def test_shards_with_folders_dots_and_several_pictures(tmp_path: Path) -> None:
    members = {
        "a/1.v2/x.seg.png": png(9), "a/1.v2/x.png": png(1), "a/1.v2/x.cls": b"3",
        "a/1.v2/x.json": b'{"text": ["one", "two"]}',
        "a/._x.png": b"resource fork", "b/x.JPG": png(2), "b/x.txt": "späte Zeit".encode(),
    }  # fmt: skip
    source = load_source(path=make_shard(tmp_path / "x.tar", members))
    assert [(p.name, p.captions) for p in source.pictures] == [
        ("x.tar/a/1.v2/x", ("one", "two")),
        ("x.tar/b/x", ("späte Zeit",)),
    ]
    assert contents(source) == [png(1), png(2)]


def test_faults_of_shards_are_told(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path / "shards")
    whole = (folder / "00001.tar").read_bytes()
    between = whole[: 512 * 4]
    for content in (whole[:560], between, b"not a tar at all", b""):
        (folder / "00001.tar").write_bytes(content)
        with pytest.raises(DataError, match="00001.tar.*cannot be read as a WebDataset shard.*Fetch it again"):
            load_source(path=folder)
    for text, told in ((b"[1]", "1.json holds .1., expected a JSON object"), (b"{", "1.json is not JSON")):
        make_shard(folder / "00001.tar", {"1.png": png(1), "1.txt": b"a", "1.json": text})
        with pytest.raises(DataError, match=told):
            load_source(path=folder)
    make_shard(folder / "00001.tar", {"1.png": png(1), "2.png": png(2), "2.txt": b" \n"})
    with pytest.raises(DataError, match=r"2 pictures, 00001.tar/1, 00001.tar/2, are without caption.*data.3.prompt"):
        load_source(path=folder, key="data.3")
    with pytest.raises(DataError, match="hold no pictures"):
        load_source(path=make_shard(tmp_path / "empty.tar", {"1.txt": b"a"}))


def test_masks_of_shards_and_tables_train_and_are_kept_in_a_cleaned_copy(sd: Path, tmp_path: Path) -> None:
    mask = io.BytesIO()
    Image.linear_gradient("L").resize((64, 64)).save(mask, "PNG")
    texts = {"a.txt": b"a", "b.txt": b"b"}
    members = {"a.mask.png": mask.getvalue(), "a.png": png(1), "b.png": png(2), "b.seg.png": png(3), **texts}
    make_shard(tmp_path / "shards" / "0.tar", {name: members[name] for name in sorted(members)})
    cells = [{"image": png(1), "text": "a", "mask": mask.getvalue()}, {"image": png(2), "text": "b", "mask": None}]
    make_parquet(tmp_path / "tables" / "0.parquet", cells)
    for kind in ("shards", "tables"):
        (entry,) = data_set_entries(str(tmp_path / kind))
        report = check([entry], Frame(64, 64), masks=True)
        assert not report.fatal
        (without,) = [finding for finding in report.findings if finding.kind == "no mask"]
        assert without.names == (report.pictures[1].name,)
        write_fixed(report, tmp_path / f"{kind}-clean")
        for place in (kind, f"{kind}-clean"):
            first, second = load_source(path=tmp_path / place).pictures
            assert first.mask is not None and second.mask is None
            content = first.mask()
            assert (content if isinstance(content, bytes) else Path(content).read_bytes()) == mask.getvalue()
    recipe = make_recipe(sd, tmp_path / "shards", tmp_path / "run", objective={"outside_mask": 0.0})
    next(Run(recipe).steps())


def test_parquet_is_read_in_place(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "data" / "beside.png")
    rows: list[dict[str, Any]] = [
        {"image": {"bytes": png(i), "path": f"{i}.png"}, "text": f"a dog {i}"} for i in range(5)
    ] + [{"image": {"bytes": None, "path": "beside.png"}, "text": "beside"}]
    (tmp_path / "sub").mkdir()
    file = make_parquet(tmp_path / "sub" / "train-00000-of-00001.parquet", rows)
    (tmp_path / "data" / "beside.png").rename(tmp_path / "sub" / "beside.png")
    source = load_source(path=file)
    assert [picture.captions for picture in source.pictures] == [(row["text"],) for row in rows]
    assert contents(source) == [*(png(i) for i in range(5)), str(tmp_path / "sub" / "beside.png")]

    plain = make_parquet(tmp_path / "plain.parquet", [{"jpg": png(i), "caption": ["a", "", "b"]} for i in range(3)], 8)
    source = load_source(path=plain, image_column="jpg", text_column="caption")
    assert [picture.captions for picture in source.pictures] == [("a", "b")] * 3
    assert contents(source) == [png(0), png(1), png(2)]


def test_splits_of_files(tmp_path: Path) -> None:
    for split, number in (("train", 0), ("train", 1), ("test", 2)):
        make_parquet(tmp_path / "data" / f"{split}-0000{number}-of-2.parquet", [{"image": png(number), "text": "a"}])
    assert contents(load_source(path=tmp_path)) == [png(0), png(1)]
    assert contents(load_source(path=tmp_path, split="test")) == [png(2)]
    with pytest.raises(DataError, match="has no split 'val'; it has: test, train"):
        load_source(path=tmp_path, split="val")
    make_shard(tmp_path / "tars" / "val" / "1.tar", {"1.png": png(1), "1.txt": b"a"})
    make_shard(tmp_path / "tars" / "train" / "2.tar", {"2.png": png(2), "2.txt": b"a"})
    assert contents(load_source(path=tmp_path / "tars", split="val")) == [png(1)]


def test_faults_of_parquet_are_told(tmp_path: Path) -> None:
    file = make_parquet(tmp_path / "a.parquet", [{"image": png(0), "text": "a"}, {"image": None, "text": " "}])
    with pytest.raises(DataError, match=r"1 picture, a.parquet/0-000001, is without caption; expected a text in"):
        load_source(path=file)
    with pytest.raises(DataError, match="has no column 'words'; it has: image, text. .* data.1.text_column=COLUMN"):
        load_source(path=file, text_column="words", key="data.1")
    with pytest.raises(DataError, match="holds no picture"):
        load_source(path=file, prompt="x").pictures[1].read()
    whole = file.read_bytes()
    file.write_bytes(whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :])
    with pytest.raises(DataError, match="a.parquet cannot be read as a parquet file"):
        load_source(path=file)
    file.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match="cannot be read as a parquet file"):
        load_source(path=file)


def test_pictures_go_before_archives(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path / "shards")
    assert [path.name for path in archives(folder, "train")] == ["00000.tar", "00001.tar"]
    (folder / "a.png").write_bytes(png(1))
    assert archives(folder, "train") == []


def test_text_files_beside_pictures_are_their_captions(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in (("a.png", "one\n\n  two \n"), ("sub/b.c.png", "\ufeffthree")):
        (tmp_path / name).write_bytes(png(1))
        (tmp_path / name).with_suffix(".txt").write_text(text, encoding="utf-8")
    source = load_source(path=tmp_path)
    assert {picture.name: picture.captions for picture in source.pictures} == {
        "a.png": ("one", "two"),
        "sub/b.c.png": ("three",),
    }
    (tmp_path / "lost.png").write_bytes(png(2))
    with pytest.raises(DataError, match=r"1 picture, lost.png, is without caption in a .txt file.*sdtune caption"):
        load_source(path=tmp_path)
    (tmp_path / "lost.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="lost.txt cannot be read.*in UTF-8"):
        load_source(path=tmp_path)


def test_a_path_that_is_not_there_may_be_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="'someone/pokemon' is no folder here, and taken as an id of the Hub: .*"):
        load_source(path="someone/pokemon")
    with pytest.raises(DataError, match="does not exist"):
        load_source(path=tmp_path / "missing")


def test_archives_train_as_the_same_pictures_in_a_folder(sd: Path, photos: Path, tmp_path: Path) -> None:
    from tests.factories import losses

    rows = [json.loads(line) for line in (photos / "metadata.jsonl").read_text().splitlines()]
    members: dict[str, bytes] = {}
    for row in rows:
        stem = row["file_name"].rpartition(".")[0]
        members |= {row["file_name"]: (photos / row["file_name"]).read_bytes(), f"{stem}.txt": row["text"].encode()}
    shard = make_shard(tmp_path / "1.tar", members)
    table = [{"image": (photos / row["file_name"]).read_bytes(), "text": row["text"]} for row in rows]
    parquet = make_parquet(tmp_path / "1.parquet", table)
    found = []
    for number, path in enumerate((photos, shard, parquet)):
        run = Run(make_recipe(sd, path, tmp_path / str(number), train={"workers": number % 2}))
        run.complete()
        found.append(losses(run.folder.path))
    assert found[1] == pytest.approx(found[0], abs=1e-6) and found[2] == pytest.approx(found[0], abs=1e-6)
