"""`train.compile`: the denoiser as torch.compile translates it, in whole runs."""

from pathlib import Path

import pytest
from torch._dynamo.utils import counters

from sdtune import building
from sdtune.config.files import check
from sdtune.run import Run
from tests.factories import losses, make_recipe, weights


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_compiled_denoiser_learns_the_same(
    sd: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(building, "COMPILER", "eager")  # traces as all do, and writes no machine code
    counters.clear()
    for name, compiled in (("plain", False), ("compiled", True)):
        train = {"steps": 2, "batch_size": 2, "compile": compiled}
        Run(make_recipe(sd, photos, tmp_path / name, adapter={"kind": kind}, train=train)).complete()
        assert bool(counters["frames"]["ok"]) == compiled
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)
    expected = weights(tmp_path / "plain" / "final")
    assert weights(tmp_path / "compiled" / "final").keys() == expected.keys()


def test_a_vae_is_not_compiled() -> None:
    values = {
        "task": "autoencoding", "model": {"base": "tiny"}, "adapter": {"kind": "full"},
        "data": [{"path": "assets:demo"}], "optimizer": {"lr": 1e-4}, "output": {"dir": "run"},
        "train": {"steps": 1, "compile": True},
    }  # fmt: skip
    assert check(values)[1] == [("train.compile", "is for a denoiser, and an autoencoding run has none; remove it")]
