"""`sdtune coco` beside pycocotools, on a captions file of the size of captions_train2017.

    python benchmarks/coco.py [--runs 5] [--pictures 118287] [--captions 591753]

Ours is the whole command, from python's start to the finished folder, with `--images-mode reference`, so that no
picture is copied; theirs is `COCO(file)` alone, which reads the file and writes nothing. Each run is a process of its
own, in turns; one of each that is not counted warms the disk cache. Seconds are from start to end and of processor time
(the medians), memory is the most that a process held (ru_maxrss). Prints a table, then one JSON line. Unix only.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TEXT = (
    "a man woman dog cat sitting on the table with two people standing in front of large white bus street next to red "
    "umbrella holding baseball bat field playing tennis ball kitchen filled wooden cabinets and stove oven near window"
)
WORDS = TEXT.split()


def make_file(path: Path, pictures: int, captions: int) -> None:
    """Writes a captions file with COCO's keys and lengths; pictures and captions in no common order, as in COCO."""
    draw = random.Random(0)
    ids = draw.sample(range(1, max(581_930, 2 * pictures)), pictures)
    images = [
        {
            "license": draw.randint(1, 8),
            "file_name": f"{id_:012d}.jpg",
            "coco_url": f"http://images.cocodataset.org/train2017/{id_:012d}.jpg",
            "height": draw.choice((427, 480, 640)),
            "width": draw.choice((427, 480, 640)),
            "date_captured": "2013-11-14 16:28:13",
            "flickr_url": "http://farm7.staticflickr.com/6116/6255196340_da26cf2c9e_z.jpg",
            "id": id_,
        }
        for id_ in ids
    ]
    of_picture = (ids * (captions // pictures + 1))[:captions]
    draw.shuffle(of_picture)
    annotations = [
        {"image_id": id_, "id": number, "caption": f"A {' '.join(draw.choices(WORDS, k=draw.randint(7, 11)))}."}
        for number, id_ in enumerate(of_picture, start=37)
    ]
    path.write_text(json.dumps({"info": {}, "licenses": [], "images": images, "annotations": annotations}))


def measure(command: list[str]) -> tuple[float, float, float]:
    """Runs a command; seconds from start to end, seconds of processor time, and MB at its peak."""
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            assert process.stderr is not None
            raise SystemExit(f"{' '.join(command)} failed: {process.stderr.read().decode()}")
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 1e6


def main(arguments: list[str] | None = None) -> dict:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--pictures", type=int, default=118_287)
    parser.add_argument("--captions", type=int, default=591_753)
    settings = parser.parse_args(arguments)
    taken: dict[str, list[tuple[float, float, float]]] = {"sdtune coco": [], "pycocotools COCO()": []}
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "captions.json"
        # In a process of its own: what a parent holds when it starts a child counts as the child's peak.
        maker = multiprocessing.get_context("fork").Process(
            target=make_file, args=(file, settings.pictures, settings.captions)
        )
        maker.start()
        maker.join()
        size = file.stat().st_size
        theirs = [sys.executable, "-c", "import sys; from pycocotools.coco import COCO; COCO(sys.argv[1])", str(file)]
        for run in range(settings.runs + 1):
            options = ["--captions", str(file), "--images-mode", "reference", "--out", str(Path(place) / f"out-{run}")]
            ours = [sys.executable, "-m", "sdtune", "coco", *options]
            for name, command in zip(taken, (ours, theirs), strict=True):
                measured = measure(command)
                if run:
                    taken[name].append(measured)
    result: dict = {"pictures": settings.pictures, "captions": settings.captions, "bytes": size, "runs": settings.runs}
    print(f"{settings.captions:,} captions, {size / 1e6:.0f} MB  {'seconds':>9} {'processor':>10} {'peak MB':>9}")
    for name, runs in taken.items():
        seconds, processor = (statistics.median(run[column] for run in runs) for column in (0, 1))
        memory = max(run[2] for run in runs)
        result[name] = {"seconds": round(seconds, 2), "processor": round(processor, 2), "peak_mb": round(memory)}
        print(f"{name:<25}  {seconds:>9.2f} {processor:>10.2f} {memory:>9.0f}")
    mine, other = (result[name] for name in taken)
    result["share"] = {key: round(mine[key] / other[key], 2) for key in mine}
    print(f"{'ours / theirs':<25}  " + "{seconds:>9} {processor:>10} {peak_mb:>9}".format(**result["share"]))
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
