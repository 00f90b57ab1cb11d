"""Everything that can be wrong with data sets, found before any training.

    report = check([Entry(partial(load_source, path="photos"), path=Path("photos"))], height=512, width=512)
    report.fatal, [finding.what for finding in report.findings]

It works on what `load_source` answers, so a new kind of source is checked as soon as it can be loaded.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from sdtune.data.captions import PROMPT, setting
from sdtune.data.check_captions import Captioned, Reader, caption_findings
from sdtune.data.check_entries import Entry
from sdtune.data.check_findings import Finding, about, is_fatal, worst_first
from sdtune.data.check_masks import Masked, mask_findings, mask_of
from sdtune.data.check_reading import Reading, read
from sdtune.data.check_scan import Look, looking
from sdtune.data.check_sizes import Frame, size_findings
from sdtune.data.duplicates import ALIKE, groups_of_alike, groups_of_equal
from sdtune.data.metadata import is_picture, list_files
from sdtune.data.picture import Picture

Identity = tuple[str, str]  # origin and name


@dataclass(frozen=True)
class Seen:
    """A picture, the entry it is from, and what it turned out to be."""

    reading: Reading
    picture: Picture
    look: Look

    @property
    def name(self) -> str:
        """As a report has it: with the entry where there are several."""
        return _named(self.reading, self.picture.name)

    @property
    def identity(self) -> Identity:
        """Tells it from every other picture."""
        return self.picture.origin, self.picture.name


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        readings: what each data set holds. pictures: all that were looked at.
        frame: the size that training cuts pictures to.
        findings: the worst first.
        equal, alike: groups of pictures, numbers in `pictures`; `alike` has one of each equal ones.
    """

    readings: Sequence[Reading]
    pictures: Sequence[Seen]
    frame: Frame
    findings: Sequence[Finding]
    equal: Sequence[Sequence[int]]
    alike: Sequence[Sequence[int]]

    @property
    def fatal(self) -> bool:
        """Whether training would fail."""
        return is_fatal(self.findings)

    @property
    def good(self) -> list[Look]:
        """The looks of all pictures that can be read."""
        return [each.look for each in self.pictures if not each.look.fault]

    @property
    def learnt(self) -> list[Look]:
        """The looks of all instance pictures that can be read."""
        return [e.look for e in self.pictures if not e.look.fault and e.reading.entry.role == "instance"]

    @property
    def captions(self) -> int:
        """How many there are."""
        return sum(len(each.picture.captions) for each in self.pictures)


