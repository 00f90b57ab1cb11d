"""What learns changes in the middle of a run: the text encoder stops, the denoiser begins."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sdtune import building
from sdtune.config.files import check
from sdtune.run import Run
from tests.factories import losses, make_recipe, train_on_two_processes, weights

ROOT = Path(__file__).parents[1]
TWO_PHASES: dict[str, Any] = {"text_encoder": True, "text_encoder_until": 2, "denoiser_from": 2}
Tensors = dict[str, dict[str, torch.Tensor]]


def snapshot(run: Run) -> Tensors:
    """What learns, by network."""
    return {name: {key: p.detach().clone() for key, p in some.items()} for name, some in run.learning.items()}


def moved(before: Tensors, after: Tensors) -> set[str]:
    """The networks in which something changed."""
    return {
        name for name, some in before.items() if any(not torch.equal(p, after[name][key]) for key, p in some.items())
    }


def finished(recipe: Any) -> Run:
    run = Run(recipe)
    run.complete()
    return run


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        ({"text_encoder_until": 2, "denoiser_from": 2}, ["text", "text", "unet", "unet", "unet"]),
        ({"text_encoder_until": 3, "denoiser_from": 1}, ["text", "both", "both", "unet", "unet"]),
        ({"text_encoder_until": 2}, ["both", "both", "unet", "unet", "unet"]),
        ({"denoiser_from": 4}, ["text"] * 4 + ["both"]),
    ],
    ids=["one after the other", "overlapping", "the text stops", "the denoiser begins"],
)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_in_each_step_learns_whose_turn_it_is(
    sd: Path, photos: Path, tmp_path: Path, kind: str, phases: dict[str, int], expected: list[str]
) -> None:
    # weight decay, and clipping to a norm, would move or slow what should stand still
    recipe = make_recipe(
        sd, photos, tmp_path / "run", adapter={"kind": kind, "text_encoder": True, **phases},
        optimizer={"weight_decay": 0.5, "lr": 1e-3, "text_encoder_lr": 1e-4}, train={"steps": 5, "batch_size": 1},
    )  # fmt: skip
    run = Run(recipe)
    before, got, rates = snapshot(run), [], []
    for info in run.steps():
        after = snapshot(run)
        names = moved(before, after)
        got.append({frozenset({"text_encoder"}): "text", frozenset({"unet"}): "unet"}.get(frozenset(names), "both"))
        rates.append(info.lr)
        assert all(p.grad is None for some in run.learning.values() for p in some.values())
        before = after
    assert got == expected
    assert rates == pytest.approx([1e-4 if name == "text" else 1e-3 for name in expected])


def test_clipping_sees_only_what_learns(sd: Path, photos: Path, tmp_path: Path) -> None:
    """The norm of a phase is that of a run in which nothing else learns."""
    common: dict[str, Any] = {"train": {"steps": 3}, "optimizer": {"clip": 1e-3}}
    both = next(Run(make_recipe(sd, photos, tmp_path / "0", adapter={"text_encoder": True}, **common)).steps())
    phase = next(Run(make_recipe(sd, photos, tmp_path / "1", adapter=TWO_PHASES, **common)).steps())
    unet = next(Run(make_recipe(sd, photos, tmp_path / "2", **common)).steps())
    assert both.grad_norm**2 == pytest.approx(phase.grad_norm**2 + unet.grad_norm**2, rel=1e-4)


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_stopped_in_any_phase_goes_on_exactly(
    sd: Path, photos: Path, tmp_path: Path, stop: int, kind: str
) -> None:
    common: dict[str, Any] = {
        "adapter": {"kind": kind, **TWO_PHASES}, "train": {"steps": 4, "ema": 0.9 if kind == "full" else None},
        "validate": {"fraction": 0.2, "every": 1},
    }  # fmt: skip
    whole = finished(make_recipe(sd, photos, tmp_path / "whole", **common))
    recipe = make_recipe(sd, photos, tmp_path / "run", output={"checkpoint_every": stop}, **common)
    for info in Run(recipe).steps():
        if info.step == stop:
            break
    again = Run(recipe, resume=True)
    assert again.step == stop
    again.complete()
    assert losses(again.folder.path) == losses(whole.folder.path)
    expected = weights(whole.folder.final)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(again.folder.final).items())


def test_captions_are_encoded_once_when_the_text_encoder_no_longer_learns(
    sd: Path, photos: Path, tmp_path: Path
) -> None:
    run = Run(make_recipe(sd, photos, tmp_path / "run", adapter=TWO_PHASES, train={"steps": 8}))
    calls: list[int] = []
    run.family.modules["text_encoder"].register_forward_hook(lambda *_: calls.append(run.step))
    run.complete()
    assert calls.count(0) == calls.count(1) == 1  # a batch in each step of the first phase
    assert len([step for step in calls if step >= 2]) == 5  # then each of the five captions
    fresh = {"steps": 8, "cache": False}
    other = finished(make_recipe(sd, photos, tmp_path / "other", adapter=TWO_PHASES, train=fresh))
    assert losses(run.folder.path) == pytest.approx(losses(other.folder.path), abs=1e-5)


def test_averages_of_the_text_encoder_are_not_mixed_with_cached_captions(
    sd: Path, photos: Path, tmp_path: Path
) -> None:
    common: dict[str, Any] = {
        "adapter": {"kind": "full", **TWO_PHASES}, "validate": {"fraction": 0.2, "every": 1},
        "optimizer": {"lr": 0.01},
    }  # fmt: skip
    rows = []
    for name, cache in (("cached", True), ("fresh", False)):
        run = finished(
            make_recipe(sd, photos, tmp_path / name, train={"steps": 5, "ema": 0.9, "cache": cache}, **common)
        )
        rows.append([json.loads(line) for line in run.folder.metrics.read_text().splitlines()])
    for first, second in zip(*rows, strict=True):
        for key in {"loss", "val_loss"} & first.keys():
            assert first[key] == pytest.approx(second[key], abs=1e-5)


def test_two_processes_and_accumulation_go_through_the_same_phases(sd: Path, photos: Path, tmp_path: Path) -> None:
    train = {"steps": 4, "batch_size": 4, "gradient_checkpointing": True}
    one = finished(make_recipe(sd, photos, tmp_path / "one", adapter=TWO_PHASES, train=train))
    parts = train | {"batch_size": 1, "accumulate": 2}
    recipe = make_recipe(sd, photos, tmp_path / "two", adapter=TWO_PHASES, train=parts)
    train_on_two_processes(recipe, tmp_path / "two")
    assert losses(tmp_path / "two") == pytest.approx(losses(one.folder.path), abs=1e-5)
    expected = weights(one.folder.final)
    for key, tensor in weights(tmp_path / "two" / "final").items():
        assert (tensor - expected[key]).abs().mean() < 1e-4, key


def test_the_phases_of_a_recipe(sd: Path, photos: Path, tmp_path: Path) -> None:
    def phases(**adapter: Any) -> list[tuple[int, int]]:
        recipe = make_recipe(
            sd, photos, tmp_path / "run", adapter={"text_encoder": True} | adapter, train={"steps": 1850}
        )
        return building.phases(recipe)

    assert phases() == [(0, 1850)]
    assert phases(text_encoder_until=350, denoiser_from=350) == [(0, 350), (350, 1850)]  # as fast-DreamBooth
    assert phases(text_encoder_until=500, denoiser_from=350) == [(0, 350), (350, 500), (500, 1850)]
    assert phases(text_encoder_until=1850) == phases(text_encoder_until=2000) == [(0, 1850)]


def test_phases_that_cannot_be_are_refused() -> None:
    def faults(adapter: dict[str, Any], steps: int = 9, **optimizer: Any) -> str:
        values: dict[str, Any] = {
            "model": {"base": "tiny"}, "data": [{"path": "assets:demo"}], "optimizer": {"lr": 1e-4} | optimizer,
            "train": {"steps": steps}, "output": {"dir": "run", "trackers": []}, "adapter": adapter,
        }  # fmt: skip
        return "; ".join(f"{key}: {what}" for key, what in check(values)[1])

    assert "adapter.denoiser_from: got 5, expected at most 2" in faults(TWO_PHASES | {"denoiser_from": 5})
    alone = faults({"text_encoder_until": 3})
    assert "adapter.text_encoder_until: is read with adapter.text_encoder=true only" in alone
    assert "adapter.denoiser_from: prodigy counts the steps of all" in faults(TWO_PHASES, name="prodigy")
    assert not faults(TWO_PHASES) and not faults(TWO_PHASES, steps=3)
    never = "adapter.denoiser_from: got 2, but train.steps is 2, so that the denoiser would never learn; expected less"
    assert faults(TWO_PHASES, steps=2).startswith(never) and ";" not in faults(TWO_PHASES, steps=2).split("steps=4")[1]
