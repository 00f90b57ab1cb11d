"""`train.compile`: the denoiser as torch.compile translates it, in whole runs."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch._dynamo.utils import counters

from sdtune import building
from sdtune.config.files import check
from sdtune.run import Run
from tests.factories import losses, make_recipe, weights


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_compiled_denoiser_learns_the_same(
    sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """In pictures of two sizes, averaged, stopped and resumed: and nothing is called otherwise in the files."""
    monkeypatch.setattr(building, "COMPILER", "eager")  # traces as all do, and writes no machine code
    shutil.copytree(photos, tmp_path / "photos")
    with Image.open(tmp_path / "photos" / "0.png") as picture:
        picture.resize((80, 48)).save(tmp_path / "photos" / "0.png")
    counters.clear()
    frames: set[tuple[int, int]] = set()
    for name, compiled in (("plain", False), ("compiled", True)):
        frames.clear()
        for steps in (1, 3):
            recipe = make_recipe(
                sd,
                tmp_path / "photos",
                tmp_path / name,
                adapter={"kind": kind},
                images={"buckets": True, "bucket_step": 16},
                train={"steps": steps, "batch_size": 1, "accumulate": 2, "compile": compiled, "ema": 0.9},
                output={"checkpoint_every": 1},
            )
            run = Run(recipe, resume=steps == 3)
            run.module.register_forward_pre_hook(lambda _, given: frames.add(given[0].frame))
            run.complete()
        assert len(frames) == 2
        assert bool(counters["frames"]["ok"]) == compiled
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)
    for folder in ("final", "checkpoints/step-000003/state"):
        expected, got = (weights(tmp_path / name / folder) for name in ("plain", "compiled"))
        assert got.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(got[key], tensor, atol=5e-3, rtol=0)  # a few steps of Adam at most


def test_a_vae_is_not_compiled() -> None:
    values = {
        "task": "autoencoding", "model": {"base": "tiny"}, "adapter": {"kind": "full"},
        "data": [{"path": "assets:demo"}], "optimizer": {"lr": 1e-4}, "output": {"dir": "run"},
        "train": {"steps": 1, "compile": True},
    }  # fmt: skip
    assert check(values)[1] == [("train.compile", "is for a denoiser, and an autoencoding run has none; remove it")]
