"""Groups of equal and of similar pictures, found without comparing all with all."""

import time

import numpy as np
import pytest

from sdtune.data.check_scan import Look
from sdtune.data.duplicates import close_pairs, groups_of_alike, groups_of_equal


def look(hash_: int, side: int = 10, tint: int = 0) -> Look:
    return Look("", side, side, "RGB", "PNG", 1, b"", hash_, bytes([tint] * 48))


def brute(hashes: np.ndarray, threshold: int) -> set[tuple[int, int]]:
    differ = np.bitwise_count(hashes[:, None] ^ hashes[None])  # (n, n)
    left, right = np.nonzero(differ <= threshold)
    return {(int(i), int(j)) for i, j in zip(left, right, strict=True) if i < j}


@pytest.mark.parametrize("threshold", [0, 1, 3, 6, 10, 16])
def test_pairs_are_those_of_comparing_all_with_all(threshold):
    rng = np.random.default_rng(threshold)
    base = rng.integers(0, 2**63, 150, dtype=np.uint64)
    flips = [np.bitwise_xor.reduce(np.uint64(1) << rng.choice(64, n, False).astype(np.uint64)) for n in range(1, 18)]
    hashes = np.unique(np.concatenate([base, *(base[:20] ^ flip for flip in flips)]))
    found = close_pairs(hashes, threshold)
    assert {(left, right) for left, right in found.tolist()} == brute(hashes, threshold)
    assert len(found) == len(brute(hashes, threshold))


def test_the_largest_is_first_and_chains_are_not_drawn_together():
    chain = [0, 0b111111, 0b111111_111111]  # each 6 bits from the next, the ends 12
    assert groups_of_alike([look(chain[0], 30), look(chain[1], 20), look(chain[2], 10)]) == [[0, 1]]
    assert groups_of_alike([look(chain[0], 10), look(chain[1], 20), look(chain[2], 10)]) == [[1, 0, 2]]
    assert groups_of_alike([look(1, 5), look(1, 9), look(1, 7)]) == [[1, 2, 0]]


def test_other_colours_are_another_picture():
    assert groups_of_alike([look(7, tint=10), look(7, tint=200), look(7, tint=12)]) == [[0, 2]]


def test_no_pictures_and_a_threshold_out_of_range():
    assert groups_of_alike([]) == []
    with pytest.raises(ValueError, match="from 0 to 16, got 17"):
        groups_of_alike([look(1)], 17)


def test_equal_keys():
    assert groups_of_equal([b"a", b"b", b"a", b"c", b"b", b"a"]) == [[0, 2, 5], [1, 4]]


def test_100_000_pictures_are_not_compared_one_by_one():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 100_000, dtype=np.uint64)
    hashes[:5000] = hashes[5000:10_000] ^ np.uint64(0b1001)
    hashes[20_000:30_000] = 5  # blank ones
    looks = [look(int(each)) for each in hashes]
    start = time.process_time()
    groups = groups_of_alike(looks)
    assert time.process_time() - start < 20  # comparing all takes minutes
    assert len(groups) >= 5001 and max(map(len, groups)) >= 10_000
