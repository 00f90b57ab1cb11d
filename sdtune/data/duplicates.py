"""Which pictures are equal, and which look alike.

Two pictures look alike when their 64 bit perceptual hashes differ in few bits and their colours in little. Pairs are
not compared one by one: hashes that differ in at most t bits agree in at least one of t + 1 bands of bits (pigeonhole),
so only those that share a band are compared. 100,000 pictures take seconds.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from sdtune.data.check_scan import Look

ALIKE = 6  # bits that may differ
MOST_BITS = 16  # more bits would make bands of less than 4, which nearly all pictures share
TINT = 12.0  # of 255, mean difference of colours


def apart(look: Look, other: Look) -> str:
    """How two pictures differ, in words."""
    return "equal" if look.digest == other.digest else f"{(look.hash ^ other.hash).bit_count()} bits apart"


def groups_of_equal(keys: Sequence[Hashable]) -> list[list[int]]:
    """Positions of keys that stand more than once, a group for each, in order of the first."""
    places: dict[Hashable, list[int]] = defaultdict(list)
    for position, key in enumerate(keys):
        places[key].append(position)
    return [group for group in places.values() if len(group) > 1]


def groups_of_alike(looks: Sequence[Look], threshold: int = ALIKE) -> list[list[int]]:
    """Positions of pictures that look alike, the largest of each group first.

    Every member looks like the first of its group: a chain in which each looks like the next is not drawn together.

    Args:
        looks: without fault.
        threshold: bits of the hash that may differ, in [0, 16].
    """
    if not 0 <= threshold <= MOST_BITS:
        raise ValueError(f"the threshold is a number of bits from 0 to {MOST_BITS}, got {threshold}")
    if not looks:
        return []
    hashes, which = np.unique(np.array([look.hash for look in looks], dtype=np.uint64), return_inverse=True)
    tints = np.frombuffer(b"".join(look.tint for look in looks), dtype=np.uint8).reshape(len(looks), -1)  # (n, 48)
    order = sorted(range(len(looks)), key=lambda i: (-looks[i].width * looks[i].height, -looks[i].size, i))
    members: dict[int, list[int]] = defaultdict(list)
    for position in order:
        members[int(which[position])].append(position)
    near: dict[int, list[int]] = defaultdict(list)
    for left, right in close_pairs(hashes, threshold).tolist():
        near[left].append(right)
        near[right].append(left)

    groups, taken = [], np.zeros(len(looks), dtype=bool)
    for head in order:
        if taken[head]:
            continue
        own = int(which[head])
        members[own] = [each for each in members[own] if not taken[each]]
        others = [each for hash_ in (own, *near[own]) for each in members[hash_] if not taken[each] and each != head]
        if not others:
            continue
        apart = np.abs(tints[others].astype(np.int16) - tints[head]).mean(axis=1)
        group = [each for each, distance in zip(others, apart, strict=True) if distance <= TINT]
        if group:
            groups.append([head, *group])
            taken[[head, *group]] = True
    return groups


def close_pairs(hashes: NDArray[np.uint64], threshold: int) -> NDArray[np.int64]:
    """All pairs of distinct hashes that differ in at most `threshold` bits.

    Args:
        hashes: each one once, (n,).

    Returns:
        Positions (left, right) with left < right, each pair once, in order: (pairs, 2).
    """
    edges = np.linspace(0, 64, threshold + 2).astype(int)
    found = [np.empty((0, 2), dtype=np.int64)]
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        band = (hashes >> np.uint64(low)) & np.uint64(2 ** int(high - low) - 1)
        order = np.argsort(band, kind="stable")
        band, distance = band[order], 1
        starts = np.arange(len(hashes))
        while len(starts):  # compare each hash with the one `distance` further on, as long as the band is the same
            starts = starts[starts + distance < len(hashes)]
            starts = starts[band[starts] == band[starts + distance]]
            left, right = order[starts], order[starts + distance]
            alike = np.bitwise_count(hashes[left] ^ hashes[right]) <= threshold
            if alike.any():
                found.append(np.sort(np.stack([left[alike], right[alike]], axis=1), axis=1))
            distance += 1
    return np.unique(np.concatenate(found), axis=0)
