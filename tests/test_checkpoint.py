"""Checkpoints: whole or absent, and put back exactly."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdtune import checkpoint
from sdtune.errors import RunError
from sdtune.run_folder import RunFolder, all_checkpoints, read_metrics
from sdtune.writing import write_text, written_aside


def learner(seed: int) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer, dict[str, torch.Tensor]]:
    """Two parameters after three steps of Adam, and averages of them."""
    torch.manual_seed(seed)
    parameters = {"unet.a": nn.Parameter(torch.randn(3, 2)), "unet.b": nn.Parameter(torch.randn(4))}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for _ in range(3):
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return parameters, optimizer, {name: torch.randn_like(p) for name, p in parameters.items()}


def save(folder: Path, learned: Any, step: int = 3) -> None:
    parameters, optimizer, averages = learned

    def save_weights(place: Path) -> None:
        place.mkdir()
        (place / "model").write_text("weights")

    checkpoint.save(
        folder,
        step=step,
        parameters=parameters,
        optimizer=optimizer,
        averages=averages,
        scaler=None,
        save_weights=save_weights,
    )


def restore(folder: Path, learned: Any) -> int:
    parameters, optimizer, averages = learned
    return checkpoint.restore(folder, parameters=parameters, optimizer=optimizer, averages=averages, scaler=None)


def test_everything_comes_back(tmp_path: Path) -> None:
    kept, other = learner(0), learner(1)
    save(tmp_path / "step-000003", kept)
    assert restore(tmp_path / "step-000003", other) == 3
    for name, parameter in kept[0].items():
        assert torch.equal(parameter, other[0][name]) and torch.equal(kept[2][name], other[2][name])
    for one in (kept, other):  # the next step is the same too: Adam's moments are back
        for parameter in one[0].values():
            parameter.grad = torch.ones_like(parameter)
        one[1].step()
    assert all(torch.equal(parameter, other[0][name]) for name, parameter in kept[0].items())
    assert (tmp_path / "step-000003" / "weights" / "model").read_text() == "weights"


def test_tensors_are_safetensors(tmp_path: Path) -> None:
    save(tmp_path / "step-000003", learner(0))
    names = sorted(path.name for path in (tmp_path / "step-000003" / "state").iterdir())
    assert names == ["ema.safetensors", "optimizer.safetensors", "state.json", "trainable.safetensors"]


def test_another_runs_checkpoint_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "step-000003", learner(0))
    parameters, optimizer, averages = learner(0)
    del parameters["unet.b"]
    with pytest.raises(RunError, match="holds 2 learning tensors, this recipe has 1.*run.yaml"):
        restore(tmp_path / "step-000003", (parameters, optimizer, averages))


def test_a_checkpoint_without_or_with_an_ema_is_told(tmp_path: Path) -> None:
    parameters, optimizer, averages = learner(0)
    save(tmp_path / "step-000003", (parameters, optimizer, averages))
    with pytest.raises(RunError, match="of a run with an EMA, this recipe has none .train.ema.; resume with"):
        restore(tmp_path / "step-000003", (parameters, optimizer, None))
    save(tmp_path / "step-000004", (parameters, optimizer, None))
    with pytest.raises(RunError, match="of a run with no EMA, this recipe has one"):
        restore(tmp_path / "step-000004", (parameters, optimizer, averages))


@pytest.mark.parametrize("name", ["state.json", "trainable.safetensors", "optimizer.safetensors", "ema.safetensors"])
def test_a_damaged_checkpoint_is_told(tmp_path: Path, name: str) -> None:
    save(tmp_path / "step-000003", learner(0))
    file = tmp_path / "step-000003" / "state" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(RunError, match="is not a whole checkpoint .* resume from the one before"):
        restore(tmp_path / "step-000003", learner(1))


def test_only_whole_checkpoints_count_and_old_ones_go(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.latest() is None
    for step in (5, 10, 100_000, 1_000_000):
        save(folder.checkpoint(step), learner(0), step)
    (tmp_path / "checkpoints" / "step-000200").mkdir()
    (tmp_path / "checkpoints" / ".step-000300.partial" / "state").mkdir(parents=True)
    assert folder.latest() == folder.checkpoint(1_000_000)
    checkpoint.forget_old(tmp_path, 2)
    left = [path.name for path in all_checkpoints(tmp_path)]
    assert left == ["step-100000", "step-1000000"]
    checkpoint.forget_old(tmp_path, None)
    assert len(all_checkpoints(tmp_path)) == 2


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "final"
    with pytest.raises(ZeroDivisionError), written_aside(target) as aside:
        (aside / "half").write_text("x")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with written_aside(target) as aside:
        (aside / "a").write_text("1")
    with pytest.raises(RunError, match="could not be written .No space"), written_aside(target) as aside:
        (aside / "a").write_text("2")
        raise OSError(28, "No space left on device")
    assert (target / "a").read_text() == "1"
    with written_aside(target) as aside:
        (aside / "b").write_text("3")
    assert [path.name for path in target.iterdir()] == ["b"] and [path.name for path in tmp_path.iterdir()] == ["final"]


def test_a_real_disk_that_is_full(tmp_path: Path) -> None:
    """Every library's own way of saying so ends in the same words."""
    import shutil
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        from PIL import Image
        from safetensors.torch import save_file
        from tokenizers import Tokenizer
        from tokenizers.models import BPE

        noise = os.urandom(3 * 256 * 256)
        words = {f"{i:064d}": i for i in range(2000)}
        ways = [
            lambda folder: save_file({"a": torch.zeros(100_000)}, folder / "a.safetensors"),
            lambda folder: (folder / "a").write_bytes(noise),
            lambda folder: Image.frombytes("RGB", (256, 256), noise).save(folder / "a.png"),
            lambda folder: Tokenizer(BPE(vocab=words, merges=[])).save(str(folder / "a.json")),
        ]
        for way in ways:
            with (
                pytest.raises(RunError, match="could not be written"),
                written_aside(disk / "final") as aside,
            ):
                way(aside)
            assert list(disk.iterdir()) == []
        with pytest.raises(RunError, match="could not be written"):
            write_text(disk / "a.json", "x" * 100_000)
        assert list(disk.iterdir()) == []
        shutil.rmtree(disk, ignore_errors=True)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


def test_metrics_are_taken_back_to_the_step(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start("train: {}\n")
    for step, row in (
        (0, {"val_loss": 1.0}),
        (1, {"loss": 0.5}),
        (2, {"loss": 0.4}),
        (2, {"val_loss": 0.9}),
        (3, {"loss": 0.3}),
    ):
        folder.log({"step": step, **row})
    with open(folder.metrics, "a") as file:
        file.write('{"step": 4, "lo')  # a crash
    assert [row["step"] for row in read_metrics(folder.metrics)] == [0, 1, 2, 2, 3]
    folder.start("train: {}\n", step=2)
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [0, 1, 2, 2]
    folder.start("train: {}\n", step=0)
    assert folder.metrics.read_text() == ""
