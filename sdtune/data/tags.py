"""Captions that are lists of tags: `sks dog, on a beach, at night`."""

from math import factorial

from sdtune.diffusion import draws


def shuffle_tags(caption: str, keep: int, seed: int, purpose: str, number: int) -> str:
    """The tags of a caption in another order, so that no tag stands for its place.

    Args:
        caption: tags with commas between them.
        keep: how many of the first stay where they are, such as a trigger word.
        seed, purpose, number: of the draw, as `sdtune.diffusion.draws` has them.
    """
    tags = tags_of(caption)
    kept, rest = tags[:keep], tags[keep:]
    return ", ".join(kept + [rest[i] for i in draws.permutation(len(rest), seed, purpose, number)])


def orders(caption: str, keep: int) -> int:
    """How many captions `shuffle_tags` can make of one whose tags all differ."""
    return factorial(len(tags_of(caption)[keep:]))


def tags_of(caption: str) -> list[str]:
    """The tags of a caption, as they stand there."""
    return [tag.strip() for tag in caption.split(",") if tag.strip()]
