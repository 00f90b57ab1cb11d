"""What caching saves: a LoRA run of the tiny base over a few hundred pictures, with each kind of cache.

    python benchmarks/cache.py [--pictures 300] [--steps 200]

The pictures are JPEGs of 640 x 480 px, made here, cut to 64 x 64. The runs follow each other in one process, after one
that is not counted; the whole of each counts: looking at the pictures, loading the model, filling the cache. Seconds
are from start to end and of processor time (all threads; on a machine that is busy with other things that is the one to
compare). Beside them stands how far the losses of the steps are from those without a cache, at most, in proportion.
Prints a table, then one JSON line.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdtune.config import load
from sdtune.libraries import prepare
from sdtune.run import Run


def make_pictures(folder: Path, count: int) -> None:
    """Photographs would do; these have something of their size and of their noise."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = random.integers(0, 256, (12, 16, 3)).astype(np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC)).astype(float)
        noisy = (smooth + random.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:04d}.jpg", quality=90)
        (folder / f"{number:04d}.txt").write_text(f"picture {number} of a pattern")


def measure(work: Path, name: str, steps: int, *settings: str) -> dict[str, Any]:
    """Seconds, processor seconds and losses of one run."""
    words = [f"data=[{{path: {work / 'pictures'}}}]", "validate.samples=null", "validate.every=null"]
    words += [f"train.steps={steps}", f"output.dir={work / name}", "output.trackers=[]", *settings]
    began, processor = time.perf_counter(), time.process_time()
    run = Run(load("lora_tiny", words))
    losses = [info.loss for info in run.steps()]
    run.finish()
    seconds, processor = time.perf_counter() - began, time.process_time() - processor
    return {"seconds": round(seconds, 1), "processor_seconds": round(processor, 1), "losses": losses}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)
    prepare()
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        make_pictures(work / "pictures", options.pictures)
        folder = f"train.cache_dir={work / 'cache'}"
        measure(work, "warm-up", 1, "train.cache=false")
        found = {
            "no cache": measure(work, "none", options.steps, "train.cache=false"),
            "memory (the default)": measure(work, "memory", options.steps),
            "disk, empty before": measure(work, "cold", options.steps, folder),
            "disk, full before": measure(work, "warm", options.steps, folder),
        }
        kilobytes = sum(path.stat().st_size for path in (work / "cache").rglob("*") if path.is_file()) // 1000
    plain = found["no cache"]["losses"]
    title = f"{options.pictures} pictures, {options.steps} steps of 8"
    print(f"{title:<32}{'seconds':>16}{'processor':>11}{'loss differs':>14}")
    for name, one in found.items():
        apart = max(abs(a - b) / b for a, b in zip(one.pop("losses"), plain, strict=True))
        one["loss_differs"] = float(f"{apart:.1e}")
        print(f"{name:<32}{one['seconds']:>16}{one['processor_seconds']:>11}{apart:>14.1e}")
    result = {"pictures": options.pictures, "steps": options.steps, "folder_kb": kilobytes, **found}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
