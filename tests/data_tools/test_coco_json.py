"""The reader in parts reads what json.load reads, and says what is wrong with a file that it cannot use."""

import json
import random
import tracemalloc
from typing import Any

import pytest

from data_tools import coco_json
from data_tools.coco_json import Caption, CocoJson, Picture
from data_tools.coco_kinds import open_coco
from sdtune.errors import DataError

AWKWARD = ['}, {"a": [', "\\", '"quoted"', "]}", "größer “als” \u2028 猫 🐈", "tab\tand\nline", "\\u0041", "}},{{", ""]


def entries(count: int) -> list[dict[str, Any]]:
    draw = random.Random(count)
    made = []
    for number in range(count):
        entry = {
            "id": number if number % 7 else str(number),
            "image_id": number * 3,
            "caption": " ".join(draw.choices(AWKWARD, k=draw.randint(1, 6))),
            "extra": [{"a": {"b": [{}, []]}}, {"c": draw.choice(AWKWARD)}, None, 1.5e-3, True],
        }
        made.append(dict(draw.sample(list(entry.items()), len(entry))))
    return made


def read(path, kind=Caption, key="annotations"):
    broken = []
    found = [entry for part in CocoJson(path).objects(key, kind, broken.append) for entry in part]
    return found, broken


def same(found, expected) -> bool:
    return [(e.id, e.image_id, e.caption) for e in found] == [
        (e.get("id"), e.get("image_id"), e.get("caption")) for e in expected
    ]


@pytest.fixture(params=[64, 700, 5000, 1 << 18])
def slices(request, monkeypatch):
    monkeypatch.setattr(coco_json, "SLICE", request.param)


@pytest.mark.parametrize("indent", [None, 0, 4])
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("order", [("images", "annotations", "info"), ("info", "annotations", "images")])
def test_it_reads_what_json_load_reads(tmp_path, slices, indent, ascii_only, order):
    values = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": entries(60), "info": {"}, {": ["images"]}}
    path = tmp_path / "captions.json"
    text = json.dumps({key: values[key] for key in order}, indent=indent, ensure_ascii=ascii_only)
    path.write_text(text, encoding="utf-8")
    found, broken = read(path)
    assert same(found, values["annotations"]) and not broken
    assert read(path, Picture, "images")[0][0].file_name == "a.jpg"
    assert CocoJson(path).value("info") == values["info"] and CocoJson(path).keys == list(order)


@pytest.mark.parametrize("separators", [(",", ":"), (" ,\n\t", " : "), (", ", ": ")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_spaces_and_encodings(tmp_path, slices, separators, encoding):
    path = tmp_path / "captions.json"
    made = entries(20)
    path.write_text(json.dumps({"annotations": made}, separators=separators), encoding=encoding)
    assert same(read(path)[0], made)


def test_what_only_python_reads(tmp_path, slices):
    path = tmp_path / "captions.json"
    path.write_text('{"annotations": [{"id": 1, "area": NaN, "caption": "a"}, {"id": 2, "caption": "b \\ud83d"}]}')
    assert [(entry.id, entry.caption) for entry in read(path)[0]] == [(1, "a"), (2, "b \ud83d")]


def test_a_broken_entry_takes_no_other_with_it(tmp_path, slices):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"annotations": [{"id": 1}, {"id": 2, "caption": [1]}, 7, {"id": [3]}, {"id": 4}]}))
    found, broken = read(path)
    assert [entry.id for entry in found] == [1, 4]
    assert [entry.entry for entry in broken] == ['{"id": 2, "caption": [1]}', "7", '{"id": [3]}']
    assert "Expected `str | null`, got `array`" in broken[0].why


def test_an_empty_list_and_one_that_is_none(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text('{"annotations": [ ], "images": {"a": 1}}')
    assert read(path) == ([], [])
    with pytest.raises(DataError, match="'images' is an object with the keys a; expected a list"):
        read(path, Picture, "images")


def test_cut_off_at_any_place(tmp_path):
    whole = json.dumps({"images": [{"id": 1, "file_name": "é.jpg"}], "annotations": entries(4)}, ensure_ascii=False)
    path = tmp_path / "captions.json"
    content = whole.encode()
    for end in range(1, len(content), 17):
        path.write_bytes(content[:end])
        with pytest.raises(DataError, match=r"is cut off|is damaged"):
            CocoJson(path)
    path.write_bytes(content[:-40] + b"\0" * 40)  # a download that was made room for
    with pytest.raises(DataError, match="is cut off"):
        CocoJson(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04zip", "is a zip archive; expected the json file in it"),
        (b"\x1f\x8b\x08\0", "is gzip-compressed"),
        (b"<html></html>", "is no JSON"),
        (b'{"a": [1,, 2], "images": [], "annotations": []}', "is no JSON .*column 10"),
        (b'[{"image_id": 1, "caption": "a"}]', "a list of 1, the first of which is an object with the keys image_id"),
        (b'{"a": "\xff\xff", "b": NaN}', "not in UTF-8"),
        (b"7", "holds 7; expected a COCO file"),
    ],
)
def test_what_is_no_coco_file(tmp_path, content, says):
    path = tmp_path / "captions.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        CocoJson(path)
    with pytest.raises(DataError, match="does not exist; it comes in annotations_trainval2017.zip"):
        CocoJson(tmp_path / "none.json")


def test_damage_inside_is_said(tmp_path, slices):
    path = tmp_path / "captions.json"
    path.write_bytes(b'{"annotations": [{"caption": "a"}, {"caption": "\xff"}]}')
    with pytest.raises(DataError, match="not in UTF-8"):
        read(path)


@pytest.mark.parametrize(
    ("annotations", "wanted", "says"),
    [
        ([{"segmentation": [], "bbox": [], "category_id": 1}], "captions", "holds instances .*with --instances"),
        ([{"keypoints": [], "category_id": 1}], "captions", "holds keypoints"),
        ([{"segments_info": []}], "instances", "holds panoptic segments .*expected instances"),
        ([{"image_id": 1, "caption": "a"}], "instances", "holds captions .*with --captions, and the other"),
        ([{"question": "?"}], "captions", "holds annotations with the keys question; expected captions"),
        (None, "captions", "pictures without annotations, as image_info_test"),
    ],
)
def test_another_kind_says_what_was_found_and_expected(tmp_path, annotations, wanted, says):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"images": []} | ({} if annotations is None else {"annotations": annotations})))
    with pytest.raises(DataError, match=says):
        open_coco(path, wanted)


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "captions.json"
    made = [{"id": i, "image_id": i % 2000, "caption": f"a caption of some length {i}"} for i in range(40_000)]
    path.write_text(json.dumps({"annotations": made}))
    del made
    source = CocoJson(path)
    tracemalloc.start()
    count = sum(len(part) for part in source.objects("annotations", Caption, print))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40_000 and peak < 2_000_000 < path.stat().st_size  # bytes
