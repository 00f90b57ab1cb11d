"""What a run does about its pictures: refused before anything is made, and read no further than its last step."""

from pathlib import Path
from typing import Any

import pytest

from sdtune.config import DataSource
from sdtune.errors import DataError
from sdtune.run import Run
from tests.factories import make_photos, make_recipe


def test_broken_pictures_are_refused_before_anything_is_made(sd: Path, tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "photos", 4)
    for name in ("1.png", "3.png"):
        (photos / name).write_bytes((photos / name).read_bytes()[:60])
    with pytest.raises(DataError, match=r"^2 pictures cannot be read: .*1\.png .*3\.png .*Nothing was begun") as fault:
        Run(make_recipe(sd, photos, tmp_path / "run"))
    assert fault.value.exit_code == 1 and not (tmp_path / "run").exists()


def test_a_fault_names_its_entry_of_the_recipe(sd: Path, photos: Path, tmp_path: Path) -> None:
    recipe = make_recipe(sd, photos, tmp_path / "run")
    recipe.data.append(DataSource(path=str(make_photos(tmp_path / "bare", 1, captions=False)), role="class"))
    with pytest.raises(DataError, match=r"data\.1\.prompt="):
        Run(recipe)


def test_nothing_is_read_ahead_of_the_last_step(sd: Path, photos: Path, tmp_path: Path) -> None:
    run = Run(make_recipe(sd, photos, tmp_path / "run", train={"steps": 2, "batch_size": 1, "workers": 1}))
    asked, training = tmp_path / "asked", run.training

    class Noting:
        def __getitem__(self, number: int) -> Any:
            with open(asked, "a") as file:
                file.write(f"{number}\n")
            return training[number]

    run.training = Noting()  # type: ignore[assignment]
    run.complete()
    assert asked.read_text().split() == ["0", "1"]
