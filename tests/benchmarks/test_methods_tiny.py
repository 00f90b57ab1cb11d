"""benchmarks/methods_tiny.py: each part runs, measures and shows, in a step or two."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.factories import make_photos

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "methods_tiny.py"


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("methods_tiny", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look themselves up
    spec.loader.exec_module(module)
    for name, value in {"STEPS": 1, "KEPT": 6, "FACES": ("cat face", "dog face")}.items():
        monkeypatch.setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("part", "rows"), [pytest.param("prior", 5, marks=pytest.mark.slow), ("token", 3), ("adapters", 4)]
)
def test_a_part_is_measured_and_shown(benchmark, tmp_path, capsys, part, rows):
    make_photos(tmp_path / "data" / "style_train", 2)
    unseen = [{"name": "red apple"}, {"name": "cactus"}]
    (tmp_path / "data" / "style_unseen.json").write_text(json.dumps(unseen), encoding="utf-8")
    out, data = str(tmp_path / "out"), str(tmp_path / "data")
    result = benchmark.main(["--part", part, "--steps", "1", "--out", out, "--data", data])
    assert len(result[part]) == rows and len({row["run"] for row in result[part]}) == rows
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    with Image.open(tmp_path / "out" / f"{part}.png") as sheet:
        assert np.asarray(sheet).std() > 10


def test_missing_data_is_said_with_the_command(benchmark, tmp_path):
    with pytest.raises(SystemExit, match="build_data.py"):
        benchmark.main(["--part", "token", "--data", str(tmp_path / "none"), "--out", str(tmp_path)])
