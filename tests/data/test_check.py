"""`check` on folders with planted faults: each is found, all at once, and fatal exactly where training refuses."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from functools import partial

import pytest
from PIL import Image

from sdtune.data.check import check
from sdtune.data.check_captions import Captioned, Reader, caption_findings, holds
from sdtune.data.check_entries import Entry
from sdtune.data.check_reading import read
from sdtune.data.check_report import as_text, as_values
from sdtune.data.check_scan import Look
from sdtune.data.check_sizes import Frame, size_findings, size_tables
from sdtune.data.fix import write_fixed
from sdtune.data.metadata import leads_out
from sdtune.data.sources import load_source
from sdtune.errors import DataError
from tests.drawings import drawing, encoded

SQUARE = Frame(64, 64)
WORDS = Reader(lambda captions: [len(caption.split()) for caption in captions], 5, "spaces")


@pytest.fixture
def photos(tmp_path):
    """Six different pictures of 96 x 80, each with a caption."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.jpg").write_bytes(encoded(drawing(number, (96, 80))))
    write_rows(folder, [{"file_name": f"{number}.jpg", "text": f"caption {number}"} for number in range(6)])
    return folder


def write_rows(folder, rows):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def entry(folder, **options):
    return Entry(partial(load_source, path=folder, **options), path=folder, **options)


def look_through(folder, *, reader=None, trigger=None, **options):
    return check([entry(folder, **options)], SQUARE, reader=reader, trigger=trigger)


def kinds(report):
    return {finding.kind: finding for finding in report.findings}


def trains(folder, **options):
    """Whether training would take every picture."""
    from sdtune.data.images import open_rgb

    try:
        return all(open_rgb(picture.read()) for picture in load_source(path=folder, **options).pictures)
    except DataError:
        return False


def test_a_good_folder_has_no_findings(photos):
    report = look_through(photos)
    assert not report.findings and not report.fatal and trains(photos)
    assert (len(report.pictures), report.captions) == (6, 6)


def break_(folder):
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:700])
    (folder / "2.jpg").write_bytes(b"")
    return ["1.jpg", "2.jpg"]


def take_away(folder):
    (folder / "3.jpg").unlink()
    return ["3.jpg"]


def name_outside(folder):
    write_rows(folder, [*rows_of(folder), {"file_name": "../x.jpg", "text": "x"}, {"file_name": "/x.jpg", "text": "x"}])
    return ["../x.jpg", "/x.jpg"]


def empty_caption(folder):
    rows = rows_of(folder)
    rows[4]["text"] = "  "
    write_rows(folder, rows)
    return ["4.jpg"]


def add_picture(folder):
    (folder / "more.png").write_bytes(encoded(drawing(9), "PNG"))
    return ["more.png"]


def spoil_row(folder):
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "0.jpg", \n')
    return ["metadata.jsonl, line 7"]


FATAL = {
    "broken": break_,
    "missing": take_away,
    "leaving": name_outside,
    "no caption": empty_caption,
    "unreferenced": add_picture,
    "rows": spoil_row,
}


@pytest.mark.parametrize("kind", FATAL)
def test_what_training_refuses_is_fatal_and_named(photos, kind):
    names = FATAL[kind](photos)
    report = look_through(photos)
    assert list(kinds(report)) == [kind] and report.fatal and not trains(photos)
    finding = report.findings[0]
    assert finding.count == len(names)
    assert all(found.startswith(name) for found, name in zip(finding.names, names, strict=True))


def test_all_faults_are_told_at_once_the_worst_first(photos):
    for plant in FATAL.values():
        plant(photos)
    shutil.copy(photos / "0.jpg", photos / "5.jpg")
    report = look_through(photos)
    assert set(FATAL) <= kinds(report).keys() and "equal" in kinds(report)
    assert [finding.level for finding in report.findings] == ["fatal"] * 6 + ["warning"]
    assert len(report.pictures) == 6  # 0 1 2 4 5 and more: all that are there


def test_with_a_prompt_captions_are_not_asked_for(photos):
    empty_caption(photos)
    add_picture(photos)
    report = look_through(photos, prompt="a photo of sks dog", reader=lambda: WORDS)
    assert not report.findings and trains(photos, prompt="x") and len(report.pictures) == 7


