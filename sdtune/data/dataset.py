"""Which pictures, crops and captions a run sees, and in which order.

Sample `number` of a run is a pure function of the number: `training_set[number]` is the same picture, crop, flip and
caption in any process, worker and order of asking. Which numbers a step takes is `sample_numbers`; a run goes on after
a stop by asking for the next numbers. Which picture a number stands for is said in `order.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, product
from typing import Any

from torch import Tensor
from torch.utils.data import get_worker_info

from sdtune.data import images
from sdtune.data.buckets import Buckets, Size
from sdtune.data.examples import Example, Known, nothing_known, pixel_key, read_mask, read_resized
from sdtune.data.images import Crop
from sdtune.data.order import InBuckets, Shuffled
from sdtune.data.picture import Picture
from sdtune.data.sources import Source
from sdtune.data.tags import orders, shuffle_tags, tags_of
from sdtune.diffusion import draws
from sdtune.errors import DataError

MEMORY = 512 * 2**20  # bytes of resized pictures that a training set keeps, over all its workers
VARIANTS = 2**14  # captions of shuffled tags that are known before a run: 1.9 GB of embeddings of Stable Diffusion 1.x


class TrainingSet:
    """The samples of a run, without end: an epoch after the other, each in its own order.

    A sample is one instance picture, or a pair of an instance and a class picture when there are class sources.

    Args:
        sources: of the roles "instance" and "class".
        height, width: of the pictures, in pixels, where there are no buckets.
        buckets: the sizes that pictures may have; of `survey`ed sources. A class picture has that of its instance.
        together: samples of an optimizer step, of all processes and micro-batches; with buckets they have one size.
        crop: "center" or "random".
        flip: mirror half of the samples.
        caption_dropout: share of captions replaced by "", in [0, 1].
        tag_shuffle: captions are lists of tags, in a new order each time.
        keep_tags: how many of the first tags stay where they are.
        seed: of the run.
        background: what shows through transparent pictures.
        masks: read them, where pictures have one.
        known: which latents need no pixels.

    Raises:
        DataError: there are no instance pictures, or class sources hold none.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        height: int,
        width: int,
        buckets: Buckets | None = None,
        together: int = 1,
        crop: Crop = "center",
        flip: bool = False,
        caption_dropout: float = 0.0,
        tag_shuffle: bool = False,
        keep_tags: int = 0,
        seed: int = 0,
        background: str = "white",
        masks: bool = False,
        known: Known = nothing_known,
    ) -> None:
        self.crop, self.flip, self.tag_shuffle, self.keep_tags = crop, flip, tag_shuffle, keep_tags
        self.known, self.together = known, together
        self.caption_dropout, self.seed, self.background, self.masks = caption_dropout, seed, background, masks
        self._instances = _rows(sources, "instance")
        self._classes = _rows(sources, "class")
        self._kept: dict[tuple[str, str, str, Size], Any] = {}
        self._bytes_kept = 0
        if not self._instances:
            raise DataError("there are no instance pictures to learn; add a source with pictures to data.")
        if not self._classes and any(source.role == "class" for source in sources):
            raise DataError("the class sources hold no pictures; let them be drawn with: data.N.generate=200")
        self._frames = [frame_of(picture, height, width, buckets) for picture, _ in self._instances]
        self._order: InBuckets | Shuffled = Shuffled(len(self._instances), seed, "instance order")
        if buckets is not None:
            self._order = InBuckets(self._frames, together, seed)
        self._class_order = Shuffled(len(self._classes), seed, "class order")

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
        return [self._example(*shown, number) for shown in self._shown(number)]

    def views(self) -> Iterator[tuple[Picture, Size, bool]]:
        """Each picture with each size, and mirrored or not, that samples may show it in; in centre crops."""
        flips = (False, True) if self.flip else (False,)
        instances = dict.fromkeys((row[0], frame) for row, frame in zip(self._instances, self._frames, strict=True))
        classes = product(dict.fromkeys(picture for picture, _ in self._classes), dict.fromkeys(self._frames))
        for (picture, frame), flip in product(chain(instances, classes), flips):
            yield picture, frame, flip

    def captions(self, steps: int) -> list[str]:
        """The captions that samples may have; of shuffled tags the orders of that many steps, VARIANTS at most."""
        pictures = [picture for picture, _ in (*self._instances, *self._classes)]
        found = dict.fromkeys(caption for picture in pictures for caption in picture.captions)
        if self.tag_shuffle:
            found = dict.fromkeys(", ".join(tags_of(each)) for each in found if orders(each, self.keep_tags) == 1)
            most = len(found) + VARIANTS
            for number in range(steps * self.together):
                if len(found) >= most:
                    break
                found |= {self._caption(picture, role, number): None for picture, _, _, role in self._shown(number)}
        return list(found | {"": None}) if self.caption_dropout > 0 else list(found)

    def _shown(self, number: int) -> Iterator[tuple[Picture, float, Size, str]]:
        """Picture, weight, frame and role of each example of a sample."""
        row = self._order[number]
        frame = self._frames[row]
        yield *self._instances[row], frame, "instance"
        if self._classes:
            yield *self._classes[self._class_order[number]], frame, "class"

    def _caption(self, picture: Picture, role: str, number: int) -> str:
        if draws.uniform(self.seed, f"{role} dropout", number) < self.caption_dropout:
            return ""
        caption = picture.captions[draws.integer(len(picture.captions), self.seed, f"{role} caption", number)]
        return shuffle_tags(caption, self.keep_tags, self.seed, f"{role} tags", number) if self.tag_shuffle else caption

    def _example(self, picture: Picture, weight: float, frame: Size, role: str, number: int) -> Example:
        seed, (height, width) = self.seed, frame
        flip = self.flip and draws.uniform(seed, f"{role} flip", number) < 0.5
        view = self.known(picture, frame, flip)
        pixels, original = (None, view.original) if view else self._resize(picture, frame)  # (3, h, w)
        resized = images.cover_size(*original, height, width)
        offset = (draws.uniform(seed, f"{role} across", number), draws.uniform(seed, f"{role} down", number))
        top, left = images.place(resized, height, width, self.crop, offset)
        mask = self._mask(picture, resized) if self.masks else None
        seen_left = resized[1] - width - left if flip else left  # in a mirrored picture, counted from its left
        return Example(
            pixels=None if pixels is None else images.cut(pixels, height, width, top, left, flip),
            caption=self._caption(picture, role, number),
            weight=weight,
            instance=role == "instance",
            number=number,
            key=view.key if view else pixel_key(picture, height, width, top, left, flip),
            size=(*original, top, seen_left),
            frame=frame,
            mask=None if mask is None else images.cut(mask, height, width, top, left, flip),
        )

    def _resize(self, picture: Picture, frame: Size) -> tuple[Tensor, Size]:
        """As `read_resized`."""
        key = ("picture", picture.origin, picture.name, frame)
        if key not in self._kept:
            resized = read_resized(picture, *frame, self.background)
            self._keep(key, resized, resized[0].nbytes)
            return resized
        return self._kept[key]

    def _mask(self, picture: Picture, resized: Size) -> Tensor | None:
        """As `read_mask`."""
        key = ("mask", picture.origin, picture.name, resized)
        if key not in self._kept:
            mask = read_mask(picture, *resized)
            self._keep(key, mask, 0 if mask is None else mask.nbytes)
            return mask
        return self._kept[key]

    def _keep(self, key: tuple[str, str, str, Size], value: Any, size: int) -> None:
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


