"""benchmarks/score_models.py: the whole of it on a short run of a small network."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdtune.run import Run
from tests.factories import losses, make_photos, make_recipe

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("score_models")
    for name in ("score_models", "class_agreement", "classifier"):
        sys.modules.pop(name, None)


def test_a_run_is_measured(benchmark: Any, tmp_path: Path) -> None:
    photos = [make_photos(tmp_path / name, count, size=(28, 28)) for name, count in (("learnt", 6), ("measured", 3))]
    denoiser = {"kind": "score_add", "size": 28, "widths": [8, 8, 16, 16], "embedding": 16}
    recipe = make_recipe(
        "",
        "",
        tmp_path / "run",
        model={"family": "pixel", "from_config": {"denoiser": denoiser, "scheduler": {"prediction_type": "ve_score"}}},
        adapter={"kind": "full"},
        data=[{"path": str(photos[0])}, {"path": str(photos[1]), "role": "validation"}],
        images={"resolution": 28},
        train={"steps": 5, "batch_size": 2, "ema": 0.5},
        output={"checkpoint_every": 5},
    )
    Run(recipe).complete()
    out = tmp_path / "measured-run"
    arguments = [str(tmp_path / "run"), "--out", str(out), "--samples", "2", "--samplers", "probability-flow"]
    found = benchmark.main(arguments)
    assert found["training_loss"] == pytest.approx(np.mean(losses(tmp_path / "run")[-3:]), abs=0.01)
    assert found["steps_of_last_epoch"] == 3 and found["held_out_pictures"] == 3
    assert found["held_out_loss"] != found["held_out_loss_averaged"] > 0  # the optimizer's weights and their average
    assert json.loads((out / "table.json").read_text()) == found
    assert Image.open(out / "probability-flow.png").size == (16 * 56, 56)


def test_an_answer_of_zero_costs_the_number_of_pixels(benchmark: Any) -> None:
    from sdtune.families.pixel import Pixel

    denoiser = {"kind": "score_concat", "widths": [8, 8, 16, 16], "embedding": 16}
    family = Pixel.from_config({"denoiser": denoiser, "scheduler": {"prediction_type": "ve_score"}}, seed=0)
    with torch.no_grad():
        family.modules["denoiser"].to_picture.weight.zero_()
        family.modules["denoiser"].to_picture.bias.zero_()
    mean, error = benchmark.held_out_loss(family, torch.zeros(50, 3, 28, 28, dtype=torch.uint8), [""] * 50)
    assert abs(mean - 784) < 5 * error < 30
