"""A small random captioner, and folders of pictures for it."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

os.environ.setdefault("HF_HUB_OFFLINE", "1")
Fill = Callable[..., Path]


def noise(number: int) -> Image.Image:
    """A picture that differs from all others."""
    pixels = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((40, 30), Image.Resampling.NEAREST)


@pytest.fixture(scope="session")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP folder. Do not write into it."""
    from tests.data_tools.models import make_blip

    return make_blip(tmp_path_factory.mktemp("captioners") / "blip")


@pytest.fixture
def fill(tmp_path: Path) -> Fill:
    """fill("a.png", "sub/b.jpg") -> the folder `photos` with these pictures, no two alike."""

    def make(*names: str, folder: str = "photos") -> Path:
        for number, name in enumerate(names):
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            noise(number).save(path)
        return tmp_path / folder

    return make
