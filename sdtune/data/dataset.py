"""Which pictures, crops and captions a run sees, and in which order.

Sample `number` of a run is a pure function of the number: `training_set[number]` is the same picture, crop, flip and
caption in any process, worker and order of asking. Which numbers a step takes is `sample_numbers`; a run goes on after
a stop by asking for the next numbers.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.utils.data import get_worker_info

from sdtune.data import images
from sdtune.data.examples import Example, pixel_key, read_mask, read_resized
from sdtune.data.images import Crop
from sdtune.data.picture import Picture
from sdtune.data.sources import Source
from sdtune.diffusion import draws
from sdtune.errors import DataError

MEMORY = 512 * 2**20  # bytes of resized pictures that a training set keeps, over all its workers


class TrainingSet:
    """The samples of a run, without end: an epoch after the other, each in its own order.

    A sample is one instance picture, or a pair of an instance and a class picture when there are class sources.

    Args:
        sources: of the roles "instance" and "class".
        height, width: of the pictures, in pixels.
        crop: "center" or "random".
        flip: mirror half of the samples.
        caption_dropout: share of captions replaced by "", in [0, 1].
        seed: of the run.
        background: what shows through transparent pictures.
        masks: read them, where pictures have one.

    Raises:
        DataError: there are no instance pictures, or class sources hold none.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        height: int,
        width: int,
        crop: Crop = "center",
        flip: bool = False,
        caption_dropout: float = 0.0,
        seed: int = 0,
        background: str = "white",
        masks: bool = False,
    ) -> None:
        self.height, self.width, self.crop, self.flip = height, width, crop, flip
        self.caption_dropout, self.seed, self.background, self.masks = caption_dropout, seed, background, masks
        self._instances = _rows(sources, "instance")
        self._classes = _rows(sources, "class")
        self._kept: dict[tuple[str, str, str], Any] = {}
        self._bytes_kept = 0
        if not self._instances:
            raise DataError("there are no instance pictures to learn; add a source with pictures to data.")
        if not self._classes and any(source.role == "class" for source in sources):
            raise DataError("the class sources hold no pictures; let them be drawn with: data.N.generate=200")

    def __len__(self) -> int:
        """Samples of an epoch: the instance pictures, repeats counted."""
        return len(self._instances)

    def __getitem__(self, number: int) -> list[Example]:
        """Sample `number` of the run, any number >= 0: [instance] or [instance, class].

        Raises:
            DataError: its picture cannot be read.
        """
        if number < 0:
            raise IndexError(f"samples are numbered from 0, got {number}")
        examples = [self._example(self._instances, number, "instance")]
        if self._classes:
            examples.append(self._example(self._classes, number, "class"))
        return examples

    def _example(self, rows: list[tuple[Picture, float]], number: int, role: str) -> Example:
        epoch, position = divmod(number, len(rows))
        picture, weight = rows[_order(len(rows), self.seed, f"{role} order", epoch)[position]]
        seed, height, width = self.seed, self.height, self.width

        pixels, original = self._resize(picture)  # (3, h, w)
        offset = (draws.uniform(seed, f"{role} across", number), draws.uniform(seed, f"{role} down", number))
        top, left = images.place(pixels, height, width, self.crop, offset)
        flip = self.flip and draws.uniform(seed, f"{role} flip", number) < 0.5
        caption = picture.captions[draws.integer(len(picture.captions), seed, f"{role} caption", number)]
        if draws.uniform(seed, f"{role} dropout", number) < self.caption_dropout:
            caption = ""
        mask = self._mask(picture, pixels.shape[1], pixels.shape[2]) if self.masks else None
        seen_left = pixels.shape[2] - width - left if flip else left  # in a mirrored picture, counted from its left
        return Example(
            pixels=images.cut(pixels, height, width, top, left, flip),
            caption=caption,
            weight=weight,
            instance=role == "instance",
            number=number,
            key=pixel_key(picture, height, width, top, left, flip),
            size=(*original, top, seen_left),
            frame=(height, width),
            mask=None if mask is None else images.cut(mask, height, width, top, left, flip),
        )

    def _resize(self, picture: Picture) -> tuple[Tensor, tuple[int, int]]:
        """As `read_resized`."""
        key = ("picture", picture.origin, picture.name)
        if key not in self._kept:
            resized = read_resized(picture, self.height, self.width, self.background)
            self._keep(key, resized, resized[0].nbytes)
            return resized
        return self._kept[key]

    def _mask(self, picture: Picture, height: int, width: int) -> Tensor | None:
        """As `read_mask`."""
        key = ("mask", picture.origin, picture.name)
        if key not in self._kept:
            mask = read_mask(picture, height, width)
            self._keep(key, mask, 0 if mask is None else mask.nbytes)
            return mask
        return self._kept[key]

    def _keep(self, key: tuple[str, str, str], value: Any, size: int) -> None:
        """Remember what was read, while there is room, so that small sets are decoded once."""
        worker = get_worker_info()
        if self._bytes_kept + size <= MEMORY // (worker.num_workers if worker else 1):
            self._kept[key] = value
            self._bytes_kept += size


