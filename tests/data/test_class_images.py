"""Class pictures: resumed where they were left, never half there."""

import pytest
from PIL import Image

from sdtune.data.class_images import fill_class_folder
from sdtune.data.metadata import read_rows
from sdtune.data.sources import load_source
from sdtune.errors import DataError


class Base:
    """Draws a picture that tells its number and prompt; can be stopped after some batches."""

    def __init__(self, stop_after=None):
        self.calls, self.stop_after = [], stop_after

    def __call__(self, prompts, numbers):
        if self.stop_after is not None and len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append((prompts, numbers))
        return [Image.new("RGB", (4, 4), (n, len(p), 0)) for n, p in zip(numbers, prompts, strict=True)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pictures_and_rows(tmp_path):
    base, seen = Base(), []
    drawn = fill_class_folder(tmp_path / "new", ["a dog", "a cat!"], 5, base, 2, lambda *state: seen.append(state))
    assert drawn == 5 and seen == [(2, 5), (4, 5), (5, 5)]
    assert base.calls == [(["a dog", "a cat!"], [0, 1]), (["a dog", "a cat!"], [2, 3]), (["a dog"], [4])]
    assert read_rows(tmp_path / "new")[1] == {"file_name": "class-000001.png", "text": "a cat!"}
    source = load_source(path=tmp_path / "new", role="class")
    assert [picture.captions[0] for picture in source.pictures] == ["a dog", "a cat!", "a dog", "a cat!", "a dog"]
    assert Image.open(source.pictures[3].read()).getpixel((0, 0)) == (3, 6, 0)
    assert fill_class_folder(tmp_path / "new", ["a dog", "a cat!"], 5, Base(stop_after=0)) == 0


def test_a_stopped_run_goes_on_and_ends_the_same(tmp_path):
    fill_class_folder(tmp_path / "whole", ["a", "b", "c"], 10, Base(), 3)
    with pytest.raises(KeyboardInterrupt):
        fill_class_folder(tmp_path / "stopped", ["a", "b", "c"], 10, Base(stop_after=2), 3)
    assert len(read_rows(tmp_path / "stopped")) == 6
    (tmp_path / "stopped" / "class-000001.png").unlink()  # lost
    (tmp_path / "stopped" / "class-000006.png").write_bytes(b"half")  # no row yet, so it is drawn again
    base = Base()
    assert fill_class_folder(tmp_path / "stopped", ["a", "b", "c"], 10, base, 3) == 5
    assert [numbers for _, numbers in base.calls] == [[1, 6, 7], [8, 9]]
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def no_space(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(DataError, match="No space left"):
        fill_class_folder(tmp_path, ["a"], 3, Base())
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_a_person_count_and_are_kept(make_folder):
    folder = make_folder("classes", {"mine.png": ["my dog", "rex"], "other.png": ["a dog"]})
    before = (folder / "mine.png").read_bytes()
    assert fill_class_folder(folder, ["a dog"], 5, Base()) == 3
    assert (folder / "mine.png").read_bytes() == before
    source = load_source(path=folder)
    assert [p.name for p in source.pictures] == ["mine.png", "other.png", *(f"class-00000{n}.png" for n in range(3))]
    assert source.pictures[0].captions == ("my dog", "rex")
    assert fill_class_folder(folder, ["a dog"], 2, Base()) == 0


def test_other_prompts_are_refused(tmp_path):
    fill_class_folder(tmp_path, ["a dog"], 2, Base())
    with pytest.raises(DataError, match="drawn for 'a dog', but now 'a cat' is asked for; give an empty folder"):
        fill_class_folder(tmp_path, ["a cat"], 2, Base())
    with pytest.raises(DataError, match="no prompts"):
        fill_class_folder(tmp_path, [], 2, Base())
