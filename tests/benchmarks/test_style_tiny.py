"""benchmarks/style_tiny.py: its measures on known inputs, and the whole of it on a random tiny model."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdtune import evaluate
from sdtune.run import Run
from tests.factories import make_photos, make_recipe, make_sd

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "style_tiny.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("style_tiny", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_measures_on_the_pictures_themselves(benchmark):
    _, fluent = evaluate.load_thumbnails("fluent")
    _, noto = evaluate.load_thumbnails("noto")
    wanted = list(range(0, 285, 7))
    assert benchmark.measure(fluent[wanted], wanted, fluent, noto) == {"style": 0.0, "identity": 1.0}
    assert benchmark.measure(noto[wanted], wanted, fluent, noto) == {"style": 1.0, "identity": 1.0}
    assert benchmark.measure(noto[wanted][:, :, ::-1].copy(), wanted, fluent, noto)["identity"] == 1.0
    others = noto[[number + 1 for number in wanted]]
    assert benchmark.measure(others, wanted, fluent, noto)["identity"] == 0.0


def test_a_run_is_measured_and_shown(benchmark, tmp_path, capsys):
    base = make_sd(tmp_path / "sd")
    Run(make_recipe(base, make_photos(tmp_path / "photos", 2), tmp_path / "run")).complete()
    unseen = tmp_path / "unseen.json"
    unseen.write_text(json.dumps([{"name": name} for name in ("red apple", "cactus", "taco")]), encoding="utf-8")
    result = benchmark.main(
        [
            "--lora",
            str(tmp_path / "run" / "final"),
            "--base",
            str(base),
            "--unseen",
            str(unseen),
            "--out",
            str(tmp_path / "out"),
            "--limit",
            "2",
            "--steps",
            "2",
        ]
    )
    assert result["concepts"] == 2
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1]) == result
    assert "with LoRA" in printed
    with Image.open(result["sheet"]) as sheet:
        assert np.asarray(sheet).std() > 10


def test_missing_data_is_said_with_the_command(benchmark, tmp_path):
    with pytest.raises(SystemExit, match="build_data.py"):
        benchmark.main(["--unseen", str(tmp_path / "none.json")])