def test_pictures_without_metadata(photos):
    (photos / "metadata.jsonl").unlink()
    report = look_through(photos)
    assert kinds(report).keys() == {"no caption"} and report.fatal and report.findings[0].count == 6
    assert not look_through(photos, prompt="x").findings


def test_captions_in_text_files(photos):
    (photos / "metadata.jsonl").unlink()
    for number in range(5):
        (photos / f"{number}.txt").write_text("one two three four five six" if number else "sks")
    report = look_through(photos, reader=lambda: WORDS)
    assert kinds(report)["no caption"].names == ("5.jpg",) and report.fatal and not trains(photos)
    assert kinds(report)["captions cut"].count == 4
    (photos / "5.txt").write_text("sks")
    assert not look_through(photos).fatal and trains(photos)
    (photos / "5.txt").write_bytes(b"\xff\xfe\xff")
    assert "5.txt cannot be read" in kinds(look_through(photos))["rows"].names[0]


def test_shards_are_looked_at_where_they_are(photos, tmp_path):
    break_(photos)
    with tarfile.open(tmp_path / "00000.tar", "w") as shard:
        for number in range(6):
            (photos / f"{number}.txt").write_text(f"caption {number}")
            for suffix in ("jpg", "txt"):
                shard.add(photos / f"{number}.{suffix}", f"{number:05d}.{suffix}")
    report = look_through(tmp_path / "00000.tar")
    assert len(report.pictures) == 6 and kinds(report)["broken"].count == 2
    assert write_fixed(report, tmp_path / "clean") == {"kept": 4, "dropped": 2} and trains(tmp_path / "clean")
    assert len(look_through(tmp_path / "*.tar").pictures) == 6


def test_texts_without_a_picture_and_pictures_with_many_lines(photos):
    (photos / "metadata.jsonl").unlink()
    for number in range(6):
        (photos / f"{number}.txt").write_text("\n".join(f"line {number} {line}" for line in range(21 if number else 1)))
    (photos / "6.txt").write_text("no picture")
    report = look_through(photos)
    assert {kind: finding.level for kind, finding in kinds(report).items()} == dict.fromkeys(
        ["text alone", "many captions"], "note"
    )
    assert kinds(report)["text alone"].names == ("6.txt",) and kinds(report)["many captions"].count == 5


def shard(file, samples):
    with tarfile.open(file, "w") as archive:
        for name, content in samples.items():
            (file.parent / "member").write_bytes(content)
            archive.add(file.parent / "member", name)
    (file.parent / "member").unlink()


def test_one_fault_in_a_shard_or_table_hides_nothing_else(tmp_path):
    (tmp_path / "shards").mkdir()
    pictures = [encoded(drawing(number)) for number in range(5)]
    shard(tmp_path / "shards" / "0.tar", {"a.jpg": pictures[0], "a.txt": b"one", "b.jpg": pictures[1]})
    shard(tmp_path / "shards" / "1.tar", {"c.jpg": pictures[2], "c.txt": b"two", "d.jpg": b"x", "d.txt": b"three"})
    shard(tmp_path / "shards" / "2.tar", {"e.jpg": pictures[3], "e.txt": b"four", "f.jpg": pictures[4]})
    whole = (tmp_path / "shards" / "2.tar").read_bytes()
    (tmp_path / "shards" / "2.tar").write_bytes(whole[: whole.index(b"f.jpg") + 1000])
    report = look_through(tmp_path / "shards")
    found = {kind: finding.names for kind, finding in kinds(report).items() if finding.level == "fatal"}
    assert found["no caption"] == ("0.tar/b",) and found["broken"] == ("1.tar/d (not a picture)",)
    assert "2.tar cannot be read as a WebDataset shard" in found["files"][0] and found.keys() == {
        *("no caption", "broken", "files"),
    }
    assert not trains(tmp_path / "shards") and len(report.pictures) == 5
    assert write_fixed(report, tmp_path / "clean") == {"kept": 3, "dropped": 2}
    assert trains(tmp_path / "clean")
    assert [each.captions for each in load_source(path=tmp_path / "clean").pictures] == [("one",), ("two",), ("four",)]


