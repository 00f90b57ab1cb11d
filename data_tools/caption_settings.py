"""What `sdtune caption` is asked for, checked before anything heavy is loaded."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from sdtune.errors import UsageError

DEFAULT_MODEL = "Salesforce/blip-image-captioning-base"
FORMATS = {"jsonl": "metadata.jsonl", "txt": "", "parquet": "metadata.parquet"}  # and the file that holds the rows
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
BEAMS = 3  # as the paper's authors decode (Li et al. 2022, "BLIP")
TOP_P = 0.9  # as theirs when they sample


@dataclass(frozen=True)
class Settings:
    """All that decides what the captions say. A run that was stopped goes on only with equal settings.

    Attributes:
        model: hub id, folder, or tiny. revision: branch, tag or commit of a hub id.
        prompt: what each caption is to begin with, for the model alone; it is cut off again. A model that chats takes
            it as the question.
        num_beams: beams of the search, at least `captions`; None is 3, or `captions` where that is more.
        max_tokens: new tokens a caption at most.
        sample: draw the tokens at random, with `temperature` (above 0; None is 1) and `top_p` (in (0, 1]; None is 0.9).
        seed: of the sampling.
        captions: different captions wanted for each picture.
        prefix, trigger, suffix: words around the caption: `prefix trigger, caption suffix`.
        background: colour behind transparent pictures, any that Pillow knows.
        precision: of the model: fp32, bf16, fp16, or auto, which is half precision on a GPU.
        allow_pickle: open weights that are not safetensors.
        overwrite: caption pictures that have captions, too.
    """

    model: str = DEFAULT_MODEL
    revision: str | None = None
    prompt: str = ""
    num_beams: int | None = None
    max_tokens: int = 40
    sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    captions: int = 1
    prefix: str = ""
    trigger: str = ""
    suffix: str = ""
    background: str = "white"
    precision: str = "auto"
    allow_pickle: bool = False
    overwrite: bool = False

    @property
    def beams(self) -> int:
        """How many beams the search has; 1 when sampling."""
        return 1 if self.sample else self.num_beams or max(BEAMS, self.captions)

    def check(self) -> None:
        """Raises UsageError: a value out of its range, or options that do not go together."""
        if self.sample and self.num_beams not in (None, 1):
            raise UsageError(f"--num-beams {self.num_beams} and --sample exclude each other; leave one of them out")
        if not self.sample and (self.temperature is not None or self.top_p is not None):
            raise UsageError("--temperature and --top-p are for sampling; add --sample, or leave them out")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise UsageError(f"--temperature: got {self.temperature}, expected more than 0; 1 is the model's own")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p: got {self.top_p}, expected more than 0 and at most 1; 0.9 is usual")
        if self.captions > self.beams and not self.sample:
            raise UsageError(
                f"--captions {self.captions} needs as many beams, got --num-beams {self.num_beams}; leave --num-beams "
                "out, or draw the captions at random with --sample"
            )
        if self.precision not in PRECISIONS:
            raise UsageError(f"--precision: got '{self.precision}', expected one of {', '.join(PRECISIONS)}")
        _check_colour(self.background)

    def around(self, caption: str) -> str:
        """The caption with prefix, trigger and suffix, one space between the words; none before `, oil painting`."""
        parts = [part for part in (self.trigger.strip(), " ".join(caption.split())) if part]
        text = f"{self.prefix.strip()} {', '.join(parts)}".strip()
        suffix = self.suffix.strip()
        return text + suffix if suffix[:1] in ",.;:!?" else f"{text} {suffix}".strip()

    def differences(self, others: dict[str, Any]) -> list[str]:
        """Where these settings are not those of `others`, in words such as "prompt: '' before, 'a dog' now"."""
        mine = asdict(self)
        names = [field.name for field in fields(self)]
        return [f"{name}: {others.get(name)!r} before, {mine[name]!r} now" for name in names
                if others.get(name) != mine[name]]


def _check_colour(name: str) -> None:
    from PIL import ImageColor

    try:
        ImageColor.getrgb(name)
    except ValueError:
        raise UsageError(f"--background: '{name}' is no colour; expected one such as black or #ff8800") from None
