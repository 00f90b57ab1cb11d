"""The training loop, the only one.

It knows nothing of models, objectives or data: it is given a module that answers with one loss a sample, batches that
carry weights, and parameters, and hands out a `StepInfo` after every optimizer step. Whoever drives it logs, measures,
draws and saves between two steps (`sdtune/run.py`).
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sdtune.data.batches import Batch
from sdtune.errors import TrainingError
from sdtune.optimizers import learning_rate
from sdtune.tasks import Draws, TrainStep


@dataclass(frozen=True)
class StepInfo:
    """What one optimizer step did.

    Attributes:
        step: number of optimizer steps done, from 1.
        loss: sum of weighted losses over the number of instance rows, of all micro-batches and processes.
        lr: learning rate of the first group (`optimizers.learning_rate`).
        grad_norm: norm of the gradient before clipping.
        samples: instance rows seen in this step by all processes.
        seconds: wall time of the step.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    samples: int
    seconds: float


def make_accelerator(precision: str, trackers: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """The connection to devices and other processes.

    Args:
        precision: fp32, bf16 or fp16. trackers: names Accelerate knows.
        folder: of the run; trackers write to its logs/.
    """
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration

    AcceleratorState._reset_state()  # else a second run in this process could not have another precision
    mixed = {"fp32": "no"}.get(precision, precision)
    project = ProjectConfiguration(logging_dir=str(folder / "logs")) if folder else None
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=3))  # while the main process draws, the others wait
    return Accelerator(
        mixed_precision=mixed, log_with=list(trackers) or None, project_config=project, kwargs_handlers=[patience]
    )


def lr_factor(schedule: str, step: int, warmup: int, steps: int) -> float:
    """What the learning rate is multiplied with: a pure function of the step, so that resume needs no state.

    Args:
        step: optimizer steps done. steps: of the whole run.
        schedule: constant, linear (falls to 0) or cosine (half a wave, falls to 0). warmup: steps of linear rise.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - done
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"optimizer.schedule knows constant, linear and cosine, got {schedule}")


class Ema:
    """An exponential moving average of parameters, kept in float32.

    Args:
        parameters: by name. decay: share of the average that is kept at each step, reached after a short warmup.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = dict(parameters), decay
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the parameters after optimizer step `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within: the parameters hold their averages."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange parameters and averages."""
        for name, parameter in self.parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(kept)


def train(
    module: nn.Module,
    optimizer: Any,
    batches: Iterator[Batch],
    draw: Callable[[Batch], Draws],
    accelerator: Accelerator,
    *,
    start: int,
    steps: int,
    accumulate: int,
    factor: Callable[[int], float],
    clip: float | None,
    ema: Ema | None = None,
) -> Iterator[StepInfo]:
    """Run optimizer steps `start` + 1 to `steps`; yields after each.

    Args:
        module: a prepared `TrainStep`.
        optimizer: prepared; each group has a `base_lr` (`make_optimizer`).
        batches: this process's batches, `accumulate` a step, from step `start` on.
        draw: random numbers for a batch.
        factor: learning rate multiplier at a step (from 0).
        clip: largest norm of the gradient, or None.
        ema: updated after each step.

    Raises:
        TrainingError: the loss is not a finite number.
    """
    world, device = accelerator.num_processes, accelerator.device
    for step in range(start, steps):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor(step)
        total, samples = torch.zeros((), device=device), 0
        for micro in range(accumulate):
            batch = next(batches)
            rows = batch.instances * world * accumulate  # instance rows of the whole step
            last = micro == accumulate - 1
            with nullcontext() if last else accelerator.no_sync(module):
                losses = module(batch.to(device), draw(batch).to(device))  # (B,)
                loss = (losses * batch.weights.to(device)).sum() / rows
                accelerator.backward(loss * world)  # gradients of the processes are averaged, their losses summed
            total += loss.detach()
            samples += batch.instances * world
        total = accelerator.reduce(total, reduction="sum")
        if not math.isfinite(total.item()):
            raise TrainingError(
                f"the loss of step {step + 1} is {total.item()}; the run stops before it spoils the weights. "
                "Lower optimizer.lr, set optimizer.clip, or take train.precision=bf16 or fp32, then resume from the "
                "last checkpoint"
            )
        norm = clip_gradients(accelerator, optimizer, clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update(step + 1)
        seconds = time.perf_counter() - began
        yield StepInfo(step + 1, total.item(), learning_rate(optimizer), norm, samples, seconds)


def clip_gradients(accelerator: Accelerator, optimizer: Any, clip: float | None) -> float:
    """Scale the gradient down to norm `clip`; returns its norm before."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = accelerator.clip_grad_norm_(parameters, math.inf if clip is None else clip)
    return float(norm) if isinstance(norm, (Tensor, float)) else 0.0


def prepare(accelerator: Accelerator, task_step: TrainStep, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
    """Put the module on its device, under mixed precision and, with several processes, behind DDP.

    Again, with a new `TrainStep`, when other parameters learn: DDP waits for the gradients of those that did at first.
    """
    accelerator.free_memory()  # what was prepared before
    return accelerator.prepare(task_step, optimizer)
