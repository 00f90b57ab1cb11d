"""Everything a run needs to go on, written aside and renamed, so that a checkpoint is whole or absent.

    checkpoints/step-000100/weights/    laid out as final/: usable by other tools
    checkpoints/step-000100/state/      trainable.safetensors  optimizer.safetensors  ema.safetensors  state.json

Tensors are safetensors, never pickles. Random numbers need no state (`diffusion/draws.py`).
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdtune.errors import RunError
from sdtune.run_folder import all_checkpoints
from sdtune.writing import written_aside

# Settings of an optimizer's groups that are not state: they follow from the recipe.
FROM_RECIPE = ("params", "lr", "base_lr", "weight_decay", "betas", "eps")


def save(
    folder: Path,
    *,
    step: int,
    same: Mapping[str, Any] | None = None,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    averages: Mapping[str, Tensor] | None,
    scaler: Any | None,
    save_weights: Callable[[Path], None],
) -> None:
    """Write a checkpoint.

    Args:
        folder: where, e.g. checkpoints/step-000100.
        step: optimizer steps done.
        same: what must be the same when the run goes on, by its name in words.
        parameters: those that learn, by name, in the optimizer's order.
        averages: the EMA, by the same names.
        scaler: the loss scaler of fp16, if any.
        save_weights: writes `weights/`.
    """
    with written_aside(folder) as aside:
        state = aside / "state"
        state.mkdir()
        save_file(
            {name: p.detach().cpu().contiguous() for name, p in parameters.items()}, state / "trainable.safetensors"
        )
        save_file(optimizer_tensors(parameters, optimizer), state / "optimizer.safetensors")
        if averages is not None:
            save_file({name: a.cpu().contiguous() for name, a in averages.items()}, state / "ema.safetensors")
        facts: dict[str, Any] = {"step": step, "same": dict(same or {}), "format": 1}
        facts["optimizer"] = optimizer_numbers(parameters, optimizer)
        facts["scaler"] = scaler.state_dict() if scaler is not None else None
        (state / "state.json").write_text(json.dumps(facts), encoding="utf-8")
        save_weights(aside / "weights")


def optimizer_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors, in their own types, under "parameter name/what"."""
    return {
        f"{name}/{what}": value.detach().cpu().contiguous().clone()
        for name, parameter in parameters.items()
        for what, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def optimizer_numbers(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What optimizers keep as Python numbers: for each parameter, and for each group in place of its defaults."""
    of_parameters: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        for what, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                of_parameters.setdefault(name, {})[what] = value
    of_groups = [
        {what: value for what, value in group.items()
         if what not in FROM_RECIPE and value != optimizer.defaults.get(what)}
        for group in optimizer.param_groups
    ]  # fmt: skip
    return {"parameters": of_parameters, "groups": of_groups}


def restore_optimizer(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> None:
    """Put back what `optimizer_tensors` and `optimizer_numbers` gave."""
    for key, value in tensors.items():
        name, _, what = key.rpartition("/")
        parameter = parameters[name]
        optimizer.state[parameter][what] = value if what == "step" else value.to(parameter.device)
    for name, some in numbers.get("parameters", {}).items():
        optimizer.state[parameters[name]].update(some)
    for group, some in zip(optimizer.param_groups, numbers.get("groups", ()), strict=False):
        group.update(some)


def restore(
    folder: Path,
    *,
    same: Mapping[str, Any] | None = None,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    averages: dict[str, Tensor] | None,
    scaler: Any | None,
) -> int:
    """Put a checkpoint back; returns the number of optimizer steps done.

    Raises:
        RunError: the checkpoint is damaged, or of a run with other learning parameters, or one of `same` differs.
    """
    state = folder / "state"
    if (averages is not None) != (state / "ema.safetensors").exists() and (state / "state.json").exists():
        had, has = ("no EMA", "one") if averages is not None else ("an EMA", "none")
        raise RunError(
            f"'{folder}' is of a run with {had}, this recipe has {has} (train.ema); resume with the recipe that made "
            "it (run.yaml of the run folder)"
        )
    try:
        facts = json.loads((state / "state.json").read_text(encoding="utf-8"))
        trainable = load_file(state / "trainable.safetensors")
        moments = load_file(state / "optimizer.safetensors")
        averaged = load_file(state / "ema.safetensors") if averages is not None else {}
    except (OSError, ValueError, SafetensorError) as fault:
        raise RunError(
            f"'{folder}' is not a whole checkpoint ({fault}); remove it and resume from the one before"
        ) from fault
    told = [f"{what}: {was} then, {same[what]} now" for what, was in facts.get("same", {}).items()
            if same is not None and same.get(what) != was]  # fmt: skip
    if told:
        raise RunError(
            f"'{folder}' would not go on as it began: {'; '.join(told)}. Put back what was changed, or begin another "
            "run with output.dir=FOLDER"
        )
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in trainable.items()}:
        raise RunError(
            f"'{folder}' holds {len(trainable)} learning tensors, this recipe has {len(shapes)}, or they differ in "
            "shape; resume with the recipe that made it (run.yaml of the run folder)"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(trainable[name])
    restore_optimizer(parameters, optimizer, moments, facts.get("optimizer", {}))
    if averages is not None:
        for name, average in averages.items():
            average.copy_(averaged[name])
    if scaler is not None and facts["scaler"]:
        scaler.load_state_dict(facts["scaler"])
    return facts["step"]


def forget_old(run: Path, keep: int | None) -> None:
    """Remove all but the last `keep` checkpoints; None keeps all."""
    if keep is not None:
        for folder in all_checkpoints(run)[:-keep]:
            shutil.rmtree(folder)
