"""benchmarks/cache.py on a few pictures: it runs all kinds and prints one JSON line."""

import importlib.util
import json
from pathlib import Path
from typing import Any


def test_all_kinds_are_measured(capsys: Any) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "cache.py"
    spec = importlib.util.spec_from_file_location("cache_benchmark", script)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    result = benchmark.main(["--pictures", "9", "--steps", "2"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert result["folder_kb"] > 0
    for name in ("no cache", "memory (the default)", "disk, empty before", "disk, full before"):
        assert result[name]["seconds"] > 0 and result[name]["loss_differs"] < 1e-3
