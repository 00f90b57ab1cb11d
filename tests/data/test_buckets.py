"""Buckets: sizes of about one area, each picture in one of them, each step of one size, and all seen alike often."""

import random
from collections import Counter

import pytest
import torch
from PIL import Image

from sdtune.data.batches import batches, collate
from sdtune.data.buckets import Buckets, bucket_table, cut_away, default_step, scale, table_lines
from sdtune.data.dataset import TrainingSet, validation_examples
from sdtune.data.images import cover, open_rgb
from sdtune.data.order import InBuckets
from sdtune.data.sources import load_source
from sdtune.data.survey import survey
from sdtune.tasks import sizes

COMMON = [(480, 640), (640, 480), (3024, 4032), (1080, 1920), (2000, 3000), (1024, 1024), (700, 2100)]


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_the_sizes_of_common_resolutions():
    assert Buckets(512, 512, 64).sizes == ((640, 384), (576, 448), (512, 512), (448, 576), (384, 640))
    assert Buckets(64, 64, 8).sizes == ((80, 48), (72, 56), (64, 64), (56, 72), (48, 80))
    assert {(1216, 832), (1152, 896), (1344, 768)} < set(Buckets(1024, 1024, 64).sizes)  # as SDXL was trained
    assert (512, 768) in Buckets(512, 768, 64).sizes
    assert Buckets(512, 512, 64, aspect=1.0).sizes == ((512, 512),)


