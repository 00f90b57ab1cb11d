"""sdtune coco: real COCO files, every option, and every flaw that such files have."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_tools import coco
from sdtune.data.metadata import read_rows
from sdtune.errors import DataError, UsageError

MINI = Path(__file__).parents[3] / "shared" / "data" / "coco-mini"
CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
LICENSES = [{"id": 1, "name": "Attribution License"}, {"id": 4, "name": "No known restrictions"}]


def instance(number: int, picture: Any, category: int, area: float = 100.0, crowd: int = 0) -> dict[str, Any]:
    box = [0, 0, 8, 0, 8, 4, 0, 4]
    return {
        "id": number, "image_id": picture, "category_id": category, "area": area, "iscrowd": crowd,
        "bbox": [0, 0, 8, 4], "segmentation": [box],
    }  # fmt: skip


class Place:
    """A small COCO of 10 pictures, 16 x 12 pixels, with 2 captions each; change `captions`, then `build`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, folder / "pictures"
        self.captions: dict[str, Any] = {
            "info": {"year": 2017},
            "licenses": LICENSES,
            "images": [
                {"id": i, "file_name": f"{i:03d}.jpg", "width": 16, "height": 12, "license": 4 if i == 3 else 1}
                for i in range(1, 11)
            ],
            "annotations": [
                {"id": 100 * turn + i, "image_id": i, "caption": f" {'A longer' if turn else 'A'} caption of {i}\n"}
                for turn in (0, 1)
                for i in range(1, 11)
            ],
        }
        self.instances: dict[str, Any] = {
            "images": self.captions["images"],
            "categories": CATEGORIES,
            "annotations": [
                instance(1, 1, 1), instance(2, 2, 2), instance(3, 3, 1), instance(4, 3, 2, area=900),
                instance(5, 4, 1, area=5), instance(6, 5, 1, crowd=1),
            ],
        }  # fmt: skip

    def save(self) -> None:
        self.images.mkdir(exist_ok=True)
        for picture in self.captions["images"]:
            path = self.images / str(picture.get("file_name"))
            inside = "\\" not in str(path) and path.resolve().is_relative_to(self.images.resolve())
            if inside and path.suffix == ".jpg" and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 12), "red").save(path)
        for name in ("captions", "instances"):
            (self.folder / f"{name}.json").write_text(json.dumps(getattr(self, name)), encoding="utf-8")

    def build(self, out: str = "out", **options: Any) -> dict[str, Any]:
        """The summary of a run."""
        self.save()
        if any(options.get(key) for key in ("categories", "masks", "min_area", "no_crowd", "prompt_from")):
            options.setdefault("instances", self.folder / "instances.json")
        options.setdefault("images", self.images)
        options.setdefault("captions", self.folder / "captions.json")
        assert coco.command(out=self.folder / out, as_json=True, **options) == 0
        return json.loads(self.capsys.readouterr().out.splitlines()[-1])

    def rows(self, out: str = "out") -> list[dict[str, Any]]:
        return read_rows(self.folder / out)

    def rejected(self, out: str = "out") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / out / "rejected.jsonl").read_text().splitlines()]

    def pictures(self, out: str = "out") -> list[int]:
        return sorted({int(row["file_name"][:3]) for row in self.rows(out)})

    capsys: pytest.CaptureFixture[str]


@pytest.fixture
def place(tmp_path, capsys):
    made = Place(tmp_path)
    made.capsys = capsys
    return made


@pytest.fixture
def mini():
    if not MINI.is_dir():
        pytest.skip(f"{MINI} is not there")
    return MINI


def load(folder: Path, cache: Path) -> Any:
    import datasets

    return datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=str(cache))


# --- real material --------------------------------------------------------------------------------------------------


def test_real_coco_loads_with_all_captions(mini, tmp_path, capsys):
    out, annotations = tmp_path / "out", mini / "annotations"
    assert coco.command(captions=annotations / "captions_train2017.json", images=mini / "train2017", out=out) == 0
    assert "400 captions of 80 pictures" in capsys.readouterr().out
    table = load(out, tmp_path / "cache")["train"]
    assert table.num_rows == 400 and table.column_names == ["image", "text"]
    assert table[0]["image"].size[0] > 100
    given = json.loads((annotations / "captions_train2017.json").read_text())
    assert sorted(table["text"]) == sorted(entry["caption"].strip() for entry in given["annotations"])
    assert not (out / "rejected.jsonl").exists()


