"""Samples are pure functions of their number; steps see the same samples however they are divided."""

import pickle
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image

import sdtune.data.dataset
from sdtune.data.batches import batches, collate, sample_numbers
from sdtune.data.dataset import TrainingSet, held_out, validation_examples
from sdtune.data.images import open_rgb, prepare
from sdtune.data.picture import Picture
from sdtune.data.sources import Source, load_source
from sdtune.errors import DataError


@pytest.fixture
def photos(make_folder):
    return make_folder("photos", {f"{number}.png": [f"caption {number}", f"other {number}"] for number in range(7)})


@pytest.fixture
def classes(make_folder):
    return make_folder("classes", {f"c{number}.png": ["a dog"] for number in range(4)})


def training_set(*sources, **settings):
    return TrainingSet(sources, **{"height": 6, "width": 6, "seed": 3, **settings})


def described(examples):
    return [(e.pixels.tolist(), e.caption, e.weight, e.instance, e.number, e.key) for e in examples]


def name(example):
    return example.key.split("|")[1]


SETTINGS = {"crop": "random", "flip": True, "caption_dropout": 0.3}


def test_a_sample_depends_on_its_number_alone(photos, classes):
    sources = load_source(path=photos), load_source(path=classes, role="class")
    forward, other = training_set(*sources, **SETTINGS), training_set(*sources, **SETTINGS)
    expected = [described(forward[number]) for number in range(40)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert [described(other[number]) for number in reversed(range(40))] == expected[::-1]
    assert torch.equal(torch.get_rng_state(), state)
    assert [described(training_set(*sources, **SETTINGS, seed=4)[number]) for number in range(40)] != expected
    copied = pickle.loads(pickle.dumps(forward))  # as workers get it where processes are not forked
    assert described(copied[5]) == expected[5]


def test_an_epoch_shows_each_picture_once_and_each_epoch_is_ordered_anew(photos):
    samples = training_set(load_source(path=photos))
    assert len(samples) == 7
    epochs = [[name(samples[epoch * 7 + position][0]) for position in range(7)] for epoch in range(4)]
    assert all(sorted(epoch) == [f"{number}.png" for number in range(7)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert samples[10**9][0].number == 10**9
    with pytest.raises(IndexError, match="numbered from 0"):
        samples[-1]


def test_repeats_and_several_sources(photos, make_folder):
    rare = make_folder("rare", {"r.png": ["rare"]})
    samples = training_set(load_source(path=photos), load_source(path=rare, repeats=5, weight=2.0))
    seen = [samples[number][0] for number in range(len(samples))]
    assert len(samples) == 12
    assert Counter(map(name, seen)) == {**{f"{number}.png": 1 for number in range(7)}, "r.png": 5}
    assert {example.weight for example in seen if name(example) == "r.png"} == {2.0}
    assert {example.weight for example in seen if name(example) != "r.png"} == {1.0}


def test_weights_of_rows_and_sources_are_multiplied(make_folder):
    folder = make_folder("photos", {"a.png": []}, rows=[{"file_name": "a.png", "text": "x", "weight": 0.25}])
    assert training_set(load_source(path=folder, weight=3.0))[0][0].weight == 0.75


def test_pairs_of_prior_preservation(photos, classes):
    samples = training_set(
        load_source(path=photos), load_source(path=classes, role="class", weight=0.7, prompt="a dog")
    )
    pairs = [samples[number] for number in range(28)]
    assert all([example.instance for example in pair] == [True, False] for pair in pairs)
    assert all([example.weight for example in pair] == [1.0, 0.7] for pair in pairs)
    assert all(pair[0].number == pair[1].number == number for number, pair in enumerate(pairs))
    assert {pair[1].caption for pair in pairs} == {"a dog"}
    class_names = [name(pair[1]) for pair in pairs]  # class pictures have epochs of their own
    assert all(sorted(class_names[i : i + 4]) == [f"c{n}.png" for n in range(4)] for i in range(0, 28, 4))

    batch = collate(pairs[:3])
    assert len(batch) == 6 and batch.instances == 3
    assert batch.numbers == [0, 1, 2, 0, 1, 2]
    assert batch.weights.tolist() == pytest.approx([1.0, 1.0, 1.0, 0.7, 0.7, 0.7])
    assert batch.captions[3:] == ["a dog"] * 3
    assert batch.pixels.shape == (6, 3, 6, 6) and batch.pixels.dtype == torch.uint8
    assert torch.equal(batch.pixels[4], pairs[1][1].pixels) and batch.keys[4] == pairs[1][1].key


def test_batches_with_masks_and_without_pixels(photos):
    samples = training_set(load_source(path=photos))
    plain = collate([samples[0], samples[1]])
    assert plain.masks is None and plain.frame == (6, 6)

    mask = torch.arange(36, dtype=torch.uint8).view(1, 6, 6)
    mixed = collate([[replace(samples[0][0], mask=mask)], samples[1]])
    assert mixed.masks.shape == (2, 1, 6, 6) and mixed.masks.dtype == torch.uint8
    assert torch.equal(mixed.masks[0], mask) and (mixed.masks[1] == 255).all()
    assert mixed.to("meta").masks.device.type == "meta"

    known = collate([[replace(samples[number][0], pixels=None)] for number in range(2)])
    assert known.pixels is None and known.to("meta").pixels is None
    assert known.frame == (6, 6) and known.sizes == plain.sizes


def test_several_captions_are_drawn_alike_often(photos):
    samples = training_set(load_source(path=photos))
    captions = Counter(samples[number][0].caption for number in range(7 * 200))
    assert len(captions) == 14 and all(70 < count < 130 for count in captions.values())
    for number in range(50):
        example = samples[number][0]
        assert example.caption.split()[1] == name(example).removesuffix(".png")


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_share_of_dropped_captions(photos, share):
    samples = training_set(load_source(path=photos), caption_dropout=share)
    dropped = sum(samples[number][0].caption == "" for number in range(3000)) / 3000
    assert abs(dropped - share) <= (0.02 if 0 < share < 1 else 0)


def test_pixels_are_those_of_prepare(make_folder):
    folder = make_folder("photos", {"a.png": ["a"]})
    picture = Image.effect_mandelbrot((40, 24), (-2, -1.5, 1, 1.5), 100).convert("RGB")
    picture.save(folder / "a.png")
    plain = training_set(load_source(path=folder), height=16, width=12)
    assert torch.equal(plain[0][0].pixels, prepare(picture, 16, 12))
    flipping = training_set(load_source(path=folder), height=16, width=12, flip=True)
    flips = [torch.equal(flipping[n][0].pixels, prepare(picture, 16, 12, flip=True)) for n in range(200)]
    assert 70 < sum(flips) < 130
    assert len({flipping[n][0].key for n in range(20)}) == 2


def test_equal_keys_mean_equal_pixels(photos):
    for number in range(7):
        Image.effect_noise((20, 9), 90).convert("RGB").save(photos / f"{number}.png")
    samples = training_set(load_source(path=photos), crop="random", flip=True)
    by_key, by_pixels = {}, {}
    for number in range(400):
        example = samples[number][0]
        pixels = example.pixels.numpy().tobytes()
        assert by_key.setdefault(example.key, pixels) == pixels
        assert by_pixels.setdefault(pixels, example.key) == example.key
    assert len(by_key) > 50


def test_small_sets_are_read_once_and_large_ones_stay_on_disk(photos, monkeypatch):
    reads = Counter()

    def counting(picture):
        content = picture.read()
        return lambda: reads.update([picture.name]) or content

    source = load_source(path=photos)
    pictures = tuple(Picture(p.name, p.captions, p.weight, counting(p), p.origin) for p in source.pictures)
    kept = training_set(Source(pictures), crop="random", flip=True)
    first = [described(kept[number]) for number in range(70)]
    assert set(reads.values()) == {1}
    monkeypatch.setattr(sdtune.data.dataset, "MEMORY", 0)
    fresh = training_set(Source(pictures), crop="random", flip=True)
    assert [described(fresh[number]) for number in range(70)] == first
    assert set(reads.values()) == {11}


def test_a_broken_picture_is_named_when_it_is_read(photos):
    (photos / "3.png").write_bytes(b"")
    samples = training_set(load_source(path=photos))
    for workers in [0, 2]:
        with pytest.raises(DataError, match=r"3\.png cannot be read as a picture") as fault:
            list(batches(samples, batch_size=1, stop=7, workers=workers))
        assert "\n" not in str(fault.value)


def test_no_pictures_at_all(classes):
    with pytest.raises(DataError, match="no instance pictures"):
        training_set(load_source(path=classes, role="class"))
    with pytest.raises(DataError, match=r"class sources hold no pictures; .*data\.N\.generate"):
        training_set(load_source(path=classes), Source((), role="class"))


def step_numbers(step, *, batch_size, accumulate, world):
    parts = [
        sample_numbers(step, micro, rank, batch_size=batch_size, accumulate=accumulate, world=world)
        for micro in range(accumulate)
        for rank in range(world)
    ]
    return [number for part in parts for number in part]


@pytest.mark.parametrize(("batch_size", "accumulate", "world"), [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 8, 1)])
def test_a_step_takes_the_same_samples_however_it_is_divided(batch_size, accumulate, world):
    seen = [step_numbers(step, batch_size=batch_size, accumulate=accumulate, world=world) for step in range(5)]
    assert seen == [list(range(step * 8, step * 8 + 8)) for step in range(5)]


@pytest.mark.parametrize(("accumulate", "world"), [(1, 1), (2, 1), (1, 2)])
def test_batches_of_all_processes_make_the_step(photos, accumulate, world):
    samples = training_set(load_source(path=photos), **SETTINGS)
    size = 4 // accumulate // world
    seen = []
    for rank in range(world):
        own = batches(samples, batch_size=size, start=2, stop=5, accumulate=accumulate, rank=rank, world=world)
        for index, batch in enumerate(own):
            seen += [
                (2 + index // accumulate, number, key) for number, key in zip(batch.numbers, batch.keys, strict=True)
            ]
    assert sorted(seen) == [(n // 4, n, samples[n][0].key) for n in range(8, 20)]


def test_batches_do_not_depend_on_workers_nor_on_the_start(photos, classes):
    samples = training_set(load_source(path=photos), load_source(path=classes, role="class"), **SETTINGS)
    torch.manual_seed(0)
    state = torch.get_rng_state()

    def run(**settings):
        return [
            (batch.pixels.tolist(), batch.captions, batch.weights.tolist(), batch.instances, batch.numbers, batch.keys)
            for batch in batches(samples, batch_size=3, accumulate=2, **settings)
        ]

    expected = run(stop=6)
    assert len(expected) == 12
    assert run(stop=6, workers=1) == run(stop=6, workers=2) == expected
    assert run(start=4, stop=6) == run(start=4, stop=6, workers=2) == expected[8:]
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_stop_it_goes_on(photos):
    for workers in [0, 1]:
        loader = batches(training_set(load_source(path=photos)), batch_size=2, workers=workers)
        assert [next(loader).numbers for _ in range(20)][-1] == [38, 39]
        loader.close()


def pictures(*names, origin="here"):
    return tuple(Picture(name, (f"{name} first", f"{name} second"), 1.0, lambda: b"", origin) for name in names)


def test_held_out_pictures_are_never_learnt():
    many = pictures(*(f"{number}.png" for number in range(500)))
    own = Source(pictures("v.png", origin="there"), role="validation")
    sources = [Source(many[:300], repeats=2, weight=0.5), Source(many[300:]), own, Source(many[:5], role="class")]
    training, validation = held_out(sources, 0.2, seed=1)
    learnt = {picture.name for source in training[:2] for picture in source.pictures}
    aside = {picture.name for picture in validation.pictures}
    assert [source.role for source in training] == ["instance", "instance", "class"] and validation.role == "validation"
    assert training[0].repeats == 2 and training[0].weight == 0.5 and len(training[2].pictures) == 5
    assert learnt | aside == {picture.name for picture in many} | {"v.png"} and not learnt & aside
    assert 70 < len(aside) < 130
    fewer, still = held_out([Source(many[::3])], 0.2, seed=1)  # others gone: who stays, stays on its side
    assert {p.name for p in still.pictures} == aside & {p.name for p in many[::3]}
    assert {p.name for p in held_out(sources, 0.2, seed=2)[1].pictures} != aside


def test_held_out_of_small_sets():
    training, validation = held_out([Source(pictures("a.png", "b.png", "c.png"))], 0.001, seed=0)
    assert len(validation.pictures) == 1 and len(training[0].pictures) == 2
    training, validation = held_out([Source(pictures("a.png"))], 0.5, seed=0)
    assert len(validation.pictures) == 0 and len(training[0].pictures) == 1
    training, validation = held_out([Source(pictures("a.png", "b.png")), Source(pictures("c.png"))], 0.999, seed=0)
    assert [len(source.pictures) for source in training] == [1, 1] and len(validation.pictures) == 1
    sources = [Source(pictures("a.png", "b.png"))]
    assert held_out(sources, 0.0, seed=0) == (sources, Source((), role="validation"))


def test_validation_examples_are_plain(make_folder):
    folder = make_folder("photos", {f"{number}.png": [f"one {number}", "two"] for number in range(10)}, size=(20, 10))
    source = load_source(path=folder, role="validation")
    examples = validation_examples([source], 8, 8, count=4)
    assert [name(example) for example in examples] == ["0.png", "2.png", "5.png", "7.png"]
    assert [example.caption for example in examples] == ["one 0", "one 2", "one 5", "one 7"]
    assert [example.number for example in examples] == [0, 1, 2, 3]
    assert torch.equal(examples[1].pixels, prepare(open_rgb(folder / "2.png"), 8, 8))
    assert len(validation_examples([source], 8, 8, count=64)) == 10
    assert validation_examples([], 8, 8, count=64) == []
    assert collate([[example] for example in examples]).instances == 4


def test_real_photographs(shared_data):
    """Real JPEGs through the whole way, of two subjects, with workers."""
    folders = sorted(folder for folder in (shared_data / "dreambooth").iterdir() if folder.is_dir())[:2]
    sources = [load_source(path=folder, prompt=f"a photo of sks {folder.name}") for folder in folders]
    samples = TrainingSet(sources, height=64, width=48, crop="random", flip=True, seed=0)
    batch = next(batches(samples, batch_size=6, workers=1))
    assert batch.pixels.shape == (6, 3, 64, 48)
    assert batch.pixels.float().std() > 20


def test_sizes_tell_of_the_picture_before_resizing_and_of_its_crop(make_folder) -> None:
    folder = make_folder("photos", {"a.png": ["a"]}, size=(40, 20))  # 40 wide, 20 high -> 16 wide, 8 high -> 8 x 8
    sources = [load_source(folder)]
    straight = TrainingSet(sources, height=8, width=8)
    mirrored = TrainingSet(sources, height=8, width=8, crop="random", flip=True, seed=1)

    assert straight[0][0].size == (20, 40, 0, 4)
    assert validation_examples(sources, 8, 8, 1)[0].size == (20, 40, 0, 4)
    assert collate([straight[0], straight[1]]).sizes == [(20, 40, 0, 4)] * 2
    for number in range(20):
        example = mirrored[number][0]
        left = int(example.key.split("+")[2].split("|")[0])
        assert example.size == (20, 40, 0, 8 - left if "mirrored" in example.key else left)
