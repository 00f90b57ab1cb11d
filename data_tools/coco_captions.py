"""The captions of a COCO file, by picture, and which of them are taken. Draws depend on seed and picture alone."""

import hashlib
import re
from collections.abc import Mapping

from data_tools.coco_json import Caption, CocoJson, Scalar
from data_tools.coco_pictures import Pictures, Rejected
from sdtune.errors import UsageError

RULES = "all, first, longest, join or random:SEED, such as random:0"


def parse_rule(rule: str) -> tuple[str, int]:
    """`all`, `first`, `longest`, `join` or `random:SEED` -> its name and seed. Raises UsageError."""
    name, colon, seed = rule.partition(":")
    if name == "random" and seed.isdecimal():
        return name, int(seed)
    if name in ("all", "first", "longest", "join") and not colon:
        return name, 0
    raise UsageError(f"--captions-per-image: got {rule!r}; expected {RULES}")


def draw(seed: int, purpose: str, picture: Scalar) -> float:
    """A number in [0, 1) that looks random and depends on its arguments alone."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{picture}".encode("utf-8", "replace"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)  # as many bits as a float holds


def read_captions(
    source: CocoJson, pictures: Pictures, known: Mapping[Scalar, object], rejected: Rejected
) -> dict[Scalar, list[str]]:
    """The captions of `pictures` in the file's order, without the spaces around them; for each id a list.

    Args:
        known: the ids of all pictures of the json. A caption of another one is rejected; one of a picture that is
            `known` but not in `pictures` is passed over.
    """
    texts: dict[Scalar, list[str]] = {}
    for id_, picture in pictures.items():
        texts[id_] = texts.get(picture.id, [])
    seen: set[Scalar] = set()
    for part in source.objects("annotations", Caption, rejected.broken):
        ids = {caption.id for caption in part}
        if len(ids) < len(part) or not seen.isdisjoint(ids):
            part = [caption for caption in part if _is_new(caption, seen, rejected)]
        else:
            seen |= ids
        for caption in part:
            picture_id = caption.image_id
            text = (caption.caption or "").strip()
            if picture_id in texts and text and text.isascii():  # nearly all of them
                texts[picture_id].append(text)
            elif picture_id not in known:
                rejected.add("caption of an unknown picture", id=caption.id, image_id=picture_id, caption=text)
            elif not text:
                rejected.add("empty caption", id=caption.id, image_id=picture_id)
            elif not _is_text(text):
                rejected.add("caption is no text", id=caption.id, image_id=picture_id, caption=text)
            elif picture_id in texts:
                texts[picture_id].append(text)
    return texts


def choose(texts: list[str], rule: str, seed: int, picture: Scalar) -> list[str]:
    """Which of a picture's captions are taken, at least one of at least one. Arguments as from `parse_rule`."""
    if rule == "all" or len(texts) < 2:
        return texts
    if rule == "first":
        return texts[:1]
    if rule == "longest":
        return [max(texts, key=len)]
    if rule == "random":
        return [texts[int(draw(seed, "caption", picture) * len(texts))]]
    return [" ".join(text if text[-1] in ".!?" else f"{text}." for text in texts)]


def _is_new(caption: Caption, seen: set[Scalar], rejected: Rejected) -> bool:
    if caption.id in seen and caption.id is not None:
        rejected.add("duplicate caption id", id=caption.id, image_id=caption.image_id, caption=caption.caption)
        return False
    seen.add(caption.id)
    return True


def _is_text(text: str) -> bool:
    return not re.search(r"[\ud800-\udfff]", text)
