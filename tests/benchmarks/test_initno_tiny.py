"""benchmarks/initno_tiny.py: it draws each way from the same seeds, and counts what is there."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdtune.data.metadata import read_rows
from sdtune.evaluate import load_thumbnails

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "initno_tiny.py"


@pytest.fixture
def benchmark(monkeypatch):
    spec = importlib.util.spec_from_file_location("initno_tiny", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_subjects_are_found_in_pictures_of_pairs_and_missed_in_others(benchmark, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, "PICTURES", 20)
    assert benchmark.main(["--make-pairs", str(tmp_path / "pairs"), "--things", "8"]) == {}
    rows = read_rows(tmp_path / "pairs")
    assert len(rows) == 20
    names, references = load_thumbnails()
    wanted = benchmark.pairs(8, 20, held_out=False)
    assert [row["text"] for row in rows] == [benchmark.prompt_of(names, pair) for pair in wanted]
    assert not set(wanted) & set(benchmark.pairs(8, 20, held_out=True))
    pictures = np.stack([np.asarray(Image.open(tmp_path / "pairs" / row["file_name"])) for row in rows])
    assert (benchmark.ranks(pictures, references, wanted) == 0).mean() > 0.9
    alone = references[[a for a, _ in wanted]]
    assert (benchmark.ranks(alone, references, wanted) == 0).mean(0) == pytest.approx([1, 0], abs=0.2)


def test_it_runs_and_ends_with_one_json_line(benchmark, tmp_path, capsys):
    result = benchmark.main(["--count", "2", "--steps", "1", "--rounds", "1", "--out", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    without, *optimised = result["ways"].values()
    assert without["moved"] == 0 and all(way["moved"] > 0 for way in optimised)
    assert Image.open(tmp_path / "sheet.png").height > 200