@pytest.mark.parametrize("columns", [("image", "text"), ("img", "alt")])
def test_the_copy_of_a_table_has_its_columns_and_opens_everywhere(tmp_path, columns):
    import datasets
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "table").mkdir()
    image, text = columns
    rows = [{image: encoded(drawing(number)), text: caption} for number, caption in enumerate(["one", None, "two"])]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table" / "train-00000-of-00001.parquet")
    options = {"image_column": image, "text_column": text}
    report = look_through(tmp_path / "table", **options)
    assert [finding.count for finding in report.findings] == [1] and "no caption" in kinds(report)
    assert write_fixed(report, tmp_path / "clean") == {"kept": 2, "dropped": 1}
    assert trains(tmp_path / "clean", **options)
    opened = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "clean"), cache_dir=str(tmp_path / "cache"))
    assert opened["train"][text] == ["one", "two"] and len(opened) == 1 and image in opened["train"].column_names


def test_a_table_without_the_column_is_looked_through_all_the_same(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"image": encoded(drawing(number)), "caption": "x"} for number in range(2)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    report = look_through(tmp_path / "a.parquet")
    assert list(kinds(report)) == ["no column"] and len(report.good) == 2
    assert kinds(report)["no column"].names == ("a.parquet has: image, caption",)


def test_metadata_without_rows_is_told(photos):
    (photos / "metadata.jsonl").write_text("")
    assert kinds(look_through(photos))["rows"].names[0].startswith("metadata.jsonl: it has no rows")


ODD = ["bad\udcff.jpg", "back\\slash.jpg", "test_1.jpg", "more/dev.jpg"]


@pytest.mark.skipif(os.name == "nt", reason="such names exist elsewhere")
def test_odd_names_are_told_and_become_plain_in_a_copy(tmp_path):
    folder = tmp_path / "odd"
    for number, name in enumerate(ODD):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(drawing(number)))
    report = look_through(folder, prompt="a photo")
    assert kinds(report)["names"].names == tuple(sorted(ODD[:2]))
    write_fixed(report, tmp_path / "clean")
    assert [each.name for each in load_source(path=tmp_path / "clean").pictures] == [
        *("back-slash.jpg", "bad-udcff.jpg", "more/xdev.jpg", "xtest_1.jpg"),
    ]
    code = f"import sys; sys.argv = ['sdtune', *{['check', str(folder), '--prompt', 'x', '--json']!r}]\n"
    ran = subprocess.run(
        [sys.executable, "-c", code + "from sdtune.cli import main; main()"], capture_output=True, text=True
    )
    assert json.loads(ran.stdout)["pictures"] == 4


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes in folders are known elsewhere")
def test_a_pipe_is_not_waited_for(photos):
    os.mkfifo(photos / "pipe.png")
    report = look_through(photos, prompt="x")
    assert kinds(report)["broken"].names == ("pipe.png (it is no file but a folder, pipe or device)",)


def test_a_refusal_that_no_fault_explains_is_told_in_the_loaders_words(photos, tmp_path):
    report = look_through(photos, text_column="caption")
    assert list(kinds(report)) == ["no column"] and len(report.pictures) == 6
    assert kinds(report)["no column"].names == ("metadata.jsonl has: file_name, text",)
    write_rows(photos, [{**row, "weight": number} for number in (1, 2) for row in rows_of(photos)])
    report = look_through(photos)
    assert "weights" in kinds(report)["refused"].do and report.fatal
    assert look_through(tmp_path / "none").fatal
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in kinds(look_through(tmp_path / "empty"))["refused"].do


@pytest.mark.parametrize("file", ["metadata.csv", "metadata.parquet"])
def test_other_metadata_files_are_read_too(photos, file):
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    rows = [*rows_of(photos), {"file_name": "gone.jpg", "text": "x"}]
    (photos / "metadata.jsonl").unlink()
    table = pyarrow.Table.from_pylist(rows)
    write = pyarrow.csv.write_csv if file.endswith("csv") else pyarrow.parquet.write_table
    write(table, photos / file)
    assert kinds(look_through(photos))["missing"].names == ("gone.jpg",)


