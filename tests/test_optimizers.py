"""Every optimizer of the recipes: it learns, goes on exactly where a checkpoint left it, and is refused where it would
not work.
"""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from sdtune import checkpoint
from sdtune.config.recipe import OptimizerSettings
from sdtune.optimizers import averaged, learning_rate, make_optimizer
from sdtune.run import Run
from tests.factories import make_recipe, weights

NAMES = get_args(OptimizerSettings.model_fields["name"].annotation)
RATES = {"prodigy": 1.0, "adafactor": 1e-2, "lion8bit": 3e-3}
WIDTH = 72  # 72 x 72 numbers: more than the 4,096 from which on bitsandbytes keeps 8 bits


class Problem:
    """A linear map to be found from its answers; one group learns at half the rate of the other."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.x, truth = torch.randn(32, WIDTH), torch.randn(WIDTH, WIDTH) / WIDTH**0.5
        self.y = self.x @ truth
        weight, bias = nn.Parameter(torch.zeros(WIDTH, WIDTH)), nn.Parameter(torch.ones(WIDTH))
        self.parameters = {"unet.map": weight, "text.bias": bias}
        lr = RATES.get(name, 1e-2)
        rates = (lr, lr if name == "prodigy" else lr / 2)
        settings = OptimizerSettings(name=name, lr=lr)  # type: ignore[arg-type]
        self.optimizer = make_optimizer(
            name,
            [([p], rate) for p, rate in zip(self.parameters.values(), rates, strict=True)],
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            eps=settings.eps,
        )

    def loss(self) -> torch.Tensor:
        weight, bias = self.parameters.values()
        return (self.x @ weight + bias - self.y).square().mean()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()

    def save(self, folder: Path) -> None:
        checkpoint.save(
            folder, step=3, parameters=self.parameters, optimizer=self.optimizer, averages=None, scaler=None,
            save_weights=lambda place: place.mkdir(),
        )  # fmt: skip

    def restore(self, folder: Path) -> None:
        checkpoint.restore(folder, parameters=self.parameters, optimizer=self.optimizer, averages=None, scaler=None)


def equal(one: Any, other: Any) -> bool:
    """Whether two states agree in every bit and type."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls(name: str) -> None:
    problem = Problem(name)
    before = problem.loss().item()
    problem.steps(150)
    with averaged(problem.optimizer):
        assert problem.loss().item() < 0.5 * before


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_brings_everything_back_to_the_bit(name: str, tmp_path: Path) -> None:
    whole, first, second = Problem(name), Problem(name), Problem(name)
    whole.steps(6)
    first.steps(3)
    first.save(tmp_path / "checkpoint")
    second.restore(tmp_path / "checkpoint")
    second.steps(3)
    for key, parameter in whole.parameters.items():
        other = second.parameters[key]
        assert torch.equal(parameter, other)
        state, again = whole.optimizer.state[parameter], second.optimizer.state[other]
        assert state.keys() == again.keys() and all(equal(state[what], again[what]) for what in state)
    for one, again in zip(whole.optimizer.param_groups, second.optimizer.param_groups, strict=True):
        assert one.keys() == again.keys()
        assert all(equal(one[what], again[what]) for what in one if what != "params")


@pytest.mark.parametrize(("name", "types"), [("adamw8bit", {"state1", "state2"}), ("lion8bit", {"state1"})])
def test_states_of_eight_bits_stay_so_in_a_checkpoint(name: str, types: set[str], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    problem = Problem(name)
    problem.steps(2)
    problem.save(tmp_path / "checkpoint")
    kept = load_file(tmp_path / "checkpoint" / "state" / "optimizer.safetensors")
    bytes_ = {key.rpartition("/")[2] for key, value in kept.items() if value.dtype == torch.uint8}
    assert bytes_ == types
    facts = json.loads((tmp_path / "checkpoint" / "state" / "state.json").read_text())
    assert facts["optimizer"]["parameters"]["unet.map"] == {"step": 2}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "prodigy"])
def test_each_group_has_its_own_rate(name: str) -> None:
    problem = Problem(name)
    for group in problem.optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = [parameter.detach().clone() for parameter in problem.parameters.values()]
    problem.steps(1)
    one, two = (
        (parameter - old).square().mean().sqrt().item()
        for parameter, old in zip(problem.parameters.values(), before, strict=True)
    )
    assert two / one == pytest.approx(0.5, rel=0.05)