def test_real_masks_and_splits_load(mini, tmp_path, capsys):
    annotations = mini / "annotations"
    coco.command(
        captions=annotations / "captions_train2017.json", instances=annotations / "instances_train2017.json",
        images=mini, out=tmp_path / "out", categories=["person"], masks=True, splits=["val=0.2"], as_json=True,
    )  # fmt: skip
    summary = json.loads(capsys.readouterr().out)
    assert summary["rejected"] == {} and summary["pictures"] + summary["filtered"]["instances"] == 80
    table = load(tmp_path / "out", tmp_path / "cache")
    assert {name: split.num_rows for name, split in table.items()} == {
        {"val": "validation"}.get(name, name): count["rows"] for name, count in summary["splits"].items()
    }
    row = table["train"][0]
    assert set(row) == {"image", "text", "mask"} and row["mask"].size == row["image"].size
    assert row["mask"].mode == "L" and {value for _, value in row["mask"].getcolors()} == {0, 255}


def test_the_layout_of_the_known_jsonl_is_made(tmp_path):
    known = MINI.parent / "coco-captions-jsonl" / "metadata.jsonl"
    if not known.is_file():
        pytest.skip(f"{known} is not there")
    rows = read_rows(known)
    ids = {name: number for number, name in enumerate(dict.fromkeys(row["file_name"] for row in rows))}
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({
        "images": [{"id": id_, "file_name": name} for name, id_ in ids.items()],
        "annotations": [
            {"id": number, "image_id": ids[row["file_name"]], "caption": row["text"]} for number, row in enumerate(rows)
        ],
    }))  # fmt: skip
    coco.command(captions=file, images=None, images_mode="reference", out=tmp_path / "names")
    expected = [row | {"text": row["text"].strip()} for row in rows]
    assert read_rows(tmp_path / "names") == expected and len(expected) == 500 and len(ids) == 100
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ids:
        Image.new("RGB", (8, 8)).save(pictures / name)
    coco.command(captions=file, images=pictures, out=tmp_path / "out")
    table = load(tmp_path / "out", tmp_path / "cache")  # COCO_val2014_... reads as a split, and must not be one
    assert {name: split.num_rows for name, split in table.items()} == {"train": 500}
    assert table["train"]["text"][:] == [row["text"] for row in expected]


# --- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("all", ["A caption of 1", "A longer caption of 1"]),
        ("first", ["A caption of 1"]),
        ("longest", ["A longer caption of 1"]),
        ("join", ["A caption of 1. A longer caption of 1."]),
    ],
)
def test_captions_per_image(place, rule, expected):
    place.build(captions_per_image=rule)
    assert [row["text"] for row in place.rows() if row["file_name"] == "001.jpg"] == expected


def test_random_captions_depend_on_seed_and_picture_alone(place):
    for out, rule in (("a", "random:1"), ("b", "random:1"), ("c", "random:2")):
        assert place.build(out, captions_per_image=rule)["rows"] == 10
    assert place.rows("a") == place.rows("b") != place.rows("c")
    place.captions["images"].reverse()
    del place.captions["images"][:4]
    place.build("d", captions_per_image="random:1")
    assert all(row in place.rows("a") for row in place.rows("d"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"categories": ["cat"]}, [1, 3, 4, 5]),
        ({"categories": ["CAT", "dog"]}, [1, 2, 3, 4, 5]),
        ({"categories": ["cat", "dog"], "match": "all"}, [3]),
        ({"categories": ["cat"], "min_area": 50.0}, [1, 3, 5]),
        ({"categories": ["cat"], "no_crowd": True}, [1, 3, 4]),
        ({"min_area": 500.0}, [3]),
        ({"licenses": ["4"]}, [3]),
        ({"licenses": ["attribution license"]}, [1, 2, 4, 5, 6, 7, 8, 9, 10]),
    ],
)
def test_filters(place, options, expected):
    summary = place.build(**options)
    assert place.pictures() == expected
    assert sum(summary["filtered"].values()) == 10 - len(expected) and summary["rejected"] == {}


def test_limit_draws_by_seed(place):
    chosen = {}
    for seed in range(4):
        assert place.build(f"out{seed}", limit=4, seed=seed)["filtered"] == {"limit": 6}
        chosen[seed] = place.pictures(f"out{seed}")
    assert all(len(pictures) == 4 for pictures in chosen.values()) and len(set(map(tuple, chosen.values()))) > 1
    place.build("again", limit=5, seed=2)
    assert set(chosen[2]) < set(place.pictures("again"))


def test_splits_are_by_picture_and_pure(place):
    summary = place.build(splits=["val=0.3", "test=0.2"], seed=3)
    found = {name: place.pictures(f"out/{name}") for name in ("train", "val", "test")}
    assert sorted(sum(found.values(), [])) == list(range(1, 11))
    assert {name: count["pictures"] for name, count in summary["splits"].items()} == {
        name: len(pictures) for name, pictures in found.items()
    }
    del place.captions["images"][0]
    place.build("fewer", splits=["val=0.3", "test=0.2"], seed=3)
    assert set(place.pictures("fewer/val")) <= set(found["val"])
    assert all((place.folder / "out" / "val" / row["file_name"]).is_file() for row in place.rows("out/val"))


