"""examples/mnist: from packages and IDX files to a data set, here from small ones of the same layout."""

import gzip
import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdtune.data.sources import load_source

SCRIPT = Path(__file__).parents[2] / "examples" / "mnist" / "build_data.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("build_mnist_data", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["build_data.py", *map(str, arguments)])
    script.main()


def idx(values: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    return head + values.astype(np.uint8).tobytes()


@pytest.fixture
def clothes(tmp_path: Path) -> dict[str, np.ndarray]:
    """IDX files of 12 and 4 pictures, those of the test split packed; the pictures."""
    made, folder = {}, tmp_path / "idx"
    folder.mkdir()
    for name, count in (("train", 12), ("t10k", 4)):
        made[name] = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for kind, values in (("images-idx3", made[name]), ("labels-idx1", np.arange(count) % 10)):
            content, file = idx(values), folder / f"{name}-{kind}-ubyte"
            if name == "train":
                file.write_bytes(content)
            else:
                file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(content))
    return made


def test_idx_files_become_a_data_set_that_training_reads(
    script: Any, clothes: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "fashion"
    run(script, monkeypatch, "--fashion", "--idx", tmp_path / "idx", "--out", out)
    train, test = load_source(out).pictures, load_source(out, split="test").pictures
    assert [picture.captions for picture in train[:10]] == [(name,) for name in script.CLOTHES]
    assert len(train) == 12 and len(test) == 4 and test[3].captions == ("dress",)
    for pictures, name in ((train, "train"), (test, "t10k")):
        read = [np.array(Image.open(io.BytesIO(picture.read()))) for picture in pictures]  # type: ignore[arg-type]
        assert np.array_equal(np.stack(read), clothes[name])
    before = (out / "train" / "data.parquet").read_bytes()
    run(script, monkeypatch, "--fashion", "--idx", tmp_path / "idx", "--out", out)
    assert (out / "train" / "data.parquet").read_bytes() == before


def test_captions_may_be_sentences(
    script: Any, clothes: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(script, monkeypatch, "--fashion", "--sentences", "--idx", tmp_path / "idx", "--out", tmp_path / "out")
    captions = [picture.captions for picture in load_source(tmp_path / "out").pictures]
    assert captions[9] == tuple(sentence.format("an ankle boot") for sentence in script.SENTENCES)
    assert "a photo of a dress" in captions[3] and len(set(captions)) == 10


def test_the_npm_package_gives_every_tenth_to_the_test_split(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, pictures = tmp_path / script.NPM_FILE, {}
    with tarfile.open(package, "w:gz") as archive:
        for digit in range(10):
            values = np.random.default_rng(digit).integers(0, 256, (3, 784))
            pictures[digit] = values.reshape(-1, 28, 28)
            content = json.dumps({"data": (values / 255).round(3).ravel().tolist()}).encode()
            info = tarfile.TarInfo(f"package/src/digits/{digit}.json")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    monkeypatch.setitem(script.SHA256, script.NPM_FILE, script.hashlib.sha256(package.read_bytes()).hexdigest())
    run(script, monkeypatch, "--packages", tmp_path, "--out", tmp_path / "mnist")
    test = load_source(tmp_path / "mnist", split="test").pictures
    assert [picture.captions for picture in test] == [("3",), ("6",), ("9",)]
    assert len(load_source(tmp_path / "mnist").pictures) == 27
    read = np.array(Image.open(io.BytesIO(test[0].read())))  # type: ignore[arg-type]
    assert np.array_equal(read, pictures[3][0])


def test_wrong_files_are_refused(
    script: Any, clothes: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / script.NPM_FILE).write_bytes(b"another")
    with pytest.raises(SystemExit, match="SHA-256"):
        run(script, monkeypatch, "--packages", tmp_path, "--out", tmp_path / "mnist")
    file = tmp_path / "idx" / "train-images-idx3-ubyte"
    whole = file.read_bytes()
    for content, fault in ((whole[:-1], "fetch it again"), (b"PK" + whole, "is no IDX file"), (None, "is missing")):
        file.write_bytes(content) if content is not None else file.unlink()
        with pytest.raises(SystemExit, match=fault):
            run(script, monkeypatch, "--idx", tmp_path / "idx", "--out", tmp_path / "mnist")
    assert not (tmp_path / "mnist").exists()


def test_a_folder_of_others_is_not_replaced(
    script: Any, clothes: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(SystemExit, match="was not made by this script"):
        run(script, monkeypatch, "--idx", tmp_path / "idx", "--out", tmp_path / "mine")