def check(
    entries: Sequence[Entry],
    frame: Frame,
    *,
    reader: Callable[[], Reader] | None = None,
    trigger: str | None = None,
    held_out: Callable[[Sequence[Reading]], set[Identity]] | None = None,
    threshold: int = ALIKE,
    masks: bool = False,
    watch: Callable[[Iterator[Look], int], Iterable[Look]] = lambda looks, total: looks,
) -> Report:
    """Reads, opens and compares all pictures of some data sets.

    Args:
        entries: what a run takes its pictures from.
        frame: size of the training pictures.
        reader: how captions are read; asked for when they are. None where no text is read.
        trigger: what each caption of an instance picture must hold.
        held_out: pictures of instance sources that the run will set aside for validation.
        threshold: bits of the hash in which pictures that look alike may differ.
        masks: whether training uses the masks of pictures.
        watch: passes the looks on, of so many in all, and may show how far they are.
    """
    with looking(_files(entries)) as look_at_all:  # the captions are read while the other processes look
        readings = [read(entry) for entry in entries]
        pairs = [(reading, picture) for reading in readings for picture in reading.pictures]
        drawn = [mask_of(picture) for _, picture in pairs if picture.mask is not None]
        unique = {(picture.origin, picture.name): picture for picture in [*(picture for _, picture in pairs), *drawn]}
        looks = dict(zip(unique, watch(look_at_all(list(unique.values())), len(unique)), strict=True))
    seen = [Seen(reading, picture, looks[picture.origin, picture.name]) for reading, picture in pairs]
    equal, alike = _twins(seen, threshold)
    validation = held_out(readings) if held_out is not None else set()
    once = {(each.identity, each.picture.captions): each for each in reversed(seen)}  # a file may stand in two entries
    texts = [
        Captioned(each.name, each.picture.captions, each.reading.entry.prompt is None, _is_learnt(each, set()))
        for each in reversed(once.values())
    ]
    findings = [
        *(finding for reading in readings for finding in _reading_findings(reading)),
        *about(
            "fatal",
            "broken",
            [f"{each.name} ({each.look.fault})" for each in seen if each.look.fault],
            "pictures that cannot be read",
            "replace them, or leave them out of a copy with --fix OUT",
        ),
        *mask_findings(
            [
                Masked(e.name, e.picture, e.look, looks[e.picture.origin, mask_of(e.picture).name])
                for e in seen
                if e.picture.mask is not None
            ],
            [each.name for each in seen if each.picture.mask is None and each.reading.entry.role == "instance"],
            masks,
        ),
        *size_findings([(each.name, each.look) for each in seen if not each.look.fault], frame),
        *caption_findings(texts, reader() if reader is not None else None, trigger),
        *_twin_findings(seen, equal, alike, validation),
    ]
    if any(entry.role == "instance" for entry in entries) and not pairs and not is_fatal(findings):
        findings += [Finding("fatal", "no pictures", 0, "there are no pictures", "put some in")]
    return Report(readings, seen, frame, worst_first(findings), equal, alike)


def _files(entries: Sequence[Entry]) -> list[str]:
    """The pictures in the folders of some entries, as their paths."""
    folders = {entry.path: entry.without for entry in entries if entry.path is not None and entry.path.is_dir()}
    return [
        str(folder / name) for folder, some in folders.items() for name in list_files(folder, some) if is_picture(name)
    ]


def _named(reading: Reading, name: str) -> str:
    return f"{reading.entry.label}: {name}" if reading.entry.label else name


def _reading_findings(reading: Reading) -> Iterator[Finding]:
    def named(names: Sequence[str]) -> list[str]:
        return [_named(reading, name) for name in names]

    refused, key = bool(reading.refusal), reading.entry.key
    found = [
        *about("fatal", "rows", named(reading.bad_rows), "rows of the metadata that cannot be read", "mend them"),
        *about(
            "fatal",
            "files",
            named(reading.bad_files),
            "shards or parquet files that cannot be read",
            "fetch them again, or leave what is lost out of a copy with --fix OUT",
        ),
        *about(
            "fatal",
            "no column",
            named(reading.no_column),
            f"files without the column '{reading.entry.text_column}', where captions are looked for",
            f"name the right one with: {setting(key, 'text_column', 'KEY')}, or give all pictures one caption with: "
            f"{setting(key, 'prompt', PROMPT)}",
        ),
        *about(
            "fatal" if refused else "warning",
            "leaving",
            named(reading.leaving),
            "rows that lead out of the folder (absolute, or with ..)",
            "put the pictures into the folder and name them relative to it",
        ),
        *about(
            "fatal",
            "missing",
            named(reading.missing),
            "rows whose picture is not there",
            "put the pictures back, or leave the rows out of a copy with --fix OUT",
        ),
        *about(
            "fatal",
            "no caption",
            named(reading.without_caption),
            "pictures without a caption",
            f"write captions (sdtune caption), or give all one with: {setting(key, 'prompt', PROMPT)}",
        ),
        *about(
            "fatal" if refused else "warning",
            "unreferenced",
            named(reading.unreferenced),
            "pictures that no row names",
            "write rows for them (sdtune caption), or leave them out of a copy with --fix OUT",
        ),
        *about(
            "warning",
            "links",
            named(reading.links),
            "pictures that are links to a place outside of the folder",
            "a copy of the folder elsewhere lacks them; put the files themselves in, as --fix OUT does",
        ),
        *about(
            "warning",
            "names",
            named(reading.bad_names),
            "pictures whose name has a backslash or is not UTF-8: no metadata can name them",
            "rename them, as --fix OUT does",
        ),
        *about("note", "text alone", named(reading.loose_texts), ".txt files without a picture", "mend their names"),
        *about("note", "blank", named(reading.blank), "pictures with a blank caption too", "take these rows away"),
    ]
    yield from found
    if refused and not is_fatal(found):  # whatever else training finds wrong, told in its own words
        yield Finding("fatal", "refused", 1, _named(reading, "training refuses it"), reading.refusal)


