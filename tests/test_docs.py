"""Every command of the pages in docs is run, in the order of its page, and ends as the page says.

Lines of ```sh blocks are commands; in other blocks lines that begin with "$ " are, and what follows is their output.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sdtune.data.metadata import read_rows, write_rows
from sdtune.run import Run
from tests.factories import make_photos, make_recipe

ROOT = Path(__file__).parent.parent
COCO = ROOT.parent / "shared" / "data" / "coco-mini"
PROGRAMS = {
    "sdtune": ["-m", "sdtune"],
    "accelerate": ["-m", "accelerate.commands.accelerate_cli"],
    "torchrun": ["-m", "torch.distributed.run"],
}
REAL = ("coco", "datasets")  # their output is of the real data that they were made with
LOOKING = ("cat", "head", "echo", "python")  # these show what the others made; benchmarks have tests of their own


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """The commands of a page, and the lines that it shows as their output."""
    found: list[tuple[str, list[str]]] = []
    shown: list[str] = []  # after the last "$ "
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if kind == "sh" and line.strip():
                found.append((line, []))
            elif line.startswith("$ "):
                shown = []
                found.append((line[2:], shown))
            elif kind in ("", "console"):
                shown.append(line)
    return [(command, output) for command, output in found if command.split()[0] not in LOOKING]


DRAWINGS = {  # of the demo
    **{"bear.png": "1f9f8.png", "island.png": "1f3dd-fe0f.png"},
    **{"plane.png": "2708-fe0f.png", "ribbon.png": "1f380.png"},
}
PAGES = {page.stem: commands(page) for page in sorted((ROOT / "docs").glob("*.md"))}


def test_there_are_pages_with_commands() -> None:
    assert {page for page, found in PAGES.items() if found} >= {"caption", "check", "coco", "datasets"}


def make_world(work: Path, page: str) -> None:
    """The folders and files that the pages speak of."""
    make_photos(work / "photos", 3, captions=page == "check")
    if page == "datasets":
        shutil.rmtree(work / "photos")
        (work / "photos").mkdir()
        for name, drawing in DRAWINGS.items():
            shutil.copyfile(ROOT / "sdtune" / "assets" / "demo" / drawing, work / "photos" / name)
    if page == "check":  # with a copy, and a row too many
        shutil.copyfile(work / "photos" / "0.png", work / "photos" / "copy.png")
        rows = [*read_rows(work / "photos"), {"file_name": "copy.png", "text": "a dog"}]
        write_rows(work / "photos", [*rows, {"file_name": "gone.png", "text": "a dog"}])
    if page == "export":  # two runs that taught a LoRA
        recipe = make_recipe("tiny", work / "photos", work / "runs" / "rex", adapter={"rank": 8, "text_encoder": True})
        write_rows(work / "photos", [{"file_name": f"{number}.png", "text": "rex"} for number in range(3)])
        Run(recipe).complete()
        shutil.copytree(work / "runs" / "rex", work / "runs" / "ada")
    make_photos(work / "coco-pictures", 2, captions=False)
    images = [{"id": number, "file_name": f"{number}.png"} for number in range(2)]
    notes = [{"id": number, "image_id": number, "caption": f"a dog {number}"} for number in range(2)]
    (work / "captions.json").write_text(json.dumps({"images": images, "annotations": notes}), encoding="utf-8")
    if page in REAL:
        shutil.copytree(COCO / "annotations", work / "annotations")
        shutil.copytree(COCO / "train2017", work / "train2017")
    if page == "coco":
        (work / "train2017" / "000000493652.jpg").unlink()  # so that the page can show what is missing
        (work / "cut.json").write_bytes((COCO / "annotations" / "captions_train2017.json").read_bytes()[:30_000])


def run(command: str, work: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command with this Python, and with the captioner that comes along in place of one of the Hub."""
    command, _, into = command.partition(" > ")
    words = shlex.split(command)
    settings = dict(word.split("=", 1) for word in words if re.fullmatch(r"[A-Z_]+=\w+", word))
    words = [word for word in words if word.split("=")[0] not in settings]
    if "caption" in words and "--model" not in words:
        words += ["--model", "tiny"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"} | settings
    line = [sys.executable, *PROGRAMS[words[0]], *words[1:]]
    answer = subprocess.run(line, cwd=work, env=environment, capture_output=True, text=True, timeout=600)
    if into:
        (work / into).write_text(answer.stdout, encoding="utf-8")
    return answer


def ends_with(output: list[str]) -> set[int]:
    """The exit codes that the shown output stands for."""
    text = "\n".join(output)
    if any(line.startswith("error:") for line in output):
        return {1, 2}
    return {1} if "training would fail" in text and "training takes" not in text else {0}


@pytest.mark.parametrize("page", [page for page, found in PAGES.items() if found])
def test_the_commands_of_a_page(page: str, tmp_path: Path) -> None:
    if page in REAL and not COCO.is_dir():
        pytest.skip("../shared/data/coco-mini is not here")
    make_world(tmp_path, page)
    for command, output in PAGES[page]:
        answer = run(command, tmp_path)
        assert answer.returncode in ends_with(output), f"{command}\n{answer.stdout}\n{answer.stderr[-3000:]}"
        assert "unexpected" not in answer.stderr
        if page in REAL:
            said = [*(answer.stdout + answer.stderr).splitlines(), "..."]
            assert [line for line in output if line not in said] == [], command
