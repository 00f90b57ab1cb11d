"""Small folders of pictures to load."""

import json
from pathlib import Path

import pytest
from PIL import Image


def colour(number: int) -> tuple[int, int, int]:
    return number * 37 % 256, number * 91 % 256, number * 13 % 256


@pytest.fixture
def make_folder(tmp_path):
    """make_folder("photos", {"a.png": ["first caption", "second"], "b.png": []}) -> its path."""

    def make(name: str, pictures: dict[str, list[str]], size=(12, 8), rows: list[dict] | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, file_name in enumerate(pictures):
            path = folder / file_name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, colour(number)).save(path)
        if rows is None:
            rows = [{"file_name": name, "text": text} for name, texts in pictures.items() for text in texts]
        if rows:
            (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return folder

    return make


@pytest.fixture
def shared_data():
    """Real photographs beside the project, where there are some."""
    folder = Path(__file__).parents[3] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder
