"""From COCO's files to a model that draws: the commands of recipes/coco_bert.yaml, on real pictures and small parts."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdtune.cli import app
from tests.factories import make_bert, make_sd

COCO = Path(__file__).parents[3] / "shared" / "data" / "coco-mini"
RECIPE = Path(__file__).parents[2] / "recipes" / "coco_bert.yaml"


def typed(*arguments: str | Path) -> str:
    """What a command prints, and nothing went wrong."""
    ran = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert ran.exit_code == 0, ran.stderr
    return ran.stdout


@pytest.mark.skipif(not COCO.is_dir(), reason="../shared/data/coco-mini is not here")
def test_photographs_and_captions_become_a_model_that_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bert, vae = make_bert(tmp_path / "bert"), make_sd(tmp_path / "sd") / "vae"
    (captions,) = (COCO / "annotations").glob("captions_*.json")
    typed("coco", "--captions", captions, "--images", COCO / "train2017", "--limit", "4", "--out", "data/coco")
    smaller = {
        "data.0.path": "data/coco", "images.resolution": 64, "model.from_config.unet.block_out_channels": [32] * 4,
        "model.from_config.text_encoder": bert, "model.from_config.tokenizer": bert, "model.from_config.vae": vae,
        "train.steps": 2, "train.batch_size": 2, "train.compile": "false", "train.workers": 0,
        "optimizer.warmup": 0, "output.trackers": [], "validate.fraction": 0,
        "validate.every": "null", "validate.samples": "null", "output.checkpoint_every": "null",
    }  # fmt: skip
    typed("train", RECIPE, *(f"{key}={value}" for key, value in smaller.items()))
    picture = typed("sample", "runs/coco-bert", "--prompt", "a dog on a beach", "--steps", "2", "--out", "drawn")
    assert Path(picture.strip()).is_file()
