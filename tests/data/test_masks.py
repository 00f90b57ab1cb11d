"""Masks: found beside their pictures, refused where they do not fit, and cut as the pictures are."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools import coco
from sdtune.data.batches import collate
from sdtune.data.check import check
from sdtune.data.check_entries import Entry
from sdtune.data.check_sizes import Frame
from sdtune.data.dataset import TrainingSet, validation_examples
from sdtune.data.images import cut, read_mask
from sdtune.data.sources import load_source
from sdtune.data.survey import survey
from sdtune.errors import DataError

ROWS = [
    {"file_name": "a.png", "text": "a", "mask_file_name": "masks/a.png"},
    {"file_name": "a.png", "text": "also a", "mask_file_name": None},
    {"file_name": "b.png", "text": "b", "mask_file_name": ""},
    {"file_name": "c.png", "text": "c"},
]


@pytest.fixture
def photos(make_folder):
    """Three pictures of 12 x 8 px, one of them with a mask of the left third of it."""
    folder = make_folder("photos", {"a.png": [], "b.png": [], "c.png": []}, rows=ROWS)
    write_mask(folder, (12, 8))
    return folder


def write_mask(folder, size, name="a.png"):
    width, height = size
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 3] = 255
    (folder / "masks").mkdir(exist_ok=True)
    Image.fromarray(mask).save(folder / "masks" / name)


def masks_of(folder, **options):
    return {picture.name: picture.mask and picture.mask() for picture in load_source(path=folder, **options).pictures}


def test_a_row_names_the_mask_of_its_picture(photos):
    expected = {"a.png": str(photos / "masks" / "a.png"), "b.png": None, "c.png": None}
    assert masks_of(photos) == expected
    assert masks_of(photos, prompt="a dog") == expected  # and the mask is no picture of its own
    (photos / "metadata.jsonl").unlink()
    (photos / "metadata.csv").write_text("file_name,text,mask_file_name\na.png,a,masks/a.png\nb.png,b,\nc.png,c,\n")
    assert masks_of(photos) == expected


def test_one_picture_has_one_mask(photos):
    rows = [*ROWS, {"file_name": "a.png", "text": "a third", "mask_file_name": "masks/b.png"}]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"gives a\.png the masks masks/a\.png and masks/b\.png; expected one mask"):
        load_source(path=photos)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda mask: mask.unlink(), r"1 picture cannot be read: .*masks/a\.png \(No such file"),
        (lambda mask: mask.write_bytes(b"?"), r"1 picture cannot be read: .*masks/a\.png \(not a picture\)"),
        (lambda mask: mask.write_bytes(mask.read_bytes()[:-30]), r"1 picture cannot be read: .*masks/a\.png \("),
        (
            lambda mask: Image.new("L", (8, 12)).save(mask),
            r"^1 mask is of another shape than the picture: .*masks/a\.png is 8 x 12, its picture 12 x 8; expected the",
        ),
    ],
    ids=["missing", "no picture", "cut off", "another shape"],
)
def test_what_cannot_be_used_is_refused_where_masks_are_read(photos, spoil, message):
    spoil(photos / "masks" / "a.png")
    sources = [load_source(path=photos)]
    survey(sources)
    with pytest.raises(DataError, match=message) as fault:
        survey(sources, masks=True)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("size", [(12, 8), (6, 4), (24, 16), (7, 4), (121, 80)])
def test_a_mask_may_be_smaller_or_larger_than_its_picture(photos, size):
    write_mask(photos, size)
    survey([load_source(path=photos)], masks=True)


def training_set(folder, **settings):
    return TrainingSet([load_source(path=folder)], **{"height": 8, "width": 8, "seed": 3, "masks": True, **settings})


def test_masks_are_cut_and_mirrored_with_their_pictures(make_folder):
    """A picture that is red where its mask is white stays so, whatever the crop."""
    folder = make_folder("photos", {"a.png": []}, rows=ROWS[:1])
    red = np.zeros((40, 60, 3), np.uint8)
    red[5:20, 15:40, 0] = 255
    Image.fromarray(red).save(folder / "a.png")
    (folder / "masks").mkdir()
    Image.fromarray(red[..., 0]).save(folder / "masks" / "a.png")
    samples = training_set(folder, height=16, width=20, crop="random", flip=True)
    shown = set()
    for number in range(40):
        example = samples[number][0]
        assert example.mask.shape == (1, 16, 20) and example.mask.dtype == torch.uint8
        assert (example.mask[0].float() - example.pixels[0].float()).abs().mean() < 12  # LANCZOS rings, BOX does not
        shown.add(example.mask.numpy().tobytes())
    assert len(shown) > 4
    assert (training_set(folder, height=16, width=20)[0][0].mask > 0).float().mean() == pytest.approx(0.16, abs=0.05)


def test_values_are_shares_of_white(tmp_path):
    half = np.zeros((8, 8), np.uint8)
    half[:, :2] = 255
    half[:4, 4:6] = 255
    Image.fromarray(half).save(tmp_path / "mask.png")
    reduced = read_mask(tmp_path / "mask.png", 2, 2)
    assert reduced.tolist() == [[[128, 128], [128, 0]]]
    enlarged = read_mask(tmp_path / "mask.png", 16, 16)
    assert set(enlarged.flatten().tolist()) == {0, 255} and enlarged[0, :, :4].min() == 255
    see_through = Image.new("RGBA", (4, 4), (255, 255, 255, 0))
    see_through.paste((255, 255, 255, 255), (0, 0, 4, 2))
    see_through.save(tmp_path / "see_through.png")
    assert read_mask(tmp_path / "see_through.png", 4, 4)[0, :, 0].tolist() == [255, 255, 0, 0]


def test_batches_of_pictures_with_and_without_a_mask(photos):
    samples = training_set(photos)
    batch = collate([samples[number] for number in range(3)])
    assert batch.masks.shape == (3, 1, 8, 8)
    with_mask = [key.split("|")[1] == "a.png" for key in batch.keys]
    assert [bool((mask == 255).all()) for mask in batch.masks] == [not there for there in with_mask]
    assert collate([training_set(photos, masks=False)[number] for number in range(3)]).masks is None
    held_out = validation_examples([load_source(path=photos)], 8, 8, 3, masks=True)
    assert held_out[0].mask[0, 0].tolist() == [255] * 2 + [0] * 6  # the frame begins in column 2, the mask ends at 4
    assert held_out[1].mask is None


def test_the_masks_that_coco_writes(shared_data, tmp_path):
    files = shared_data / "coco-mini"
    notes = files / "annotations"
    code = coco.command(
        captions=notes / "captions_train2017.json",
        images=files / "train2017",
        out=tmp_path / "coco",
        instances=notes / "instances_train2017.json",
        masks=True,
    )
    assert code == 0
    (source,) = survey([load_source(path=tmp_path / "coco")], masks=True)
    assert len(source.pictures) > 10 and all(picture.mask for picture in source.pictures)
    samples = TrainingSet([source], height=96, width=96, crop="random", flip=True, masks=True)
    shares = [samples[number][0].mask.float().mean().item() / 255 for number in range(len(samples))]
    assert 0.05 < np.mean(shares) < 0.95
    picture = source.pictures[0]
    whole = read_mask(picture.mask(), *picture.size)  # at its own size nothing is resized
    assert whole.unique().tolist() in ([0, 255], [0], [255]) and cut(whole, 4, 4, 0, 0, False).shape == (1, 4, 4)

    shutil.rmtree(tmp_path / "coco" / "masks")
    count = len(source.pictures)
    with pytest.raises(DataError, match=f"{count} pictures cannot be read: .*and {count - 5} more"):
        survey([source], masks=True)


# --- sdtune check -----------------------------------------------------------------------------------------------------


def findings(folder, masks):
    entry = Entry(lambda: load_source(path=folder), path=folder)
    return {finding.kind: finding for finding in check([entry], Frame(8, 8), masks=masks).findings}


@pytest.mark.parametrize("used", [True, False])
def test_check_tells_what_is_wrong_with_masks(make_folder, used):
    names = [f"{number}.png" for number in range(5)]
    rows = [{"file_name": name, "text": name, "mask_file_name": f"masks/{name}"} for name in names]
    del rows[4]["mask_file_name"]
    folder = make_folder("photos", {name: [] for name in names}, size=(40, 30), rows=rows)
    for name, size in (("1.png", (40, 30)), ("2.png", (30, 40)), ("3.png", (20, 15))):
        write_mask(folder, size, name)
    (folder / "masks" / "1.png").write_bytes(b"?")
    found = findings(folder, used)
    level = "fatal" if used else "warning"
    assert (found["mask missing"].names, found["mask missing"].level) == (("0.png",), level)
    assert (found["mask broken"].names, found["mask broken"].level) == (("1.png (not a picture)",), level)
    shape = "2.png (mask 30 x 40, picture 40 x 30)"
    assert (found["mask shape"].names, found["mask shape"].level) == ((shape,), level)
    assert (found["no mask"].names, found["no mask"].level) == (("4.png",), "note")
    assert "unreferenced" not in found


def test_check_looks_at_masks_where_training_refuses_the_folder_too(photos):
    rows = [*ROWS, {"file_name": "gone.png", "text": "x"}]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (photos / "masks" / "a.png").unlink()
    found = findings(photos, masks=True)
    assert found["missing"].names == ("gone.png",) and found["mask missing"].names == ("a.png",)


def test_check_says_nothing_of_masks_where_there_are_none(make_folder):
    folder = make_folder("photos", {"a.png": ["a"]})
    assert "no mask" not in findings(folder, masks=False) and "no mask" in findings(folder, masks=True)
