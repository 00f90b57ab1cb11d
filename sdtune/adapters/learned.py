"""What adapters wrote, in any of their formats: found by a path, and put into a model again."""

from pathlib import Path

from sdtune.adapters.lora_files import WEIGHTS_NAME, find_lora, load_lora, peft_parts
from sdtune.adapters.tokens import embedding_files, is_embedding, load_embedding
from sdtune.families.base import Family


def holds_adapter(folder: Path) -> bool:
    """Whether a run wrote what an adapter learned into this folder, and not a whole model."""
    return holds_lora(folder) or bool(embedding_files(folder))


def holds_lora(folder: Path) -> bool:
    """Whether there is a LoRA, or a relative of it, as a run writes it."""
    return (folder / WEIGHTS_NAME).is_file() or bool(peft_parts(folder))


def find_learned(place: Path) -> list[Path]:
    """The tokens and the LoRA that a path means, each a file or a folder.

    Raises:
        WeightsError: there are none.
    """
    tokens = embedding_files(place)
    return tokens if tokens and not holds_lora(place) else [*tokens, find_lora(place)]


def load_learned(family: Family, place: Path, weight: float = 1.0) -> None:
    """Put a token, a LoRA or a relative of it into the model, added to what is there.

    Args:
        family: its networks are changed in place.
        place: one of what `find_learned` answered. weight: of a LoRA, as `load_lora` has it.

    Raises:
        WeightsError: it is damaged, or does not fit the model. UsageError: the token is a word already.
    """
    if place.is_file() and is_embedding(place):
        load_embedding(family, place)
    else:
        load_lora(family, place, weight)
