"""The emoji packages: fetched with npm, checked, and read as a list of concepts.

A concept is one entry of `emoji.json`; skin tones are variants of an entry and are left out. Nothing is typed in by
hand: names and categories are those of `emoji-datasource`.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64  # px, both styles
SUBJECTS = ("Food & Drink", "Animals & Nature")  # what the base learns to draw


@dataclass(frozen=True)
class Package:
    """One npm package: its version, the file that `npm pack` writes, and that file's SHA-256."""

    name: str
    version: str
    file: str
    sha256: str


FLUENT = Package(
    "@lobehub/fluent-emoji-3d", "1.1.0", "lobehub-fluent-emoji-3d-1.1.0.tgz",
    "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
)
NAMES = Package(
    "emoji-datasource", "16.0.0", "emoji-datasource-16.0.0.tgz",
    "2006725061dc0098daa832d65f854a7bec0740af2eb47cb5b23d89f7e2c849f9",
)
NOTO = Package(
    "emoji-datasource-google", "16.0.0", "emoji-datasource-google-16.0.0.tgz",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
)


@dataclass
class Concept:
    """One emoji: `code` is its code points ("1f34e"), `pictures` its style -> uint8 array (64, 64, 3) on white."""

    code: str
    name: str
    category: str
    subcategory: str
    pictures: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def both(self) -> bool:
        """Drawn in both styles."""
        return len(self.pictures) == 2


def fetch(package: Package, folder: Path) -> Path:
    """The package's .tgz in `folder`, downloaded with `npm pack` where it is missing. Exits if it is another file."""
    path = folder / package.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        wanted = f"{package.name}@{package.version}"
        try:
            subprocess.run(["npm", "pack", wanted, "--silent"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as fault:
            sys.exit(f"error: could not download {wanted} ({fault}); install npm, or put {package.file} into {folder} "
                     "yourself and type the command again")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        sys.exit(f"error: {path} is not the file this was made with: its SHA-256 is {digest}, expected "
                 f"{package.sha256}; delete it and type the command again")
    return path


def members(path: Path, folder: str) -> dict[str, bytes]:
    """The files directly in `folder` of a .tgz, as name without ending -> content."""
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            parent, _, name = member.name.removeprefix("package/").rpartition("/")
            if member.isfile() and parent == folder:
                found[name.rpartition(".")[0]] = archive.extractfile(member).read()  # type: ignore[union-attr]
    return found


def on_white(content: bytes) -> np.ndarray:
    """A picture file as uint8 (64, 64, 3): laid on white, then scaled down with LANCZOS if it is larger."""
    picture = Image.open(io.BytesIO(content)).convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    if picture.size != (SIZE, SIZE):
        picture = picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def tidy(name: str) -> str:
    """`RESCUE WORKER’S HELMET` -> `rescue worker's helmet`."""
    return " ".join(name.lower().replace("’", "'").split())


def read_concepts(packages: Path) -> list[Concept]:
    """Every concept that has a picture, in the order of `emoji.json`, with its pictures in the styles that have it."""
    entries = json.loads(members(fetch(NAMES, packages), "")["emoji"])
    pictures = {
        "fluent": members(fetch(FLUENT, packages), "assets"),
        "noto": members(fetch(NOTO, packages), "img/google/64"),
    }
    concepts = []
    for entry in entries:
        concept = Concept(entry["unified"].lower(), tidy(entry["name"]), entry["category"], entry["subcategory"])
        for style, files in pictures.items():
            if concept.code in files:
                concept.pictures[style] = on_white(files[concept.code])
        if concept.pictures:
            concepts.append(concept)
    return concepts
