"""The captions of a COCO file, by picture, and which of them are taken. Draws depend on seed and picture alone."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from data_tools.coco_json import Caption, CocoJson, Scalar
from data_tools.coco_pictures import Pictures, Rejected
from sdtune.errors import UsageError

TABLE = 1 << 20  # COCO's picture ids are below
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
    look_up = _look_up(texts)
    for part in source.objects("annotations", Caption, rejected.broken):
        ids = {caption.id for caption in part}
        new = [(caption.caption or "").strip() for caption in part]
        places = look_up([caption.image_id for caption in part])
        fine = len(ids) == len(part) and seen.isdisjoint(ids) and all(new) and not places.count(None)
        if fine and _is_text("".join(new)):  # so are nearly all parts; loops without conditions are twice as fast
            seen |= ids
            for place, text in zip(places, new, strict=True):
                place.append(text)
        else:
            _one_by_one(part, texts, seen, known, rejected)
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


def _look_up(texts: dict[Scalar, list[str]]) -> Callable[[list[Any]], list[Any]]:
    """`texts.get` of many ids; where all ids are whole numbers of COCO's size by a table, which takes half the time."""
    if not texts or not all(type(id_) is int and 0 <= id_ < TABLE for id_ in texts):
        return lambda ids: list(map(texts.get, ids))
    table: list[list[str] | None] = [None] * TABLE
    for id_, place in texts.items():
        table[id_] = place  # type: ignore[index]

    def by_table(ids: list[Any]) -> list[Any]:
        try:
            if min(ids, default=0) >= 0:
                return list(map(table.__getitem__, ids))
        except (TypeError, IndexError):
            pass  # some are no whole numbers, or too large
        return list(map(texts.get, ids))

    return by_table


def _one_by_one(
    part: list[Caption],
    texts: dict[Scalar, list[str]],
    seen: set[Scalar],
    known: Mapping[Scalar, object],
    rejected: Rejected,
) -> None:
    """Takes what is good of a part, and rejects the rest."""
    for caption in part:
        picture = caption.image_id
        text = (caption.caption or "").strip()
        what = {"id": caption.id, "image_id": picture}
        if caption.id in seen and caption.id is not None:
            rejected.add("duplicate caption id", **what, caption=text)
            continue
        seen.add(caption.id)
        if picture not in known:
            rejected.add("caption of an unknown picture", **what, caption=text)
        elif not text:
            rejected.add("empty caption", **what)
        elif not _is_text(text):
            rejected.add("caption is no text", **what, caption=text)
        elif picture in texts:
            texts[picture].append(text)


def _is_text(text: str) -> bool:
    """Whether it can be written: a json may hold half a surrogate pair, UTF-8 may not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