def test_a_split_without_pictures_is_an_error(place):
    with pytest.raises(DataError, match="no picture is left for val"):
        place.build(splits=["val=0.001"])
    assert not (place.folder / "out").exists() and not list(place.folder.glob(".*"))


@pytest.mark.parametrize("captions", [True, False])
def test_prompts_from_categories(place, captions):
    place.save()
    options = {} if captions else {"captions": None}
    place.build(prompt_from="category", **options)
    texts = {row["file_name"]: row["text"] for row in place.rows()}
    assert texts["001.jpg"] == "a photo of a cat" and texts["003.jpg"] == "a photo of a dog" and len(texts) == 5


@pytest.mark.parametrize("mode", ["copy", "link", "reference"])
def test_images_modes(place, mode):
    place.build(images_mode=mode)
    made, source = place.folder / "out" / "001.jpg", place.images / "001.jpg"
    assert made.exists() == (mode != "reference") and not made.is_symlink()
    if mode != "reference":
        assert made.samefile(source) == (mode == "link") and made.read_bytes() == source.read_bytes()


def test_a_link_that_cannot_be_made_is_a_copy(place, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("other disk")))
    place.build()
    assert (place.folder / "out" / "001.jpg").read_bytes() == (place.images / "001.jpg").read_bytes()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"captions_per_image": "random"}, "random:SEED"),
        ({"captions_per_image": "best"}, "got 'best'"),
        ({"match": "some"}, "any or all"),
        ({"match": "all"}, "--category cat"),
        ({"images_mode": "move"}, "copy or link or reference"),
        ({"images_mode": "reference", "splits": ["val=0.5"]}, "--images-mode reference moves none"),
        ({"images": None}, "name their folder with --images"),
        ({"images": Path("nowhere")}, "is no folder"),
        ({"captions": None}, "--captions captions_X.json"),
        ({"prompt_from": "title"}, "expected category"),
        ({"splits": ["val=2"]}, "between 0 and 1"),
        ({"splits": ["holdout=0.1"]}, "expected one of val"),
        ({"splits": ["val=0.1", "validation=0.1"]}, "two names of one split"),
        ({"splits": ["val=0.5", "test=0.5"]}, "none for train"),
        ({"categories": ["cta"]}, "did you mean 'cat'"),
        ({"licenses": ["9"]}, "1 Attribution License"),
    ],
)
def test_wrong_options_say_what_is_expected(place, options, says):
    with pytest.raises(UsageError, match=says):
        place.build(**options)
    place.save()
    assert not (place.folder / "out").exists()


@pytest.mark.parametrize("option", [{"categories": ["cat"]}, {"min_area": 1.0}, {"no_crowd": True}, {"masks": True}])
def test_objects_need_their_file(place, option):
    with pytest.raises(UsageError, match="--instances instances_X.json"):
        place.build(instances=None, **option)


# --- flaws ----------------------------------------------------------------------------------------------------------


def test_flaws_are_counted_and_listed(place):
    place.save()
    (place.images / "002.jpg").unlink()
    Image.new("RGB", (4, 4)).save(place.images / "stray.png")
    images, annotations = place.captions["images"], place.captions["annotations"]
    picture = dict(images[0])
    images += [
        picture | {"file_name": "other.jpg"},
        picture | {"id": 20, "file_name": "001.jpg"},
        picture | {"id": 21, "file_name": None},
        picture | {"id": None, "file_name": "021.jpg"},
        picture | {"id": 22, "file_name": "022.txt"},
        ["no object"],
    ]
    annotations[4]["caption"], annotations[14]["caption"] = "  \n", None  # both of picture 5
    annotations += [
        {"id": 1, "image_id": 1, "caption": "again"},
        {"id": 900, "image_id": 77, "caption": "of nobody"},
        {"id": 901, "image_id": 20, "caption": "by the other id"},
        {"id": 902, "image_id": 6, "caption": {"text": "no text"}},
    ]
    (place.folder / "captions.json").write_text(json.dumps(place.captions))
    place.save = lambda: None
    summary = place.build()
    assert summary["rejected"] == {
        "picture missing on disk": 1,
        "picture not in the json": 1,
        "duplicate picture id": 1,
        "picture named twice": 1,
        "picture without file_name": 1,
        "picture without id": 1,
        "file_name is not one of a picture": 1,
        "empty caption": 2,
        "picture without caption": 1,
        "duplicate caption id": 1,
        "caption of an unknown picture": 1,
        "broken entry": 2,
    }
    rejected = place.rejected()
    assert len(rejected) == sum(summary["rejected"].values())
    assert {"reason": "picture missing on disk", "image_id": 2, "file_name": "002.jpg"} in rejected
    assert {"reason": "picture not in the json", "file_name": "stray.png"} in rejected
    assert place.pictures() == [1, 3, 4, 6, 7, 8, 9, 10]
    assert [row["text"] for row in place.rows() if row["file_name"] == "001.jpg"][-1] == "by the other id"


