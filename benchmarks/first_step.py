"""How long a person waits from typing `sdtune train recipes/lora_tiny.yaml` to the run's first optimizer step.

    python benchmarks/first_step.py [--runs 3]

The clock stops when the first step stands in metrics.jsonl, so imports, data, weights and the pictures of step 0 are in
it. One run that is not counted warms the disk cache. Prints a table, then one JSON line.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def first_step(recipe: str, folder: Path) -> float:
    """Seconds until the first step of a run is logged."""
    command = [sys.executable, "-m", "sdtune", "train", recipe, "train.steps=2", f"output.dir={folder}"]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        metrics = folder / "metrics.jsonl"
        while not (metrics.is_file() and '"loss"' in metrics.read_text(encoding="utf-8")):
            if process.poll() is not None:
                raise SystemExit(f"the run ended before its first step: {process.communicate()[1]}")
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        process.communicate()
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="lora_tiny")
    parser.add_argument("--runs", type=int, default=3)
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        seconds = [first_step(settings.recipe, Path(place) / f"run-{i}") for i in range(settings.runs + 1)][1:]
    median = statistics.median(seconds)
    print(f"{'first step of ' + settings.recipe:<30} {'median':>8} {'least':>8} {'most':>8}")
    print(f"{f'seconds, {settings.runs} runs':<30} {median:>8.2f} {min(seconds):>8.2f} {max(seconds):>8.2f}")
    rounded = [round(value, 2) for value in seconds]
    print(json.dumps({"recipe": settings.recipe, "median": round(median, 2), "seconds": rounded}))


if __name__ == "__main__":
    main()
