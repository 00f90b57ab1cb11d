"""`sdtune check` against decoding alone: how fast are 10,000 JPEGs of 512 px looked at?

    python benchmarks/check.py [--count 10000] [--runs 3] [--photos FOLDER]

Makes the pictures in a temporary folder: crops of the photographs in FOLDER where it is given, else smooth colours
under grain; several sizes with a shorter side of 512. Then, in turns: Pillow decodes them all, on threads and on
processes that are running already, one for each core; the library checks them; and the whole command does, its start
and imports included. Wanted: the check at 80 % or more of the speed of the faster way to decode. CPU seconds of all
processes stand beside, for a machine with other work to do. Prints a table, then one JSON line.
"""

import argparse
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from sdtune.data.check import check
from sdtune.data.check_entries import Entry
from sdtune.data.check_scan import cores
from sdtune.data.check_sizes import Frame
from sdtune.data.sources import load_source

SIZES = ((512, 512), (640, 512), (768, 512), (512, 640), (512, 768))  # width, height
WANTED = 0.8  # of the speed of decoding
CHUNK = 32


def make(number: int, folder: Path, photos: Sequence[Path]) -> None:
    """Writes picture `number`, each another one."""
    lots, (width, height) = np.random.default_rng(number), SIZES[number % len(SIZES)]
    if photos:
        with Image.open(photos[number % len(photos)]) as photo:
            picture = photo.convert("RGB")
        side = lots.uniform(0.6, 1.0) * min(picture.width / width, picture.height / height)
        across, down = side * width, side * height
        left, top = lots.uniform(0, picture.width - across), lots.uniform(0, picture.height - down)
        box = (left, top, left + across, top + down)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC, box)
    else:
        coarse = Image.fromarray(lots.integers(0, 256, (10, 12, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        picture = Image.fromarray((smooth + lots.normal(0, 5, smooth.shape)).clip(0, 255).astype(np.uint8))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=90)
    (folder / f"{number:06d}.jpg").write_bytes(content.getvalue())


def decode(paths: Sequence[str]) -> None:
    """What the check is measured against."""
    for path in paths:
        with Image.open(path) as picture:
            picture.load()


def decode_all(pool: Executor, paths: Sequence[str]) -> None:
    """All pictures, on all workers of a pool."""
    list(pool.map(decode, [paths[first : first + CHUNK] for first in range(0, len(paths), CHUNK)]))


def check_all(folder: Path) -> None:
    """The check as the library does it."""
    report = check([Entry(partial(load_source, path=folder), path=folder)], Frame(512, 512))
    assert not report.fatal


def run_command(folder: Path) -> None:
    """The check as a person does it, tokens of the captions included."""
    command = [sys.executable, "-m", "sdtune", "check", str(folder), "--json"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def timed(work: Callable[[], None]) -> float:
    """Wall seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def cpu_of(work: Callable[[], None]) -> float:
    """CPU seconds of this process and those that it started and that have ended."""
    before = os.times()
    work()
    after = os.times()
    return sum(after[:4]) - sum(before[:4])


def measure(folder: Path, runs: int) -> dict[str, list[float]]:
    """Wall seconds of each way, taken in turns."""
    paths = [str(path) for path in sorted(folder.glob("*.jpg"))]
    seconds: dict[str, list[float]] = {"decode, threads": [], "decode, processes": [], "check": [], "sdtune check": []}
    context = multiprocessing.get_context("spawn")
    with ThreadPoolExecutor(cores()) as threads, ProcessPoolExecutor(cores(), context) as processes:
        decode_all(processes, paths[: 4 * CHUNK])  # they are running
        decode_all(threads, paths)  # the files are in memory
        for _ in range(runs):
            seconds["decode, threads"].append(timed(partial(decode_all, threads, paths)))
            seconds["decode, processes"].append(timed(partial(decode_all, processes, paths)))
            seconds["check"].append(timed(partial(check_all, folder)))
            seconds["sdtune check"].append(timed(partial(run_command, folder)))
    return seconds


def main() -> None:
    """Make the pictures, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--photos", type=Path, help="Folder of photographs to take crops of.")
    settings = parser.parse_args()
    photos = sorted(settings.photos.glob("*.jpg")) if settings.photos else []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "pictures"
        folder.mkdir()
        with ThreadPoolExecutor(cores()) as pool:
            list(pool.map(partial(make, folder=folder, photos=photos), range(settings.count)))
        rows = [{"file_name": f"{n:06d}.jpg", "text": f"a photo of thing {n}"} for n in range(settings.count)]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        size = sum(path.stat().st_size for path in folder.glob("*.jpg")) / settings.count
        seconds = measure(folder, settings.runs)
        paths = [str(path) for path in sorted(folder.glob("*.jpg"))]
        cpu = {
            "decode, threads": cpu_of(lambda: decode(paths)),
            "check": cpu_of(partial(check_all, folder)),
            "sdtune check": cpu_of(partial(run_command, folder)),
        }
    median = {name: statistics.median(values) for name, values in seconds.items()}
    fastest = min(median["decode, threads"], median["decode, processes"])
    print(f"{settings.count} JPEGs of {size / 1000:.0f} KB on {cores()} cores, median of {settings.runs} runs in turns")
    print(f"{'':<20}{'seconds':>9}{'pictures/s':>12}{'speed':>8}{'CPU seconds':>13}")
    for name, value in median.items():
        used = f"{cpu[name]:>13.2f}" if name in cpu else ""
        print(f"{name:<20}{value:>9.2f}{settings.count / value:>12.0f}{fastest / value:>8.0%}{used}")
    result = {
        "pictures": settings.count,
        "cores": cores(),
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "cpu_seconds": {name: round(value, 3) for name, value in cpu.items()},
        "speed_of_decoding": round(fastest / median["check"], 3),
        "speed_of_decoding_command": round(fastest / median["sdtune check"], 3),
        "wanted": WANTED,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
