"""The progress bar of a check."""

from collections.abc import Iterable, Iterator

from sdtune.data.check_scan import Look


def watch(looks: Iterator[Look], total: int) -> Iterable[Look]:
    """Passes the looks on under a bar on stderr, once they take longer than a second."""
    from tqdm import tqdm

    return tqdm(looks, total=total, desc="looking at the pictures", unit="picture", delay=1)
