"""Every error a user can meet.

    SdtuneError            exit code 1
    ├── UsageError         exit code 2: wrong arguments or settings
    │   └── ConfigError    the recipe: all its faults at once
    ├── DataError          pictures, captions, data set folders
    ├── WeightsError       a model or LoRA that is missing, damaged or of another kind
    │   └── HubError       the Hub: no network, no such id, no access
    ├── RunError           the run folder: exists already, no checkpoint, no disk space
    └── TrainingError      the run itself: the loss is not finite

A message is one paragraph: what is wrong, what was got, what was expected, and the command to type next.
"""

import difflib
from collections.abc import Sequence


class SdtuneError(Exception):
    """What a person can mend. `exit_code` is what the command ends with."""

    exit_code = 1


class UsageError(SdtuneError):
    """Arguments or settings that cannot work together."""

    exit_code = 2


class ConfigError(UsageError):
    """Faults of a recipe, reported together.

    Args:
        source: the file the faults are in.
        faults: pairs of (dotted key, what is wrong with it).
    """

    def __init__(self, source: str, faults: list[tuple[str, str]]) -> None:
        self.source, self.faults = source, faults
        width = max((len(key) for key, _ in faults), default=0)
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        lines = [f"  {key:<{width}}   {what}" for key, what in faults]
        super().__init__("\n".join([f"{source}: {count}", *lines]))


class DataError(SdtuneError):
    """Pictures, captions or a data set folder that cannot be used."""


class WeightsError(SdtuneError):
    """A model, part of a model or LoRA that is missing, damaged or of another kind."""


class HubError(WeightsError):
    """The Hub could not be reached, or does not have what was asked for."""


class RunError(SdtuneError):
    """A run folder that cannot be written, or cannot be resumed."""


class TrainingError(SdtuneError):
    """The run cannot go on, for instance because the loss is not finite."""


def nearest(name: str, known: Sequence[str], elsewhere: Sequence[str] = ()) -> str:
    """`did you mean 'rank'?`, or the names there are."""
    close = difflib.get_close_matches(name, known, n=1) or list(elsewhere[:1])
    return f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"