@pytest.mark.parametrize("aspect", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("resolution", [(512, 512, 64), (64, 64, 8), (512, 768, 64), (256, 256, 8)])
def test_no_size_takes_more_than_the_resolution(resolution, aspect):
    buckets = Buckets(*resolution, aspect=aspect)
    area, chance = buckets.height * buckets.width, random.Random(0)
    for size in buckets.sizes:
        assert 0.8 * area < size[0] * size[1] <= area
        assert size[::-1] in buckets.sizes
    for _ in range(500):
        picture = chance.randint(1, 900), chance.randint(1, 900)
        size = buckets.size_for(picture)
        assert size[0] * size[1] <= area and max(size) <= aspect * min(size)
        assert size[0] % buckets.step == size[1] % buckets.step == 0
        if min(picture) >= buckets.step:
            assert scale(picture, size) <= 1


@pytest.mark.parametrize("picture", COMMON)
def test_a_picture_has_the_size_of_which_least_is_cut(picture):
    buckets = Buckets(512, 512, 64)
    size = buckets.size_for(picture)
    assert size in buckets.sizes
    assert cut_away(picture, size) == min(cut_away(picture, other) for other in buckets.sizes)
    assert cut_away(picture, size) <= cut_away(picture, (512, 512))


def test_small_pictures_are_not_enlarged_unless_asked():
    small, asked = Buckets(512, 512, 64), Buckets(512, 512, 64, upscale=True)
    assert small.size_for((300, 400)) == (256, 384) and asked.size_for((300, 400)) == (448, 576)
    assert small.size_for((500, 500)) == (448, 448)
    assert small.size_for((2000, 130)) == (256, 128)  # no longer than the aspect allows
    assert small.size_for((20, 100)) == (64, 64)  # a side below a step becomes one
    assert small.size_for((512, 512)) == asked.size_for((512, 512)) == (512, 512)


def test_the_step_follows_from_the_resolution_where_it_is_not_given():
    assert [default_step(side, side, 8) for side in (64, 128, 256, 512, 768, 1024)] == [8, 16, 32, 64, 64, 64]
    assert default_step(200, 200, 8) == 8  # 16 does not divide it
    assert default_step(64, 64, 16) == 16  # a VAE that halves four times
    assert default_step(32, 32, 2) == 8


def test_cut_away_by_hand():
    assert cut_away((480, 640), (512, 512)) == pytest.approx(0.25)  # 512 x 683, of which 512 x 512 is kept
    assert cut_away((480, 640), (448, 576)) == pytest.approx(1 - 576 / (448 * 640 / 480))
    assert cut_away((100, 100), (64, 64)) == 0


def test_the_table():
    table = bucket_table(Buckets(512, 512, 64), [(480, 640)] * 3 + [(1000, 1000), (50, 50)])
    assert table_lines(table) == [
        "width x height  pictures  cut away",
        "  512 x 512            1      0.0%",
        "  576 x 448            3      3.6%",
        "   64 x 64             1      0.0%  1 enlarged",
    ]


# --- the order of samples ---------------------------------------------------------------------------------------------


def test_a_step_has_one_size_and_all_rows_come_alike_often():
    chance = random.Random(1)
    frames = [chance.choice([(64, 64), (56, 72), (72, 56), (48, 80)]) for _ in range(41)] + [(8, 8)]
    order = InBuckets(frames, together=4, seed=0)
    seen = Counter()
    for step in range(42 * 25):
        rows = [order[4 * step + place] for place in range(4)]
        assert len({frames[row] for row in rows}) == 1
        seen.update(rows)
    assert len(seen) == 42 and set(seen.values()) == {100}  # 42 * 25 steps of 4 are 100 epochs
    first = [order[number] for number in range(400)]
    assert [InBuckets(frames, 4, 0)[number] for number in reversed(range(400))] == first[::-1]
    assert [InBuckets(frames, 4, 1)[number] for number in range(400)] != first


def test_an_epoch_holds_each_row_once_where_sizes_fill_their_steps():
    frames = [(64, 64)] * 8 + [(48, 80)] * 4
    order = InBuckets(frames, together=4, seed=0)
    epochs = [[order[number] for number in range(12 * epoch, 12 * epoch + 12)] for epoch in range(30)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    places = Counter(next(i for i in range(3) if epoch[4 * i] >= 8) for epoch in epochs)
    assert len(places) == 3  # the steps of an epoch are shuffled


@pytest.mark.parametrize(("counts", "together"), [((1,), 7), ((1, 1, 1), 2), ((3, 2), 16), ((50, 1), 1)])
def test_few_pictures_and_large_steps(counts, together):
    """Epochs in which a size, or every size, has no step."""
    frames = [(8 * (i + 1), 64) for i, count in enumerate(counts) for _ in range(count)]
    order = InBuckets(frames, together, seed=0)
    rounds = together * 6
    seen = Counter(order[number] for number in range(sum(counts) * rounds))
    assert set(seen.values()) == {rounds} and len(seen) == sum(counts)


def test_numbers_far_into_a_run():
    order = InBuckets([(64, 64)] * 3 + [(48, 80)] * 70_000, together=8, seed=0)
    assert 0 <= order[10**9] < 70_003


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(make_folder):
    """Pictures of four shapes, two of them small, and class pictures of a fifth."""
    shapes = {"wide": (120, 60), "tall": (60, 120), "square": (80, 80), "small": (40, 50)}
    loaded = []
    for name, size in shapes.items():
        folder = make_folder(name, {f"{name}{number}.png": [f"{name} {number}"] for number in range(3)}, size=size)
        loaded.append(load_source(path=folder, repeats=2 if name == "wide" else 1))
    classes = make_folder("classes", {f"class{number}.png": ["a class"] for number in range(5)}, size=(70, 50))
    return survey([*loaded, load_source(path=classes, role="class")])


def training_set(sources, **settings):
    return TrainingSet(sources, **{"height": 64, "width": 64, "seed": 3, "buckets": Buckets(64, 64, 8)} | settings)


def test_samples_have_the_sizes_of_their_buckets(sources):
    samples = training_set(sources, together=3, crop="random", flip=True)
    expected = {"wide": (48, 80), "tall": (80, 48), "square": (64, 64), "small": (48, 40)}
    seen = Counter()
    for number in range(5 * len(samples)):
        instance, of_class = samples[number]
        kind = instance.caption.split()[0]
        assert instance.frame == expected[kind] and instance.pixels.shape == (3, *instance.frame)
        assert of_class.frame == instance.frame and of_class.pixels.shape == instance.pixels.shape
        seen[instance.caption] += 1
    assert {caption: count for caption, count in seen.items()} == {
        f"{kind} {number}": 10 if kind == "wide" else 5 for kind in expected for number in range(3)
    }


@pytest.mark.parametrize(("batch_size", "accumulate", "world"), [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)])
def test_a_step_takes_the_same_samples_however_it_is_divided(sources, batch_size, accumulate, world):
    samples = training_set(sources, together=4, crop="random", flip=True)
    steps = {step: [] for step in range(2, 9)}
    for rank in range(world):
        options = {"batch_size": batch_size, "accumulate": accumulate, "rank": rank, "world": world}
        for index, batch in enumerate(batches(samples, start=2, stop=9, **options)):
            assert batch.pixels.shape[-2:] == batch.frame
            steps[2 + index // accumulate] += [
                (batch.frame, *row) for row in zip(batch.numbers, batch.keys, strict=True)
            ]
    for step, rows in steps.items():
        pairs = [samples[number] for number in range(4 * step, 4 * step + 4)]
        assert sorted(rows) == sorted((e.frame, e.number, e.key) for pair in pairs for e in pair)
        assert len({frame for frame, *_ in rows}) == 1


def test_validation_pictures_keep_their_own_size(sources):
    examples = validation_examples(sources[:4], 64, 64, 12, buckets=Buckets(64, 64, 8))
    assert Counter(example.frame for example in examples) == {(48, 80): 3, (80, 48): 3, (64, 64): 3, (48, 40): 3}
    assert all(example.pixels.shape[1:] == example.frame for example in examples)


def test_sizes_must_be_known(make_folder):
    folder = make_folder("photos", {"a.png": ["a"]})
    with pytest.raises(ValueError, match=r"a\.png is not known; pass the sources through survey"):
        training_set([load_source(path=folder)])


def test_sizes_and_crops_by_hand(make_folder):
    """What SDXL is told: a picture of 100 x 40 covers 80 x 48 at 120 x 48, so 40 columns are cut away."""
    folder = make_folder("photos", {"a.png": []}, rows=[{"file_name": "a.png", "text": "a"}])
    Image.linear_gradient("L").rotate(90).resize((100, 40)).convert("RGB").save(folder / "a.png")  # darker to one side
    sources = survey([load_source(path=folder)])
    upscaled = {"buckets": Buckets(64, 64, 8, upscale=True)}
    (example,) = training_set(sources, **upscaled)[0]
    assert example.frame == (48, 80) and example.size == (40, 100, 0, 20)
    assert sizes(collate([[example]])) == [(40, 100, 0, 20, 48, 80)]

    samples = training_set(sources, crop="random", flip=True, **upscaled)
    whole = cover(open_rgb(folder / "a.png"), 48, 80)  # (3, 48, 120)
    seen = set()
    for number in range(30):
        (example,) = samples[number]
        mirrored = "mirrored" in example.key
        as_shown = whole.flip(-1) if mirrored else whole
        top, left = example.size[2:]
        assert torch.equal(example.pixels, as_shown[:, top : top + 48, left : left + 80])
        seen.add((mirrored, left))
    assert {mirrored for mirrored, _ in seen} == {True, False} and len(seen) > 20
