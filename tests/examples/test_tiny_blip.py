"""examples/tiny_blip: the script that trains the shipped captioner, here on a few coloured squares."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sdtune.data.metadata import write_rows

SCRIPT = Path(__file__).parents[2] / "examples" / "tiny_blip" / "train.py"
NAMES = ("red apple", "green tree", "blue car", "black cat")
COLOURS = ("red", "green", "blue", "black")


def write_folder(folder: Path, styles: tuple[str, ...], which: range) -> None:
    folder.mkdir(parents=True)
    rows = []
    for number in which:
        for style in styles:
            name = f"{style}-{number}.png"
            picture = Image.new("RGB", (64, 64), "white")
            picture.paste(COLOURS[number], (8, 8, 48, 48 if style == "fluent" else 32))
            picture.save(folder / name)
            rows.append({"file_name": name, "text": NAMES[number], "concept": str(number), "style": style})
    write_rows(folder, rows)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_folder(tmp_path / "data" / "vae", ("fluent", "noto"), range(3))
    write_folder(tmp_path / "data" / "vae_held_out", ("fluent", "noto"), range(3, 4))
    write_folder(tmp_path / "data" / "demo", ("fluent",), range(3, 4))
    return tmp_path / "data"


def test_the_script_writes_a_captioner_and_goes_on_where_it_stopped(data: Path, tmp_path: Path) -> None:
    def run(steps: int) -> str:
        words = [sys.executable, SCRIPT, "--data", data, "--work", tmp_path / "work", "--out", tmp_path / "final"]
        words += ["--steps", steps, "--batch", 2]
        answer = subprocess.run([str(word) for word in words], capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr[-3000:]
        return answer.stdout

    first = run(3)
    result = json.loads(first.splitlines()[-1])
    assert result["pictures"] == 7  # the demo's picture is not among them
    assert {"seen", "seen_with_prompt", "unseen"} <= result.keys()
    again = json.loads(run(3).splitlines()[-1])
    assert again == result

    from transformers import BlipForConditionalGeneration, BlipProcessor

    model = BlipForConditionalGeneration.from_pretrained(tmp_path / "final", dtype="float32")
    processor = BlipProcessor.from_pretrained(tmp_path / "final")
    inputs = processor(images=Image.new("RGB", (100, 50)), return_tensors="pt")
    assert processor.batch_decode(model.generate(**inputs, max_new_tokens=3), skip_special_tokens=True)
    size = sum(file.stat().st_size for file in (tmp_path / "final").rglob("*") if file.is_file())
    assert size <= 12_000_000
