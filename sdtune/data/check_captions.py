"""What is wrong with captions: empty, repeated, without the trigger word, longer than the text encoder reads."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sdtune.data.check_findings import Finding, about


@dataclass(frozen=True)
class Reader:
    """How a text encoder reads captions.

    Attributes:
        count: captions -> tokens of each, without start and end.
        limit: tokens of a caption that are read.
        name: whose tokenizer counts.
        exact: whether it is the model's own.
    """

    count: Callable[[Sequence[str]], list[int]]
    limit: int
    name: str
    exact: bool = True


@dataclass(frozen=True)
class Captioned:
    """A picture's captions. `own`: they are its own, not one prompt for all. `learnt`: of an instance source."""

    name: str
    captions: tuple[str, ...]
    own: bool = True
    learnt: bool = True


MANY = 20  # captions of one picture; COCO has 5


def caption_findings(pictures: Sequence[Captioned], reader: Reader | None, trigger: str | None) -> list[Finding]:
    """Findings about captions that are there.

    Args:
        reader: counts their tokens; None where no text is read.
        trigger: word, or words, that each caption of an instance picture must hold; None to ask for none.
    """
    findings = _repeated(pictures)
    if reader is not None:
        findings += _cut(pictures, reader)
    if trigger is not None:
        findings += _without(pictures, trigger)
    return findings


def holds(caption: str, trigger: str) -> bool:
    """Whether the words of a trigger stand in a caption, next to each other and in any case."""
    words = r"\s+".join(map(re.escape, trigger.split()))
    return re.search(rf"(?<!\w){words}(?!\w)", caption, re.IGNORECASE) is not None


def _repeated(pictures: Sequence[Captioned]) -> list[Finding]:
    own = [each for each in pictures if each.own]
    often = Counter(caption for each in own for caption in set(each.captions))
    shared = [each.name for each in own if any(often[caption] > 1 for caption in each.captions)]
    twice = [each.name for each in own if len(set(each.captions)) < len(each.captions)]
    captions = sum(number > 1 for number in often.values())
    return about(
        "note",
        "repeated captions",
        shared,
        f"pictures whose caption stands under others too ({captions} captions)",
        "fine where they show the same; else tell them apart: what a caption leaves out is learnt as belonging to it",
    ) + about(
        "note",
        "many captions",
        [each.name for each in own if len(each.captions) > MANY],
        f"pictures with more than {MANY} captions",
        "fine if each is meant as one; of a .txt each line is a caption",
    ) + about("note", "caption twice", twice, "pictures with one caption twice", "take one of the rows away")


def _cut(pictures: Sequence[Captioned], reader: Reader) -> list[Finding]:
    captions = list(dict.fromkeys(caption for each in pictures for caption in each.captions))
    lost = {
        caption: tokens - reader.limit
        for caption, tokens in zip(captions, reader.count(captions), strict=True)
        if tokens > reader.limit
    }
    cut = [(each.name, max(lost.get(caption, 0) for caption in each.captions)) for each in pictures if each.captions]
    cut = sorted((each for each in cut if each[1]), key=lambda each: -each[1])
    about_ = "" if reader.exact else "about "
    more = next((size for size in (150, 225) if lost and max(lost.values()) + reader.limit <= size), 225)
    longer = f", or read more of them with images.max_tokens={more}" if reader.limit < 225 else ""
    return about(
        "warning",
        "captions cut",
        [f"{name} (loses {tokens})" for name, tokens in cut],
        f"pictures with a caption longer than the {reader.limit} tokens that are read: {about_}{sum(lost.values())} "
        f"tokens of {len(lost)} captions are lost",
        f"shorten them{longer}",
    )


def _without(pictures: Sequence[Captioned], trigger: str) -> list[Finding]:
    names = [
        each.name
        for each in pictures
        if each.learnt and each.captions and not all(holds(caption, trigger) for caption in each.captions)
    ]
    return about(
        "warning",
        "no trigger word",
        names,
        f"pictures with a caption that lacks the trigger word '{trigger}'",
        f"write it into them; sdtune caption does it with --trigger '{trigger}'",
    )
