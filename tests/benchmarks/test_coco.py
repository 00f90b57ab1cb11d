"""benchmarks/coco.py on a small file: it runs both sides and prints one JSON line."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(sys.platform == "win32", reason="it measures with wait4")
def test_both_are_measured(capsys):
    script = Path(__file__).parents[2] / "benchmarks" / "coco.py"
    spec = importlib.util.spec_from_file_location("coco_benchmark", script)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    result = benchmark.main(["--runs", "1", "--pictures", "200", "--captions", "1000"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    for name in ("sdtune coco", "pycocotools COCO()"):
        assert result[name]["seconds"] > 0 and result[name]["peak_mb"] > 5