def test_schedule_free_is_looked_at_without_a_trace() -> None:
    problem, undisturbed = Problem("schedulefree"), Problem("schedulefree")
    for _ in range(3):
        problem.steps(2)
        undisturbed.steps(2)
        training = problem.loss().item()
        with averaged(problem.optimizer):
            assert problem.loss().item() != training
    assert all(torch.equal(p, undisturbed.parameters[key]) for key, p in problem.parameters.items())
    assert problem.optimizer.param_groups[0]["train_mode"]


def test_the_rate_that_prodigy_found_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    problem = Problem("prodigy")
    begun = learning_rate(problem.optimizer)
    problem.steps(50)
    assert begun == pytest.approx(1e-6) and learning_rate(problem.optimizer) > 100 * begun
    assert capsys.readouterr().out == ""  # the library likes to say what it decays


@pytest.mark.parametrize("name", ["adamw8bit", "prodigy", "schedulefree"])
def test_a_run_goes_on_exactly_however_often_it_is_looked_at(
    name: str, sd: Path, photos: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "adapter": {"targets": ["to_q"], "rank": 128},
        "optimizer": {"name": name, "lr": RATES.get(name, 1e-2)},
        "output": {"checkpoint_every": 2},
    }
    for folder, steps in ((tmp_path / "whole", [4]), (tmp_path / "halves", [2, 4])):
        settings["validate"] = {"fraction": 0.3, "every": len(steps)}
        for number, count in enumerate(steps):
            recipe = make_recipe(sd, photos, folder, train={"steps": count}, **settings)
            Run(recipe, resume=number > 0).complete()
    whole, halves = weights(tmp_path / "whole" / "final"), weights(tmp_path / "halves" / "final")
    assert whole.keys() == halves.keys() and all(torch.equal(whole[key], halves[key]) for key in whole)


# --- what is refused --------------------------------------------------------------------------------------------------


def faults(**sections: Any) -> dict[str, str]:
    from sdtune.config.files import check

    values: dict[str, Any] = {"model": {"base": "tiny"}, "data": [{"path": "assets:demo"}], "train": {"steps": 1}}
    return dict(check(values | {"output": {"dir": "run"}} | sections)[1])


def test_prodigys_rate_is_about_one() -> None:
    told = faults(optimizer={"name": "prodigy", "lr": 1e-4})["optimizer.lr"]
    assert told.startswith("got 0.0001, expected about 1.0") and "optimizer.lr=1.0" in told
    assert faults(optimizer={"name": "prodigy", "lr": 1.0}) == {}
    learning = {"kind": "lora", "text_encoder": True}
    two = faults(optimizer={"name": "prodigy", "lr": 1.0, "text_encoder_lr": 0.5}, adapter=learning)
    assert "one rate for all" in two["optimizer.text_encoder_lr"]
    assert faults(optimizer={"name": "prodigy", "lr": 1.0, "text_encoder_lr": 1.0}, adapter=learning) == {}


def test_schedule_free_takes_no_schedule_and_no_ema() -> None:
    told = faults(
        optimizer={"name": "schedulefree", "lr": 1e-3, "schedule": "cosine"}, train={"steps": 1, "ema": 0.9}
    )
    assert set(told) == {"optimizer.schedule", "train.ema"}
    assert faults(optimizer={"name": "schedulefree", "lr": 1e-3, "warmup": 5}) == {}


def test_settings_that_an_optimizer_does_not_read_are_refused() -> None:
    told = faults(optimizer={"name": "adafactor", "lr": 1e-4, "betas": [0.9, 0.99], "eps": 1e-6})
    assert set(told) == {"optimizer.betas", "optimizer.eps"}
    assert set(faults(optimizer={"name": "lion8bit", "lr": 1e-4, "eps": 1e-6})) == {"optimizer.eps"}


@pytest.mark.parametrize(
    ("name", "library"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt"), ("schedulefree", "schedulefree")]
)
def test_a_missing_library_is_named(name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdtune.config import memory_checks

    monkeypatch.setattr(memory_checks, "is_installed", lambda wanted: wanted != library)
    told = faults(optimizer={"name": name, "lr": 1.0})
    assert told["optimizer.name"] == f"{name} needs {library}, which is not installed: pip install {library}"
