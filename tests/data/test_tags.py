"""Tags are shuffled, all of them kept, and each order follows from the number of its sample."""

from itertools import permutations

import pytest

from sdtune.data.dataset import TrainingSet
from sdtune.data.sources import load_source
from sdtune.data.tags import shuffle_tags


def shuffled(caption, keep=0, number=0):
    return shuffle_tags(caption, keep, 0, "tags", number)


def test_all_orders_come_and_no_tag_is_lost():
    expected = {", ".join(order) for order in permutations(["a b", "c", "d"])}
    assert {shuffled("a b, c ,d", number=number) for number in range(100)} == expected
    assert shuffled("a, b, c, d", number=5) == shuffled("a, b, c, d", number=5)


def test_the_first_tags_stay():
    found = {shuffled("sks, dog, c, d", keep=2, number=number) for number in range(30)}
    assert found == {"sks, dog, c, d", "sks, dog, d, c"}
    assert shuffled("sks, dog", keep=5) == "sks, dog"


@pytest.mark.parametrize("caption", ["", "a photo of a dog"])
def test_a_caption_without_commas_stays(caption):
    assert shuffled(caption) == caption


def test_captions_of_a_run(make_folder):
    folder = make_folder("photos", {"a.png": ["sks, one, two, three", "sks, four"]})
    source = load_source(path=folder)
    settings = {"height": 8, "width": 8, "seed": 1, "keep_tags": 1}
    samples = TrainingSet([source], tag_shuffle=True, caption_dropout=0.2, **settings)
    captions = [samples[number][0].caption for number in range(300)]
    ones = {f"sks, {', '.join(order)}" for order in permutations(["one", "two", "three"])}
    assert set(captions) == {*ones, "sks, four", ""}
    assert [samples[number][0].caption for number in reversed(range(300))] == captions[::-1]
    plain = TrainingSet([source], caption_dropout=0.2, **settings)
    assert {plain[number][0].caption for number in range(300)} == {"sks, one, two, three", "sks, four", ""}
    dropped = [plain[number][0].caption == "" for number in range(300)]
    assert dropped == [caption == "" for caption in captions]  # the shuffle changes no other draw