def evenly(sources: Sequence[Source], count: int) -> tuple[Picture, ...]:
    """At most `count` pictures, evenly spread over the sources."""
    pictures = [picture for source in sources for picture in source.pictures]
    count = min(count, len(pictures))
    return tuple(pictures[index * len(pictures) // count] for index in range(count))


def validation_examples(
    sources: Sequence[Source],
    height: int,
    width: int,
    count: int,
    background: str = "white",
    masks: bool = False,
    buckets: Buckets | None = None,
    known: Known = nothing_known,
) -> list[Example]:
    """At most `count` pictures, `evenly` chosen: centre crop, no flip, first caption, no dropout.

    With `buckets`, each has its own size.

    Raises:
        DataError: a picture cannot be read.
    """
    examples = []
    for number, picture in enumerate(evenly(sources, count)):
        frame = frame_of(picture, height, width, buckets)
        view = known(picture, frame, False)
        pixels, original = (None, view.original) if view else read_resized(picture, *frame, background)  # (3, h, w)
        resized = images.cover_size(*original, *frame)
        top, left = images.place(resized, *frame, "center", (0.5, 0.5))
        mask = read_mask(picture, *resized) if masks else None
        examples.append(
            Example(
                pixels=None if pixels is None else images.cut(pixels, *frame, top, left, flip=False),
                caption=picture.captions[0],
                weight=picture.weight,
                instance=True,
                number=number,
                key=view.key if view else pixel_key(picture, *frame, top, left, flip=False),
                size=(*original, top, left),
                frame=frame,
                mask=None if mask is None else images.cut(mask, *frame, top, left, flip=False),
            )
        )
    return examples


def frame_of(picture: Picture, height: int, width: int, buckets: Buckets | None) -> Size:
    """Height and width that a picture has in training. Raises ValueError where buckets ask for a size not yet known."""
    if buckets is None:
        return height, width
    if picture.size is None:
        raise ValueError(f"the size of {picture.name} is not known; pass the sources through survey() first")
    return buckets.size_for(picture.size)


def _rows(sources: Sequence[Source], role: str) -> list[tuple[Picture, float]]:
    """Pictures and weights of an epoch, repeats counted."""
    return [
        (picture, source.weight * picture.weight)
        for source in sources
        if source.role == role
        for picture in source.pictures
        for _ in range(source.repeats)
    ]