@pytest.mark.parametrize(
    "name", ["/etc/passwd.jpg", "../001.jpg", "a/../../b.jpg", "C:\\pictures\\a.jpg", "..\\a.jpg", "\\\\host\\x\\a.jpg"]
)
def test_names_that_leave_the_folder_are_rejected(place, name):
    place.captions["images"].append({"id": 50, "file_name": name})
    for out, options in (("out", {}), ("names", {"images": None, "images_mode": "reference"})):
        assert place.build(out, **options)["rejected"] == {"file_name leaves the folder": 1}
        assert place.rejected(out)[0]["image_id"] == 50


@pytest.mark.parametrize("name", ["train2017/001.jpg", "train2017\\001.jpg", "inner/001.jpg"])
@pytest.mark.parametrize("above", [True, False])
def test_pictures_in_folders(place, name, above, tmp_path):
    folder = name.replace("\\", "/").partition("/")[0]
    for picture in place.captions["images"]:
        picture["file_name"] = name.replace("001", f"{picture['id']:03d}")
    place.images = tmp_path / "up" / folder
    place.images.mkdir(parents=True)
    for i in range(1, 11):
        Image.new("RGB", (16, 12), "red").save(place.images / f"{i:03d}.jpg")
    (tmp_path / "captions.json").write_text(json.dumps(place.captions))
    place.save = lambda: None
    assert place.build(images=place.images.parent if above else place.images)["rejected"] == {}
    assert load(tmp_path / "out", tmp_path / "cache")["train"].num_rows == 20


def test_pictures_one_folder_down(place):
    place.save()
    shutil.copytree(place.images, place.folder / "above" / "val2017")
    assert place.build(images=place.folder / "above")["rejected"] == {}
    shutil.copytree(place.images, place.folder / "above" / "train2017")
    with pytest.raises(DataError, match="none of the 10 pictures"):
        place.build("two", images=place.folder / "above")


def test_equal_names_in_two_folders_stay_two_pictures(place):
    for picture in place.captions["images"]:
        picture["file_name"] = f"{'train' if picture['id'] % 2 else 'val'}2017/{(picture['id'] + 1) // 2:03d}.jpg"
    assert place.build()["pictures"] == 10
    assert load(place.folder / "out", place.folder / "cache")["train"].num_rows == 20


def test_nothing_left_says_why(place):
    place.captions["annotations"] = [{"id": 1, "image_id": 99, "caption": "of nobody"}]
    with pytest.raises(DataError, match="1 x caption of an unknown picture; 10 x picture without caption"):
        place.build()
    assert not (place.folder / "out").exists()


def test_what_is_there_is_not_overwritten(place):
    (place.folder / "out").mkdir()
    (place.folder / "out" / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="not overwritten"):
        place.build()
    (place.folder / "file").write_text("precious")
    with pytest.raises(UsageError, match="is no folder"):
        place.build("file")
    (place.folder / "empty").mkdir()
    assert place.build("empty")["rows"] == 20


def test_what_a_killed_run_left_is_cleared_away(place):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left, living = place.folder / f".out-{gone.pid}.part", place.folder / f".out-{os.getppid()}.part"
    for folder in (left, living):
        folder.mkdir()
        (folder / "metadata.jsonl").write_text("{")
    place.build()
    assert not left.exists() and living.exists() and len(place.rows()) == 20


def test_a_run_that_fails_leaves_nothing(place, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "full")

    monkeypatch.setattr("data_tools.coco_files.shutil.copyfileobj", full)
    with pytest.raises(DataError, match=r"out cannot be written: full; make room"):
        place.build(images_mode="copy")
    assert not (place.folder / "out").exists() and not list(place.folder.glob(".*"))


def test_the_command_line(place):
    place.save()
    command = [
        sys.executable, "-m", "sdtune", "coco", "--captions", "captions.json", "--images", "pictures", "--out", "out",
    ]  # fmt: skip
    more = ["--instances", "instances.json", "--category", "cat", "--category", "dog", "--match", "all", "--json"]
    answer = subprocess.run([*command, *more], cwd=place.folder, capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["pictures"] == 1 and answer.stdout.count("\n") == 1 and answer.stderr == ""
    again = subprocess.run(command, cwd=place.folder, capture_output=True, text=True)
    assert again.returncode == 2 and "not overwritten" in again.stderr and "Traceback" not in again.stderr