def test_metadata_of_sub_folders_and_masks(photos):
    inner = photos / "inner"
    inner.mkdir()
    (inner / "a.png").write_bytes(encoded(drawing(7), "PNG"))
    (inner / "mask.png").write_bytes(encoded(Image.new("L", (160, 120)), "PNG"))
    row = {"text": "x", "mask_file_name": "mask.png"}
    write_rows(inner, [{"file_name": "a.png", **row}, {"file_name": "gone.png", **row}])
    report = look_through(photos)
    assert kinds(report).keys() == {"missing", "no mask"} and report.findings[0].names == ("inner/gone.png",)
    assert "inner/mask.png" not in {each.picture.name for each in report.pictures}


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_out_of_the_folder(photos, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.move(photos / "0.jpg", outside / "0.jpg")
    (photos / "0.jpg").symlink_to(outside / "0.jpg")
    shutil.move(photos / "1.jpg", photos / "one.jpg")
    (photos / "1.jpg").symlink_to("one.jpg")  # within
    report = look_through(photos)
    assert kinds(report)["links"].names == ("0.jpg",) and kinds(report)["links"].level == "warning"


@pytest.mark.parametrize("name", ["/a.jpg", "../a.jpg", "a/../../b.jpg", "C:\\a.jpg", "\\\\host\\a.jpg", "..\\a.jpg"])
def test_names_that_lead_out(name):
    assert leads_out(name)


@pytest.mark.parametrize("name", ["a.jpg", "a/b.jpg", "a/../b.jpg", "..a.jpg", "a..b/c.jpg", "./a.jpg"])
def test_names_that_stay(name):
    assert not leads_out(name)


def test_captions():
    pictures = [
        Captioned("a", ("sks dog on a mat", "sks dog")),
        Captioned("b", ("A SKS  Dog", "sks dogs")),
        Captioned("c", ("one two three four five six seven", "same", "same")),
        Captioned("d", ("same",)),
        Captioned("class", ("same",), own=False, learnt=False),
    ]
    found = {finding.kind: finding for finding in caption_findings(pictures, WORDS, "sks dog")}
    assert found["captions cut"].names == ("c (loses 2)",) and "2 tokens of 1 captions" in found["captions cut"].what
    assert found["no trigger word"].names == ("b", "c", "d")
    assert found["repeated captions"].names == ("c", "d") and found["caption twice"].names == ("c",)
    assert not caption_findings(pictures[:1], WORDS, None)
    assert holds("a photo of SKS dog.", "sks dog") and not holds("masks dog", "sks dog")


def test_blank_captions_beside_others(photos):
    write_rows(photos, [*rows_of(photos), {"file_name": "2.jpg", "text": " "}])
    report = look_through(photos)
    assert kinds(report)["blank"].names == ("2.jpg",) and not report.fatal and trains(photos)


def test_what_resizing_does():
    def look(width, height):
        return Look("", width, height, "RGB", "PNG", 1)

    frame = Frame(64, 128)
    assert frame.scale(look(64, 64)) == 2 and frame.lost(look(64, 64)) == 0.5 and frame.lost(look(256, 128)) == 0
    pictures = [("tiny", look(32, 32)), ("small", look(100, 50)), ("right", look(128, 64)), ("tall", look(256, 512))]
    found = {finding.kind: finding.names for finding in size_findings(pictures, frame)}
    assert found == {
        "too small": ("tiny (32 x 32)",),
        "enlarged": ("small (100 x 50)",),
        "cropped": ("tall (75%)", "tiny (50%)"),
    }
    tables = size_tables([each for _, each in pictures], frame)
    assert tables["shorter_side"] == {"least": 32, "median": 57, "most": 256}
    assert tables["sides"] == {"below 64": 2, "64-127": 1, "256-383": 1}
    assert tables["aspects"] == {"1:2": 1, "1:1": 1, "2:1": 2}
    assert tables["resize"]["enlarged"] == 2 and tables["resize"]["reduced"] == 1


def test_copies_and_pictures_that_look_alike(photos):
    shutil.copy(photos / "0.jpg", photos / "3.jpg")
    (photos / "4.jpg").write_bytes(encoded(drawing(1, (96, 80)).resize((192, 160), Image.Resampling.LANCZOS)))
    report = look_through(photos)
    assert kinds(report)["equal"].names == ("3.jpg = 0.jpg",)
    assert kinds(report)["alike"].names == ("1.jpg = 4.jpg",)  # the larger one stays
    assert not report.fatal


def test_pictures_in_training_and_validation(photos, tmp_path):
    held = tmp_path / "held"
    held.mkdir()
    shutil.copy(photos / "0.jpg", held / "copy.jpg")
    (held / "smaller.jpg").write_bytes(encoded(drawing(1, (96, 80)).resize((48, 40), Image.Resampling.LANCZOS)))
    (held / "other.jpg").write_bytes(encoded(drawing(20, (96, 80))))
    names = ("copy.jpg", "smaller.jpg", "other.jpg")
    write_rows(held, [{"file_name": name, "text": name} for name in names])

    def named(folder, label, role):
        return Entry(partial(load_source, path=folder, role=role), label, folder, role=role)

    report = check([named(photos, "data.0", "instance"), named(held, "data.1", "validation")], SQUARE)
    pairs = {"data.1: copy.jpg = data.0: 0.jpg", "data.1: smaller.jpg = data.0: 1.jpg"}
    assert set(kinds(report)["in training and validation"].names) == pairs
    twice = check([named(photos, "data.0", "instance"), named(photos, "data.1", "validation")], SQUARE)
    assert kinds(twice)["in training and validation"].count == 6 and "equal" not in kinds(twice)
    again = check([named(photos, "data.0", "instance"), named(photos, "data.1", "instance")], SQUARE)
    assert not again.findings


def test_a_part_of_one_folder_held_out(photos):
    shutil.copy(photos / "0.jpg", photos / "3.jpg")
    folder = os.path.abspath(photos)
    report = check([entry(photos)], SQUARE, held_out=lambda readings: {(folder, "3.jpg"), (folder, "5.jpg")})
    assert kinds(report)["in training and validation"].names == ("3.jpg = 0.jpg",)


def test_the_table_and_the_values_say_the_same(photos):
    break_(photos)
    report = look_through(photos)
    text, values = as_text(report, "photos", [("captions", "are read")]), as_values(report, {"more": 1})
    assert "photos: 6 pictures, 6 captions" in text and "captions     are read" in text
    assert "fatal        2  pictures that cannot be read" in text and "-> replace them" in text
    assert text.endswith("training would fail: 1 kind of fault stands in its way")
    assert values["fails"] and values["more"] == 1 and values["findings"][0]["count"] == 2
    assert json.loads(json.dumps(values)) == values
    assert max(map(len, text.splitlines())) <= 110


def test_real_photographs(shared_data):
    for folder in ("dog", "backpack"):
        report = look_through(shared_data / "dreambooth" / folder, prompt="a photo of sks thing")
        assert len(report.pictures) >= 4 and not report.fatal
        assert min(each.look.width for each in report.pictures) >= 256


def test_coco(shared_data, tmp_path):
    """Real photographs under a metadata file with their real captions: none is broken, none is like another."""
    from sdtune.data.fix import link_or_copy

    for file in sorted((shared_data / "coco-mini" / "train2017").iterdir())[:24]:
        link_or_copy(str(file), tmp_path / file.name)
    with Image.open(next(tmp_path.iterdir())) as first:
        first.resize((300, 225)).save(tmp_path / "again.png")
    write_rows(tmp_path, [{"file_name": file.name, "text": file.name} for file in sorted(tmp_path.iterdir())])
    report = look_through(tmp_path)
    assert not report.fatal and len(report.alike) == 1


def test_drawings_of_every_mode():
    """785 drawings of all modes and sizes, with pictures that no caption names."""
    from pathlib import Path

    stamps = Path("/usr/share/tuxpaint/stamps")
    if not stamps.is_dir():
        pytest.skip("tuxpaint-stamps-default is not installed")
    report = look_through(stamps, prompt="a drawing")
    assert len(report.pictures) > 700 and not report.fatal
    modes = {each.look.mode for each in report.pictures}
    assert {"RGBA", "RGB"} <= modes and len(modes) >= 3
    assert report.alike


def test_a_reading_keeps_the_source_that_training_takes(photos):
    assert len(read(entry(photos)).source.pictures) == 6
    take_away(photos)
    reading = read(entry(photos))
    assert reading.source is None and len(reading.pictures) == 5 and "3.jpg" in reading.refusal
