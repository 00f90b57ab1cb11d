"""benchmarks/classifier.py and fashion_text.py on a few made-up pictures and a small random model."""

import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads a script as if it stood beside the others."""
    monkeypatch.syspath_prepend(str(SCRIPTS))

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def write_data(folder: Path, names: list[str]) -> None:
    """Splits of 40 and 10 noisy pictures; each class is bright in a column of its own."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        files, texts = [], [names[number % len(names)] for number in range(count)]
        for text in texts:
            picture, left = rng.integers(0, 60, (28, 28), dtype=np.uint8), 28 * names.index(text) // len(names)
            picture[:, left : left + 28 // len(names)] += 180
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "PNG")
            files.append({"bytes": file.getvalue(), "path": None})
        (folder / split).mkdir(parents=True)
        pq.write_table(pa.table({"image": files, "text": texts}), folder / split / "data.parquet")


def test_it_learns_and_is_opened_again(scripts: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifier = scripts("classifier")
    write_data(tmp_path / "data", ["one", "two"])
    out = tmp_path / "c.safetensors"
    result = classifier.main([str(tmp_path / "data"), "--steps", "20", "--out", str(out)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["accuracy"] == 1.0
    network, names = classifier.open_classifier(out)
    pictures, texts = classifier.read_split(tmp_path / "data" / "test")
    assert pictures.shape == (10, 1, 28, 28) and pictures.max() <= 1
    assert [names[number] for number in classifier.read(network, pictures)] == texts
    grey = [Image.fromarray((picture[0] * 255).byte().numpy()) for picture in pictures]
    coloured = [picture.convert("RGB").resize((64, 64)) for picture in grey]
    assert torch.equal(classifier.read(network, classifier.as_input(coloured)), classifier.read(network, pictures))


def test_what_sentences_draw_is_read(
    scripts: Any, sd: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier, measure = scripts("classifier"), scripts("fashion_text")
    write_data(tmp_path / "data", list(measure.CLOTHES))
    classifier.main([str(tmp_path / "data"), "--steps", "1", "--out", str(tmp_path / "c.safetensors")])
    capsys.readouterr()
    places = ["--model", str(sd), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    few = ["--count", "1", "--steps", "2", "--strengths", "0.5"]
    result = measure.main([*places, *few, "--classifier", str(tmp_path / "c.safetensors")])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["each"].keys() == measure.CLOTHES.keys()
    assert [row["strength"] for row in result["from pictures"]] == [0.0, 0.5]
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.size == (10 * 128, 3 * 128)
