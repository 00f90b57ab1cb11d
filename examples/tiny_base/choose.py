"""Which concepts go where: held out, demo, style. Every choice follows from a seed or from the pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from catalogue import SIZE, Concept

PERSONS = {"1f468", "1f469", "1f9d1"}  # man, woman, adult
SIGNS = {"200d", "fe0f", "2640", "2642", "27a1"}  # joiners, female, male, facing right
TWIN = 0.005  # mean square difference, pixels in [0, 1]: the clock faces, a flag used by two countries
DEMO_CATEGORIES = ("Objects", "Travel & Places", "Activities")


def shuffled(codes: Sequence[str], seed: int) -> list[str]:
    """`codes` in an order that depends on the seed and on nothing else, on every machine."""
    return sorted(codes, key=lambda code: hashlib.sha256(f"{seed}:{code}".encode()).digest())


def square_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean square differences (N, M) of uint8 pictures (N, 64, 64, 3) and (M, 64, 64, 3), pixels in [0, 1]; exact."""
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (a, b))  # whole numbers: sums below 2^53
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T  # (N, M)
    return squares / (255**2 * SIZE * SIZE * 3)


def twin_groups(concepts: list[Concept]) -> list[list[str]]:
    """Codes of near twins together: the same emoji for man, woman and adult, or pictures that hardly differ."""
    parent = list(range(len(concepts)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, concept in enumerate(concepts):
        parts = ["person" if part in PERSONS else part for part in concept.code.split("-") if part not in SIGNS]
        parent[i] = root(first.setdefault("-".join(parts), i))
    for style in ("fluent", "noto"):
        rows = [i for i, concept in enumerate(concepts) if style in concept.pictures]
        if not rows:
            continue
        pictures = np.stack([concepts[i].pictures[style] for i in rows])
        for a, b in np.argwhere(np.triu(square_distances(pictures, pictures) < TWIN, k=1)):
            parent[root(rows[a])] = root(rows[b])
    groups: dict[int, list[str]] = {}
    for i, concept in enumerate(concepts):
        groups.setdefault(root(i), []).append(concept.code)
    return list(groups.values())


def choose_held_out(concepts: list[Concept], fraction: float, seed: int) -> set[str]:
    """Codes of whole twin groups, in seeded order, until they are `fraction` of the concepts."""
    groups = {group[0]: group for group in twin_groups(concepts)}
    chosen: set[str] = set()
    for code in shuffled(list(groups), seed):
        if len(chosen) + len(groups[code]) <= round(fraction * len(concepts)):
            chosen.update(groups[code])
    return chosen


def choose_demo(concepts: list[Concept], old: list[Concept], held_out: set[str], count: int) -> list[Concept]:
    """`count` things for the demo: held out of all training, simply named, one of a kind, unlike each other and `old`.

    Each choice is the candidate farthest, in pixels (mirror allowed), from everything chosen so far and from `old`;
    after it, no other of its subcategory is taken (so not three shoes).
    """
    candidates = [
        concept for concept in concepts
        if concept.code in held_out and concept.category in DEMO_CATEGORIES and "fluent" in concept.pictures
        and len(concept.name) <= 14 and concept.name.replace(" ", "").isalpha()
    ]
    pictures = np.stack([concept.pictures["fluent"] for concept in candidates])
    others = np.stack([concept.pictures["fluent"] for concept in old])

    def nearest(references: np.ndarray) -> np.ndarray:
        plain, mirrored = (square_distances(pictures, x) for x in (references, references[:, :, ::-1]))
        return np.minimum(plain, mirrored).min(1)  # (N,)

    distance, chosen = nearest(others), []
    for _ in range(count):
        best = int(distance.argmax())
        chosen.append(candidates[best])
        distance = np.minimum(distance, nearest(pictures[best : best + 1]))
        distance[[concept.subcategory == candidates[best].subcategory for concept in candidates]] = -1
    return sorted(chosen, key=lambda concept: concept.name)
