"""Masks: the shapes of COCO, drawn as pycocotools draws them, of the size of their pictures."""

import io
import json

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_tools import coco, masks

BOX = [2, 1, 6, 1, 6, 4, 2, 4]  # x from 2 to 6, y from 1 to 4


def drawn(shape, height=6, width=8, file=None):
    with Image.open(io.BytesIO(masks.as_png(masks.run_lengths(shape, height, width), file))) as picture:
        return np.asarray(picture)


def expected(height=6, width=8):
    pixels = np.zeros((height, width), np.uint8)
    pixels[1:4, 2:6] = 255
    return pixels


def counts(pixels):
    """Run lengths down the columns, as COCO has them."""
    flat = (pixels.T.reshape(-1) > 0).astype(int)
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]
    lengths = np.diff(edges).tolist()
    return lengths if flat[0] == 0 else [0, *lengths]


def test_polygons_and_run_lengths_are_drawn():
    assert (drawn([BOX]) == expected()).all()
    uncompressed = {"size": [6, 8], "counts": counts(expected())}
    assert (drawn(uncompressed) == expected()).all()
    from pycocotools import mask

    compressed = mask.frPyObjects(uncompressed, 6, 8)
    assert (drawn({"size": [6, 8], "counts": compressed["counts"].decode()}) == expected()).all()


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ([], "neither polygons"),
        (None, "neither polygons"),
        ([[1, 2, 3, 4]], "less than 3 corners"),
        ([[1, 2, 3, 4, 5, 6, 7]], "half a corner"),
        ([[1, 2, 3, 4, 5, "6"]], "no numbers"),
        ([[1, 2, 3, 4, 5, float("nan")]], "far from any picture"),
        ({"size": [6, 9], "counts": [54]}, r"its size is \[6, 9\]"),
        ({"size": [6, 8], "counts": [40, 9]}, "its counts are of 49 pixels"),
        ({"size": [6, 8], "counts": [-1, 49]}, "no list of whole numbers"),
        ({"size": [6, 8], "counts": ""}, "its counts are of 0 pixels, its picture has 48"),
        ({"size": [6, 8], "counts": "=3"}, "its counts are of 16 pixels"),
        ({"size": [6, 8], "counts": "P"}, "end within a number"),
        ({"size": [6, 8], "counts": "\u00e9"}, "hold the character"),
    ],
)
def test_shapes_that_cannot_be_drawn(shape, says):
    with pytest.raises(ValueError, match=says):
        masks.run_lengths(shape, 6, 8)


def test_compressed_run_lengths_are_those_of_pycocotools():
    from pycocotools import mask

    for seed in range(20):
        pixels = (np.random.default_rng(seed).random((60, 80)) < 0.02 * seed).astype(np.uint8)
        lengths = mask.encode(np.asfortranarray(pixels))
        assert masks.uncompressed(lengths["counts"].decode()) == counts(pixels)
        assert masks.run_lengths({"size": [60, 80], "counts": lengths["counts"].decode()}, 60, 80) == lengths


def test_masks_turn_with_their_pictures(tmp_path):
    exif = Image.Exif()
    exif[masks.ORIENTATION] = 6
    Image.fromarray(expected()).convert("RGB").save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as picture:
        upright = np.asarray(ImageOps.exif_transpose(picture))[..., 0]
    turned = drawn([BOX], file=tmp_path / "a.png")
    assert turned.shape == (8, 6) and (turned == upright).all()


@pytest.fixture
def files(tmp_path):
    def picture(number, **more):
        return {"id": number, "file_name": f"{number}.png", "width": 8, "height": 6} | more

    (tmp_path / "pictures").mkdir()
    for number in range(1, 6):
        Image.new("RGB", (8, 6)).save(tmp_path / "pictures" / f"{number}.png")
    images = [picture(1), picture(2), picture(3, width=9), picture(4, height=None), picture(5)]
    texts = [{"id": number, "image_id": number, "caption": "a"} for number in range(1, 6)]
    run_lengths = {"size": [6, 8], "counts": counts(np.flip(expected()))}
    shapes = [(1, 1, [BOX]), (1, 1, run_lengths), (1, 2, [[0, 0, 8, 0, 8, 6, 0, 6]]), (2, 1, [[0, 0, 1]])]
    shapes += [(3, 1, [BOX]), (4, 1, [BOX]), (5, 1, [[0, 0]]), (5, 1, [BOX])]
    objects = [
        {"id": number, "image_id": image, "category_id": category, "area": 12, "iscrowd": 0, "segmentation": shape}
        for number, (image, category, shape) in enumerate(shapes)
    ]
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": texts}))
    (tmp_path / "i.json").write_text(json.dumps({"images": images, "categories": categories, "annotations": objects}))
    return tmp_path


def test_a_mask_of_the_chosen_categories(files, capsys):
    coco.command(
        captions=files / "c.json", instances=files / "i.json", images=files / "pictures", out=files / "out",
        categories=["cat"], masks=True, as_json=True,
    )  # fmt: skip
    summary = json.loads(capsys.readouterr().out)
    assert summary["rejected"] == {"shape that cannot be drawn": 3, "picture without mask": 3}
    rows = [json.loads(line) for line in (files / "out" / "metadata.jsonl").read_text().splitlines()]
    assert rows == [
        {"file_name": name, "text": "a", "mask_file_name": f"masks/{name}"} for name in ("1.png", "5.png")
    ]
    with Image.open(files / "out" / "masks" / "1.png") as mask:
        assert mask.mode == "L" and (np.asarray(mask) == np.maximum(expected(), np.flip(expected()))).all()
    with Image.open(files / "out" / "masks" / "5.png") as mask:
        assert (np.asarray(mask) == expected()).all()
    rejected = [json.loads(line) for line in (files / "out" / "rejected.jsonl").read_text().splitlines()]
    assert any("(8, 6), in the json of (9, 6) pixels" in line.get("detail", "") for line in rejected)