def held_out(sources: Sequence[Source], fraction: float, seed: int) -> tuple[list[Source], Source]:
    """Sets pictures aside that are measured and never learnt.

    Each instance picture is drawn by its name, so that it stays on its side when others come or go. When
    `fraction` > 0, at least one picture is held out, but each source keeps one (so a single picture is learnt).

    Args:
        sources: of any role.
        fraction: share of the instance pictures to hold out, in [0, 1).
        seed: of the run.

    Returns:
        The sources left for training (instance and class), and one source of role "validation": the pictures held
        out and those of the validation sources. It may be empty.
    """
    training, aside = [], [picture for s in sources if s.role == "validation" for picture in s.pictures]
    instances = [picture for s in sources if s.role == "instance" for picture in s.pictures]
    lots = {picture.name: draws.uniform(seed, f"held out: {picture.name}") for picture in instances}
    limit = max(fraction, min(lots.values())) if fraction > 0 and lots else 0.0  # at least one
    for source in sources:
        if source.role == "instance" and fraction > 0 and source.pictures:
            last = max(source.pictures, key=lambda picture: lots[picture.name])
            kept = tuple(p for p in source.pictures if lots[p.name] > limit or p.name == last.name)
            names = {picture.name for picture in kept}
            aside += [picture for picture in source.pictures if picture.name not in names]
            source = replace(source, pictures=kept)
        if source.role != "validation":
            training.append(source)
    return training, Source(tuple(aside), role="validation")


def validation_examples(
    sources: Sequence[Source],
    height: int,
    width: int,
    count: int,
    background: str = "white",
    masks: bool = False,
) -> list[Example]:
    """At most `count` pictures, evenly spread over the sources: centre crop, no flip, first caption, no dropout.

    Raises:
        DataError: a picture cannot be read.
    """
    pictures = [picture for source in sources for picture in source.pictures]
    count = min(count, len(pictures))
    chosen = [pictures[index * len(pictures) // count] for index in range(count)]
    examples = []
    for number, picture in enumerate(chosen):
        pixels, original = read_resized(picture, height, width, background)  # (3, h, w)
        top, left = images.place(pixels, height, width, "center", (0.5, 0.5))
        mask = read_mask(picture, pixels.shape[1], pixels.shape[2]) if masks else None
        examples.append(
            Example(
                pixels=images.cut(pixels, height, width, top, left, flip=False),
                caption=picture.captions[0],
                weight=picture.weight,
                instance=True,
                number=number,
                key=pixel_key(picture, height, width, top, left, flip=False),
                size=(*original, top, left),
                frame=(height, width),
                mask=None if mask is None else images.cut(mask, height, width, top, left, flip=False),
            )
        )
    return examples


def _rows(sources: Sequence[Source], role: str) -> list[tuple[Picture, float]]:
    """Pictures and weights of an epoch, repeats counted."""
    return [
        (picture, source.weight * picture.weight)
        for source in sources
        if source.role == role
        for picture in source.pictures
        for _ in range(source.repeats)
    ]


@lru_cache(maxsize=8)
def _order(n: int, seed: int, purpose: str, epoch: int) -> list[int]:
    return draws.permutation(n, seed, purpose, epoch)
