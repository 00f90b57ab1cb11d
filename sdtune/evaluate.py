"""Does a model draw the thing that was asked for? Pictures compared with the shipped thumbnails.

A sample counts as right when, among all reference pictures, the nearest one is the picture of its own prompt.
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

ASSETS = Path(__file__).parent / "assets"
STYLES = ("fluent", "noto")
CHUNK = 64  # samples compared at a time: 64 x 12,288 float64 are 6 MB

Pictures = NDArray[np.uint8]


def load_thumbnails(style: str = "fluent") -> tuple[list[str], Pictures]:
    """The shipped pictures of the 285 things that the embedded base draws.

    Args:
        style: "fluent" (what the base learned) or "noto" (the same things, in the same order, in another style).

    Returns:
        The names (N) and the pictures, uint8 (N, 64, 64, 3), in RGB on white.

    Raises:
        ValueError: another style.
    """
    if style not in STYLES:
        raise ValueError(f"thumbnails exist in the styles {' and '.join(STYLES)}, got {style!r}")
    index = json.loads((ASSETS / "thumbnails" / "names.json").read_text(encoding="utf-8"))
    names = [concept["name"] for concept in index["concepts"]]
    with Image.open(ASSETS / "thumbnails" / f"{style}.webp") as picture:
        sheet = np.asarray(picture.convert("RGB"))  # (rows * 64, columns * 64, 3)
    size, columns = index["size"], index["columns"]
    tiles = sheet.reshape(-1, size, columns, size, 3).swapaxes(1, 2)  # (rows, columns, 64, 64, 3)
    return names, tiles.reshape(-1, size, size, 3)[: len(names)]


def load_demo() -> tuple[list[str], Pictures]:
    """The 16 demo pictures, of things that the embedded base never saw.

    Returns:
        The names (16) and the pictures, uint8 (16, 64, 64, 3), in RGB on white.
    """
    folder = ASSETS / "demo"
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    pictures = [np.asarray(Image.open(folder / row["file_name"]).convert("RGB")) for row in rows]
    return [row["text"] for row in rows], np.stack(pictures)


def square_distances(samples: Pictures, references: Pictures, mirror: bool = True) -> NDArray[np.float64]:
    """Mean square difference of each sample to each reference.

    Args:
        samples: uint8 (N, H, W, 3). references: uint8 (M, H, W, 3).
        mirror: take the smaller of the differences to a reference and to its mirror image.

    Returns:
        (N, M), for pixels in [0, 1]; exact, so that it is the same on every machine.

    Raises:
        ValueError: the pictures are not uint8, or not of one size.
    """
    for name, pictures in (("samples", samples), ("references", references)):
        if pictures.dtype != np.uint8 or pictures.ndim != 4:
            raise ValueError(f"{name} must be uint8 of shape (N, H, W, 3), got {pictures.dtype} {pictures.shape}")
    if samples.shape[1:] != references.shape[1:]:
        raise ValueError(f"samples are {samples.shape[1:]}, references {references.shape[1:]}; resize one of them")
    sides = [references, references[:, :, ::-1]] if mirror else [references]
    flat = [side.reshape(len(side), -1).astype(np.float64) for side in sides]  # (M, D) each
    norms = (flat[0] ** 2).sum(1)  # (M,): whole numbers below 2^53, as are all sums here
    distances = np.empty((len(samples), len(references)))
    for start in range(0, len(samples), CHUNK):
        x = samples[start : start + CHUNK]
        x = x.reshape(len(x), -1).astype(np.float64)  # (n, D)
        products = np.max([x @ side.T for side in flat], axis=0)  # (n, M): the larger product is the smaller distance
        distances[start : start + CHUNK] = (x**2).sum(1)[:, None] + norms[None] - 2 * products
    return distances / (255**2 * flat[0].shape[1])


def nearest(samples: Pictures, references: Pictures, mirror: bool = True) -> NDArray[np.intp]:
    """For each sample, which reference is the nearest in mean square difference of the pixels: (N,).

    Args:
        samples: uint8 (N, H, W, 3). references: uint8 (M, H, W, 3).
        mirror: a reference may be mirrored.
    """
    return square_distances(samples, references, mirror).argmin(axis=1)


def share(found: NDArray[np.intp], wanted: NDArray[np.intp] | list[int]) -> float:
    """The share of samples for which the reference found is the one asked for, in [0, 1].

    Args:
        found: what `nearest` returned, (N,). wanted: the number of the reference asked for, (N,).

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    if len(found) != len(wanted) or len(found) == 0:
        raise ValueError(f"got {len(found)} samples for {len(wanted)} wanted references; expected one each, at least 1")
    return float(np.mean(np.asarray(found) == np.asarray(wanted)))
