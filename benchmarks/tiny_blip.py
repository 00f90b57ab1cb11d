"""How good the shipped captioner is: the share of the emoji pictures that `sdtune caption --model tiny` names right.

    python examples/tiny_base/build_data.py     # once: the pictures, in data/tiny_base
    python benchmarks/tiny_blip.py              # about 2 minutes on 2 cores

Prints a table, what it said of the 16 pictures it never saw, and a JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from data_tools.caption import caption_folder
from sdtune.data.metadata import read_rows

SEEN, UNSEEN = 0.95, 0.70  # wanted


def named(folder: Path, out: Path, model: str) -> dict[str, str]:
    """The captions of a folder's pictures, by their file names."""
    place = out / "pictures"
    place.mkdir(parents=True)
    for row in read_rows(folder):
        (place / row["file_name"]).hardlink_to(folder / row["file_name"])
    caption_folder(place, out=out / "captioned", model=model, batch_size=64)
    return {row["file_name"]: row["text"] for row in read_rows(out / "captioned")}


def share(rows: list[dict[str, str]], captions: dict[str, str]) -> float:
    """Part of the rows whose caption is their name, spaces and capitals apart."""

    def plain(text: str) -> str:
        return "".join(character for character in text.lower() if character.isalnum())

    return sum(plain(captions[row["file_name"]]) == plain(row["text"]) for row in rows) / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/tiny_base"), help="what build_data.py wrote")
    parser.add_argument("--model", default="tiny")
    settings = parser.parse_args()
    demo = {row["concept"] for row in read_rows(settings.data / "demo")}
    with tempfile.TemporaryDirectory(dir=settings.data) as place:
        seen: list[dict[str, str]] = []
        captions: dict[str, str] = {}
        for part in ("vae", "vae_held_out"):
            rows = read_rows(settings.data / part)
            seen += [row for row in rows if not (row["style"] == "fluent" and row["concept"] in demo)]
            captions |= named(settings.data / part, Path(place) / part, settings.model)
        unseen = read_rows(settings.data / "demo")
        said = named(settings.data / "demo", Path(place) / "demo", settings.model)
    result = {"seen": share(seen, captions), "pictures": len(seen), "unseen": share(unseen, said)}
    for style in ("fluent", "noto"):
        result[style] = share([row for row in seen if row["style"] == style], captions)
    print(f"{'named right':<40}{'share':>8}{'wanted':>8}")
    print(f"{f'{len(seen):,} pictures it was trained on':<40}{result['seen']:>8.1%}{SEEN:>8.0%}")
    print(f"{f'{len(unseen)} pictures it never saw':<40}{result['unseen']:>8.1%}{UNSEEN:>8.0%}")
    for row in unseen:
        print(f"  {row['text']}: {said[row['file_name']]}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
