"""examples/coco_subset: COCO to a data set, some of it learned, drawn and pushed; a script and its notebook."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from PIL import Image

from sdtune.data.metadata import read_rows
from tests.factories import losses
from tests.hub_stand_in import HubStandIn

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "coco_subset"
SCRIPT, NOTEBOOK = FOLDER / "coco_subset.py", FOLDER / "coco_subset.ipynb"
COCO = ROOT.parent / "shared" / "data" / "coco-mini"
TOKEN = "hf_TokenOfAnn"


def test_the_notebook_has_the_steps_of_the_script() -> None:
    script, notebook = jupytext.read(SCRIPT), nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [[(cell.cell_type, cell.source) for cell in each.cells] for each in (script, notebook)]
    assert cells[0] == cells[1], f"write it again: jupytext --to ipynb {SCRIPT.relative_to(ROOT)}"
    assert len(cells[0]) > 10
    assert not any(cell.get("outputs") for cell in notebook.cells)  # the photographs are not ours to hand on


def test_the_script_makes_trains_draws_and_pushes(tmp_path: Path) -> None:
    if not COCO.is_dir():
        pytest.skip("../shared/data/coco-mini is not here")
    out = tmp_path / "subset"
    short = ["--learned", "3"]
    for change in ("train.steps=2", "train.batch_size=2", "validate.samples.steps=1"):
        short += ["--set", change]
    with HubStandIn(users={TOKEN: "ann"}) as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, SCRIPT, COCO, "--out", out, "--push", "ann/coco-subset", *short]
        answer = subprocess.run(
            [str(word) for word in command],
            cwd=tmp_path,
            env=os.environ | online | {"MPLBACKEND": "Agg", "HF_HOME": str(tmp_path / "hf")},
            capture_output=True,
            text=True,
        )
        assert answer.returncode == 0, answer.stderr[-3000:]
        pushed = hub.files("ann/coco-subset")
    facts = json.loads(next(line for line in answer.stdout.splitlines() if line.startswith('{"pictures"')))
    assert (facts["pictures"], facts["rows"]) == (80, 400)  # of the whole of COCO they are 100 and 500
    learned = read_rows(out / "learned")
    assert len({row["file_name"] for row in learned}) == 3
    assert len(learned) == 15  # with all five captions each
    assert all((out / "learned" / row["file_name"]).is_file() for row in learned)
    assert len(losses(out / "run")) == 2
    assert {"README.md", "unet/diffusion_pytorch_model.safetensors", "images/02.png"} <= pushed.keys()
    assert learned[0]["text"] in pushed["README.md"].decode()
    for name, lines in (("photographs.png", 1), ("drawn.png", 3)):
        with Image.open(out / name) as sheet:
            assert sheet.height > 150 * lines
