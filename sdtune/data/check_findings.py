"""One fault of a data set, told so that a person knows what to do, and a program too."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

Level = Literal["fatal", "warning", "note"]
LEVELS: tuple[Level, ...] = ("fatal", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One kind of fault.

    Attributes:
        level: fatal: training would fail; warning: it would learn something else than was meant; note: good to know.
        kind: a word for programs.
        count: how many pictures, captions or models it is about.
        what: what was found.
        do: what to do about it.
        names: what it was found in.
    """

    level: Level
    kind: str
    count: int
    what: str
    do: str
    names: tuple[str, ...] = field(default=(), repr=False)


def about(level: Level, kind: str, names: Sequence[str], what: str, do: str) -> list[Finding]:
    """One finding about some names; none without names."""
    return [Finding(level, kind, len(names), what, do, tuple(names))] if names else []


def worst_first(findings: Sequence[Finding]) -> list[Finding]:
    """Fatal ones first, then what is about the most."""
    return sorted(findings, key=lambda finding: (LEVELS.index(finding.level), -finding.count))


def is_fatal(findings: Sequence[Finding]) -> bool:
    """Whether training would fail."""
    return any(finding.level == "fatal" for finding in findings)