def _twins(seen: Sequence[Seen], threshold: int) -> tuple[list[list[int]], list[list[int]]]:
    """Groups of pictures that are equal, and of those that look alike, as numbers of `seen`.

    A file that several entries name is one picture here.
    """
    first: dict[Identity, int] = {}
    for number, each in enumerate(seen):
        if not each.look.fault:
            first.setdefault(each.identity, number)
    numbers = list(first.values())
    equal = [[numbers[i] for i in group] for group in groups_of_equal([seen[n].look.digest for n in numbers])]
    again = {number for group in equal for number in group[1:]}
    single = [number for number in numbers if number not in again]
    alike = groups_of_alike([seen[number].look for number in single], threshold)
    return equal, [[single[i] for i in group] for group in alike]


def _twin_findings(
    seen: Sequence[Seen], equal: Sequence[Sequence[int]], alike: Sequence[Sequence[int]], validation: set[Identity]
) -> list[Finding]:
    def pairs(groups: Sequence[Sequence[int]]) -> list[str]:
        return [f"{seen[number].name} = {seen[group[0]].name}" for group in groups for number in group[1:]]

    leaks = [f"{seen[left].name} = {seen[right].name}" for left, right in _leaks(seen, equal, alike, validation)]
    return [
        *about(
            "warning",
            "in training and validation",
            leaks,
            "validation pictures that are learnt too, or look like one that is",
            "take them out of one of the two: the held-out loss tells nothing with them",
        ),
        *about(
            "warning",
            "equal",
            pairs(equal),
            "copies of other pictures, byte for byte",
            "each counts once more in the loss; leave them out of a copy with --fix OUT",
        ),
        *about(
            "warning",
            "alike",
            pairs(alike),
            "pictures that look like another",
            "see them, and keep the largest of each: sdtune dedupe FOLDER --sheet alike.png --out OUT",
        ),
    ]


def families(equal: Sequence[Sequence[int]], alike: Sequence[Sequence[int]]) -> list[list[int]]:
    """Groups of pictures that are equal or look alike; `alike` names one of each equal ones."""
    copies = {group[0]: list(group) for group in equal}
    together = [[number for first in group for number in copies.pop(first, [first])] for group in alike]
    return together + list(copies.values())


def _leaks(
    seen: Sequence[Seen], equal: Sequence[Sequence[int]], alike: Sequence[Sequence[int]], validation: set[Identity]
) -> Iterator[tuple[int, int]]:
    """(validation picture, a training picture equal or alike to it)."""
    entries: dict[Identity, list[int]] = {}
    for number, each in enumerate(seen):
        entries.setdefault(each.identity, []).append(number)
    together = families(equal, alike)
    inside = {number for family in together for number in family}
    together = [[n for number in family for n in entries[seen[number].identity]] for family in together]
    together += [group for group in entries.values() if len(group) > 1 and group[0] not in inside]
    for family in together:
        learnt = [number for number in family if _is_learnt(seen[number], validation)]
        aside = [number for number in family if _is_aside(seen[number], validation)]
        yield from ((number, learnt[0]) for number in aside if learnt)


def _is_learnt(each: Seen, validation: set[Identity]) -> bool:
    return each.reading.entry.role == "instance" and each.identity not in validation


def _is_aside(each: Seen, validation: set[Identity]) -> bool:
    return each.reading.entry.role == "validation" or each.identity in validation
