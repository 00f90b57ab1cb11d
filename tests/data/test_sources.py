"""Folders and data sets: what is found, and what is refused in which words."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from sdtune.data.check_entries import data_set_entries
from sdtune.data.check_reading import read
from sdtune.data.images import open_rgb
from sdtune.data.metadata import read_rows
from sdtune.data.sources import load_source
from sdtune.errors import DataError, HubError


def names(source):
    return [picture.name for picture in source.pictures]


def captions(source):
    return {picture.name: picture.captions for picture in source.pictures}


def test_rows_are_captions_and_order_is_that_of_the_file(make_folder):
    folder = make_folder("photos", {"b.png": [" two  ", "deux"], "a.png": ["one"], "deep/er/c.JPG": ["three"]})
    source = load_source(path=folder, role="class", repeats=3, weight=0.5)
    assert captions(source) == {"b.png": ("two", "deux"), "a.png": ("one",), "deep/er/c.JPG": ("three",)}
    assert names(source) == ["b.png", "a.png", "deep/er/c.JPG"]
    assert (source.role, source.repeats, source.weight) == ("class", 3, 0.5)
    assert open_rgb(source.pictures[2].read()).size == (12, 8)
    assert {picture.weight for picture in source.pictures} == {1.0}


def test_an_edited_caption_or_picture_is_seen(make_folder):
    folder = make_folder("photos", {"a.png": ["old"]})
    assert captions(load_source(path=folder)) == {"a.png": ("old",)}
    stamp = (folder / "metadata.jsonl").stat()
    make_folder("photos", {"a.png": ["new"]})
    os.utime(folder / "metadata.jsonl", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # even within one clock tick
    assert captions(load_source(path=folder)) == {"a.png": ("new",)}
    make_folder("photos", {"a.png": ["new"], "b.png": ["more"]})
    assert captions(load_source(path=folder)) == {"a.png": ("new",), "b.png": ("more",)}


def test_nothing_is_left_behind(make_folder, tmp_path, monkeypatch):
    folder = make_folder("photos", {"a.png": ["one"]})
    for place in ["home", "temporary"]:
        (tmp_path / place).mkdir()
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parents[2])}
    code = f"from sdtune.data.sources import load_source; print(len(load_source(path={str(folder)!r}).pictures))"
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == "1\n" and ran.stderr == ""
    left = [path for place in ["home", "temporary"] for path in (tmp_path / place).rglob("*") if path.is_file()]
    assert left == []
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "metadata.jsonl"]


def test_a_prompt_is_the_caption_of_every_picture(make_folder):
    plain = make_folder("plain", {"b.png": [], "a/a.png": []})
    source = load_source(path=plain, prompt="a sks dog")
    assert captions(source) == {"a/a.png": ("a sks dog",), "b.png": ("a sks dog",)}
    listed = make_folder("listed", {"a.png": ["one", "two"], "b.png": []})
    assert captions(load_source(path=listed, prompt="x")) == {"a.png": ("x",), "b.png": ("x",)}
    other_key = make_folder("key", {"a.png": []}, rows=[{"file_name": "a.png", "caption": "one"}])
    assert captions(load_source(path=other_key, prompt="x")) == {"a.png": ("x",)}


def test_weights_masks_and_other_keys(make_folder):
    rows = [
        {"file_name": "a.png", "text": "one", "weight": 2, "mask_file_name": "masks/a.png", "note": "x"},
        {"file_name": "b.png", "text": "two", "weight": 0.5, "mask_file_name": "masks/b.png"},
        {"file_name": "b.png", "text": "zwei"},
        {"file_name": "c.png", "text": "three"},
    ]
    pictures = {name: [] for name in ["a.png", "b.png", "c.png", "masks/a.png", "masks/b.png"]}
    folder = make_folder("photos", pictures, rows=rows)
    for prompt in [None, "x"]:  # masks are no pictures of their own
        source = load_source(path=folder, prompt=prompt)
        weights = {picture.name: picture.weight for picture in source.pictures}
        assert weights == {"a.png": 2.0, "b.png": 0.5, "c.png": 1.0}
    rows[2]["weight"] = 3
    with pytest.raises(DataError, match="gives b.png the weights 0.5 and 3.0; expected one"):
        load_source(path=make_folder("photos", pictures, rows=rows))


@pytest.mark.parametrize("weight", ["heavy", -1, float("nan"), [1.0]])
def test_a_weight_that_is_none_is_told_with_its_row(make_folder, weight):
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": "two", "weight": weight}]
    folder = make_folder("photos", {"a.png": [], "b.png": []}, rows=rows)
    with pytest.raises(DataError, match="metadata.jsonl, row 2: the weight of b.png is .*; expected a number of at"):
        load_source(path=folder)


def test_other_columns_and_other_metadata_files(make_folder):
    rows = [{"file_name": "a.png", "caption": ["one", "two", " "]}]
    source = load_source(path=make_folder("lists", {"a.png": []}, rows=rows), text_column="caption")
    assert captions(source) == {"a.png": ("one", "two")}
    table = make_folder("csv", {"a.png": [], "b.png": []})
    (table / "metadata.csv").write_text('file_name,text\na.png,"one, with a comma"\nb.png,7\n')
    assert captions(load_source(path=table)) == {"a.png": ("one, with a comma",), "b.png": ("7",)}


def test_one_caption_in_a_row_and_several_in_the_next(make_folder):
    texts = ["one", ["two", "zwei"], None, 7]
    rows = [{"file_name": f"{number}.png", "text": text} for number, text in enumerate(texts)]
    rows += [{"file_name": "2.png", "text": ["three"], "year": 1}]
    folder = make_folder("photos", {f"{number}.png": [] for number in range(4)}, rows=rows)
    found = {"0.png": ("one",), "1.png": ("two", "zwei"), "2.png": ("three",), "3.png": ("7",)}
    assert captions(load_source(path=folder)) == found
    reading = read(data_set_entries(str(folder))[0])
    assert captions(reading) == found and not reading.refusal


def test_names_written_on_windows(make_folder):
    pictures = {"a/b.png": [], "masks/b.png": []}
    rows = [{"file_name": "a\\b.png", "text": "x", "mask_file_name": "masks\\b.png"}]
    folder = make_folder("photos", pictures, rows=rows)
    for table in (False, True):
        if table:
            (folder / "metadata.jsonl").unlink()
            (folder / "metadata.csv").write_text("file_name,text,mask_file_name\na\\b.png,x,masks\\b.png\n")
        (picture,) = load_source(path=folder).pictures
        assert picture.name == "a/b.png" and open_rgb(picture.read()).size == (12, 8)
        assert picture.mask() == str(folder / "masks" / "b.png")
        reading = read(data_set_entries(str(folder))[0])
        assert names(reading) == ["a/b.png"] and not reading.unreferenced + reading.missing


def test_metadata_in_sub_folders(make_folder):
    make_folder("photos/one", {"a.png": ["first"]})
    folder = make_folder("photos/two", {"a.png": ["second"]}).parent
    assert captions(load_source(path=folder)) == {"one/a.png": ("first",), "two/a.png": ("second",)}


@pytest.mark.parametrize("name", ["with space", "photos [2024]", "100% *new*", "größe", "test", "validation"])
def test_odd_names(make_folder, name):
    if os.name == "nt" and "*" in name:
        pytest.skip("not a name on Windows")
    folder = make_folder(name, {"my test picture [1].png": ["one"], "val-2.png": ["two"], "sub [x]/c.png": ["three"]})
    assert names(load_source(path=folder)) == ["my test picture [1].png", "val-2.png", "sub [x]/c.png"]
    assert open_rgb(load_source(path=folder).pictures[2].read()).size == (12, 8)


def test_a_path_relative_to_the_working_folder(make_folder, monkeypatch):
    folder = make_folder("photos", {"a.png": ["one"]})
    monkeypatch.chdir(folder.parent)
    relative, absolute = load_source(path="photos").pictures[0], load_source(path=folder).pictures[0]
    assert relative.name == absolute.name and relative.origin == absolute.origin
    assert open_rgb(relative.read()).size == (12, 8)


def test_folders_of_runs_and_class_pictures_are_no_part_of_the_folder_around_them(make_folder, tmp_path):
    photos = make_folder("photos", {"a.png": ["x"], "sub/b.png": ["y"]})
    make_folder("photos/run1", {"samples/step-000001/00.png": []})
    for name in ("run.yaml", "environment.json"):
        (photos / "run1" / name).write_text("{}")
    make_folder("photos/drawn", {"class-000000.png": ["a dog"]})
    (photos / "drawn" / "drawn_by.json").write_text("{}")
    assert names(load_source(path=photos)) == ["a.png", "sub/b.png"]
    assert names(load_source(path=photos, prompt="x")) == ["a.png", "sub/b.png"]
    (found,) = data_set_entries(str(photos))
    reading = read(found)
    assert len(reading.pictures) == 2 and not reading.unreferenced and not reading.refusal
    assert len(load_source(path=photos / "drawn").pictures) == 1
    with pytest.raises(DataError, match=r"run1 is the folder of a run.*drew.*data\.2\.path=FOLDER"):
        load_source(path=photos / "run1", prompt="x", key="data.2")
    assert len(load_source(path=photos / "run1" / "samples", prompt="x").pictures) == 1

    split = make_folder("split/train", {"a.png": ["x"]}).parent
    make_folder("split/val", {"b.png": ["y"]})
    (split / "run1").mkdir()
    assert len(load_source(path=split, prompt="x").pictures) == 2
    for name in ("run.yaml", "environment.json"):
        (split / "run1" / name).write_text("{}")
    assert names(load_source(path=split)) == ["a.png"]


def test_folders_that_are_no_part_of_it(make_folder):
    photos = make_folder("photos", {"a.png": ["x"]})
    inner = make_folder("photos/val", {"b.png": ["y"], "deep/c.png": ["z"]})
    assert len(load_source(path=photos).pictures) == 3
    assert names(load_source(path=photos, without=[str(inner.resolve())])) == ["a.png"]


def test_splits_of_a_folder(make_folder):
    make_folder("set/train", {"a.png": ["one"]})
    folder = make_folder("set/test", {"b.png": ["two"]}).parent
    assert names(load_source(path=folder)) == ["a.png"]
    assert names(load_source(path=folder, split="test")) == ["b.png"]
    with pytest.raises(DataError, match="has no split 'dev'; it has: test, train"):
        load_source(path=folder, split="dev")
    make_folder("things/train", {"a.png": []})  # a folder of trains beside other things is no split
    things = make_folder("things/bus", {"b.png": []}).parent
    assert names(load_source(path=things, prompt="x")) == ["bus/b.png", "train/a.png"]


def test_faults_of_a_folder(make_folder, tmp_path):
    with pytest.raises(DataError, match="none does not exist; make it with: sdtune caption PHOTOS --out .*none"):
        load_source(path=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="empty holds no pictures; expected files such as"):
        load_source(path=tmp_path / "empty")
    with pytest.raises(DataError, match=r"notes\.txt is a file; expected a folder"):
        load_source(path=tmp_path / "empty" / "notes.txt")
    match = r"has neither metadata\.jsonl nor \.txt files, so its pictures have no captions; .*data\.0\.prompt"
    with pytest.raises(DataError, match=match):
        load_source(path=make_folder("plain", {"a.png": []}))


def test_rows_without_picture_are_named(make_folder):
    rows = [{"file_name": f"{number}.png", "text": "x"} for number in range(9)]
    folder = make_folder("photos", {"0.png": [], "3.png": []}, rows=rows)
    for prompt in [None, "x"]:
        with pytest.raises(DataError) as fault:
            load_source(path=folder, prompt=prompt)
        assert (
            "7 pictures, 1.png, 2.png, 4.png, 5.png, 6.png and 2 more, are named in its metadata but not there"
            in str(fault.value)
        )


def test_pictures_without_caption_are_named(make_folder):
    folder = make_folder("photos", {"a.png": ["one"], "b.png": []})
    with pytest.raises(DataError, match="1 picture, b.png, is without caption; write a row .*sdtune caption"):
        load_source(path=folder)
    rows = [
        {"file_name": "a.png", "text": " "},
        {"file_name": "b.png", "text": None},
        {"file_name": "c.png", "text": "c"},
    ]
    with pytest.raises(DataError, match="2 pictures, a.png, b.png, are without caption"):
        load_source(path=make_folder("blank", {"a.png": [], "b.png": [], "c.png": []}, rows=rows))


def test_a_missing_column_is_named(make_folder):
    folder = make_folder("photos", {"a.png": []}, rows=[{"file_name": "a.png", "caption": "x", "year": 1}])
    with pytest.raises(DataError, match=r"no key 'text'; it has: caption, year.*data\.0\.text_column=KEY"):
        load_source(path=folder)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png", "text": \n', r"line 2 is not JSON"),
        ('{"file_name": "a.png", "text": "x"}\n{"text": "no name"}\n', r"names no picture"),
        ('{"text": "x"}\n', r"line 1 names no picture"),
        ("", "is empty"),
        ('{"file_name": "../secret.png", "text": "x"}', r"\.\./secret\.png"),
        ('{"file_name": "/etc/passwd", "text": "x"}', "/etc/passwd"),
    ],
)
def test_broken_metadata_is_explained_in_one_paragraph(make_folder, content, says):
    folder = make_folder("photos", {"a.png": []})
    (folder / "metadata.jsonl").write_text(content)
    with pytest.raises(DataError, match=says) as fault:
        load_source(path=folder)
    assert "\n" not in str(fault.value) and "Traceback" not in str(fault.value)


def test_either_a_folder_or_a_hub_data_set():
    with pytest.raises(ValueError, match="either path or hub"):
        load_source()


def test_a_large_folder_loads_without_looking_at_pictures(tmp_path):
    """10,000 empty files with 3 captions each: none is opened, and the time grows with their number only."""
    with open(tmp_path / "metadata.jsonl", "w") as file:
        for number in range(10_000):
            (tmp_path / f"{number}.png").touch()
            for caption in range(3):
                file.write(json.dumps({"file_name": f"{number}.png", "text": f"caption {caption}"}) + "\n")
    start = time.process_time()
    source = load_source(path=tmp_path)
    assert len(source.pictures) == 10_000 and len(source.pictures[-1].captions) == 3
    assert time.process_time() - start < 10


@pytest.fixture
def hub_set(tmp_path):
    """A data set as the Hub has them: Parquet with the bytes of the pictures inside."""
    import datasets

    pictures = [Image.new("RGB", (12, 8), (number * 50, 0, 0)) for number in range(3)]
    columns = {
        "picture": pictures,
        "caption": ["one", "two", "three"],
        "many": [["a", "b"], ["c"], []],
        "weight": [9, 9, 9],
    }
    features = datasets.Features(
        picture=datasets.Image(),
        caption=datasets.Value("string"),
        many=datasets.List(datasets.Value("string")),
        weight=datasets.Value("int64"),
    )
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "set" / "train-00000.parquet")
    return str(tmp_path / "set")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_hub_data_sets(hub_set):
    source = load_source(hub=hub_set, image_column="picture", text_column="caption")
    assert [picture.captions for picture in source.pictures] == [("one",), ("two",), ("three",)]
    assert open_rgb(source.pictures[2].read()).getpixel((0, 0)) == (100, 0, 0)
    assert len({picture.name for picture in source.pictures}) == 3
    assert {picture.weight for picture in source.pictures} == {1.0}  # a column `weight` may weigh anything
    prompted = load_source(hub=hub_set, image_column="picture", prompt="x", repeats=2)
    assert {picture.captions for picture in prompted.pictures} == {("x",)}


def test_classes_are_captions_by_name(tmp_path):
    import datasets

    columns = {"image": [Image.new("L", (12, 8))] * 2, "label": [1, 0]}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["shirt", "ankle boot"]))
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "set" / "train-00000.parquet")
    for place in ({"hub": str(tmp_path / "set")}, {"path": tmp_path / "set"}):
        pictures = load_source(**place, text_column="label").pictures
        assert [picture.captions for picture in pictures] == [("ankle boot",), ("shirt",)]
    columns["label"] = [1, -1]
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "set" / "train-00000.parquet")
    with pytest.raises(DataError, match="without caption"):
        load_source(path=tmp_path / "set", text_column="label")


def test_masks_of_hub_data_sets(tmp_path):
    import datasets

    columns = {"image": [Image.new("RGB", (12, 8))] * 3, "mask": [Image.new("L", (12, 8), 255), None, None]}
    features = datasets.Features(image=datasets.Image(), mask=datasets.Image())
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "set" / "train-00000.parquet")
    for place in ({"hub": str(tmp_path / "set")}, {"path": tmp_path / "set"}):
        first, *others = load_source(**place, prompt="x").pictures
        assert Image.open(io.BytesIO(first.mask())).getextrema() == (255, 255)
        assert [picture.mask for picture in others] == [None, None]


def test_faults_of_hub_data_sets(hub_set):
    with pytest.raises(DataError, match=r"no column 'image'; it has: picture, caption, .*data\.0\.image_column=COLUMN"):
        load_source(hub=hub_set)
    with pytest.raises(DataError, match="no column 'text'"):
        load_source(hub=hub_set, image_column="picture")
    with pytest.raises(DataError, match="holds no pictures"):
        load_source(hub=hub_set, image_column="many", text_column="caption")
    with pytest.raises(DataError, match="1 rows have no caption in 'many', the first is row 2"):
        load_source(hub=hub_set, image_column="picture", text_column="many")
    with pytest.raises(DataError, match='Unknown split "nope"'):
        load_source(hub=hub_set, split="nope", image_column="picture")


def test_no_network(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="Hub cannot be reached; check the network, or give a local folder") as fault:
        load_source(hub="nobody/nothing-here")
    assert "\n" not in str(fault.value)


def test_importing_is_cheap():
    heavy = "{'torch', 'datasets', 'PIL'}"
    code = f"import sys, sdtune.data.sources, sdtune.data.metadata; print(sorted({heavy} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True) == "[]\n"


def test_real_captions(shared_data, tmp_path):
    """The row layout that COCO is published in: stray spaces, five captions a picture, no last newline."""
    content = (shared_data / "coco-captions-jsonl" / "metadata.jsonl").read_bytes()
    (tmp_path / "metadata.jsonl").write_bytes(content)
    rows = read_rows(tmp_path)
    for name in {row["file_name"] for row in rows}:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    source = load_source(path=tmp_path)
    assert len(rows) == 500 and len(source.pictures) == 100
    assert {len(picture.captions) for picture in source.pictures} == {5}
    assert all(text == text.strip() for picture in source.pictures for text in picture.captions)


def test_real_photographs(shared_data):
    folders = [folder for folder in (shared_data / "dreambooth").iterdir() if folder.is_dir()]
    assert len(folders) == 6
    for folder in folders:
        source = load_source(path=folder, prompt="a photo of sks thing")
        assert 4 <= len(source.pictures) <= 6
        assert all(min(open_rgb(picture.read()).size) >= 256 for picture in source.pictures)


def test_faults_name_the_entry_of_the_recipe(make_folder, tmp_path, hub_set, monkeypatch):
    import huggingface_hub

    def says(**settings) -> str:
        with pytest.raises((DataError, HubError)) as fault:
            load_source(key="data.2", **settings)
        assert "data.0" not in str(fault.value)
        return str(fault.value)

    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    assert "data.2.path=FOLDER" in says(path=tmp_path / "empty")
    assert "data.2.path=FOLDER" in says(path=tmp_path / "file")
    assert "data.2.prompt='" in says(path=make_folder("plain", {"a.png": []}))
    assert "data.2.prompt='" in says(path=make_folder("photos", {"a.png": ["one"], "b.png": []}))
    fault = says(path=make_folder("key", {"a.png": []}, rows=[{"file_name": "a.png", "caption": "x"}]))
    assert "data.2.text_column=KEY" in fault and "data.2.prompt=" in fault
    assert "data.2.image_column=COLUMN" in says(hub=hub_set)
    assert "data.2.prompt=" in says(hub=hub_set, image_column="picture", text_column="many")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "data.2.hub=null data.2.path=FOLDER" in says(hub="nobody/nothing-here")
