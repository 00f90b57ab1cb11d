"""Every example runs as it stands, in an empty folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from sdtune.config import resolve_asset
from tests.factories import make_sd

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
WRITES = {
    "minimal_loop": "runs/minimal_loop/unet/diffusion_pytorch_model.safetensors",
    "load_pretrained": "samples/load_pretrained.png",
}


def test_there_are_examples_and_each_is_known_here():
    assert {path.stem for path in EXAMPLES} == WRITES.keys()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(example, tmp_path):
    tiny = Path(resolve_asset("tiny"))
    model = [] if tiny.is_dir() else [str(make_sd(tmp_path / "sd", prediction="v_prediction"))]
    answer = subprocess.run([sys.executable, str(example), *model], cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert (tmp_path / WRITES[example.stem]).is_file()


def test_the_loop_by_hand_learns_and_stays_short(tmp_path):
    loop = next(path for path in EXAMPLES if path.stem == "minimal_loop")
    code = loop.read_text(encoding="utf-8").split('"""')[2].splitlines()
    assert len([line for line in code if line and not line.startswith(("import", "from"))]) <= 40
    model = make_sd(tmp_path / "sd", prediction="v_prediction")
    command = [sys.executable, str(loop), str(model)]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    losses = [float(line.split()[-1]) for line in answer.stdout.splitlines() if line.startswith("step")]
    assert len(losses) == 20
    assert sum(losses[-5:]) < sum(losses[:5])
    draw = next(path for path in EXAMPLES if path.stem == "load_pretrained")
    options = ["--unet", "runs/minimal_loop/unet", "--steps", "2", "--out", "x.png"]
    subprocess.run([sys.executable, str(draw), str(model), *options], cwd=tmp_path, check=True)
    assert (tmp_path / "x.png").is_file()
