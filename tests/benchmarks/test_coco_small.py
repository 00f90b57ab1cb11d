"""benchmarks/coco_small.py: captions held out, drawings compared with photographs."""

import importlib
import json
from pathlib import Path

import pytest
from PIL import Image

from sdtune.data.metadata import read_rows, write_rows
from tests.factories import make_photos

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_captions_are_held_out_and_drawings_judged(
    sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    whole, known = make_photos(tmp_path / "whole", 3), tmp_path / "known"
    names = [row["file_name"] for row in read_rows(whole)]
    write_rows(whole, [{"file_name": name, "text": f"{name} {k}"} for name in names for k in range(3)])
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = importlib.import_module("coco_small")
    benchmark.main(["--split", str(whole), str(known)])
    assert read_rows(known) == [{"file_name": name, "text": f"{name} {k}"} for name in names for k in range(2)]
    assert (known / names[0]).read_bytes() == (whole / names[0]).read_bytes()
    arguments = ["--model", str(sd), "--whole", str(whole), "--known", str(known), "--steps", "2", "--out", "out"]
    result = benchmark.main([*arguments, "--show", names[2], names[0]])
    assert result["photographs"] == 3 and result["right"]["photograph"] == 1.0
    assert all(0 <= value <= 1 for value in result["right"].values())
    with Image.open("out/sheet.png") as sheet:
        columns, lines = sheet.width // 64, sheet.height // 64
    assert (columns, lines) == (2, 5)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
