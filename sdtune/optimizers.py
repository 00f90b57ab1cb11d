"""The optimizers, by the names that a recipe calls them. Each is the library's own; what is special to one of them is
settled here, so that the loop, checkpoints and samples treat them all alike.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

# Bytes of state for each number that learns, about. Adafactor keeps a row and a column of a matrix, and two thirds of a
# 3 x 3 convolution.
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "lion8bit": 1, "adafactor": 2, "prodigy": 16, "schedulefree": 8}


def make_optimizer(
    name: str,
    groups: Sequence[tuple[Sequence[nn.Parameter], float]],
    *,
    weight_decay: float,
    betas: Sequence[float],
    eps: float,
) -> Optimizer:
    """An optimizer over groups of (parameters, learning rate).

    Args:
        name: adamw, adamw8bit, lion8bit, adafactor, prodigy or schedulefree.
        weight_decay: decoupled. betas, eps: Adafactor reads neither, Lion no eps.

    Returns:
        One whose groups keep their rate as `base_lr` too, ready for its first step.

    Sources: Loshchilov & Hutter 2019 (AdamW); Dettmers et al. 2022 (8-bit states); Chen et al. 2023 (Lion); Shazeer &
    Stern 2018 (Adafactor); Mishchenko & Defazio 2023 (Prodigy); Defazio et al. 2024 (schedule-free).
    """
    # The decay stands in the groups: given as an argument, Prodigy's would be announced on stdout.
    settings: list[dict[str, Any]] = [
        {"params": list(parameters), "lr": lr, "base_lr": lr, "weight_decay": weight_decay} for parameters, lr in groups
    ]
    adam: dict[str, Any] = {"betas": tuple(betas), "eps": eps}
    match name:
        case "adamw":
            return torch.optim.AdamW(settings, **adam)
        case "adamw8bit":
            from bitsandbytes.optim.adamw import AdamW8bit

            return AdamW8bit(settings, **adam)
        case "lion8bit":
            from bitsandbytes.optim.lion import Lion8bit

            return Lion8bit(settings, betas=tuple(betas))
        case "adafactor":
            # Not torch's: there a parameter's step is in proportion to its size, and LoRA's second factor starts at 0.
            from transformers.optimization import Adafactor

            return Adafactor(settings, scale_parameter=False, relative_step=False)
        case "prodigy":
            from prodigyopt import Prodigy

            return Prodigy(settings, **adam, use_bias_correction=True, safeguard_warmup=True)
        case "schedulefree":
            from schedulefree import AdamWScheduleFree

            free = AdamWScheduleFree(settings, **adam)
            free.train()
            return free
    raise ValueError(f"optimizer.name knows no {name}")


def learning_rate(optimizer: Any) -> float:
    """The rate of the first group that learns; of Prodigy, which multiplies it with an estimate of its own, the
    product.
    """
    groups = optimizer.param_groups
    group = next((each for each in groups if any(p.requires_grad for p in each["params"])), groups[0])
    return group["lr"] * group.get("d", 1.0)


@contextmanager
def averaged(optimizer: Any) -> Iterator[None]:
    """Within: the parameters hold what is to be measured, drawn and saved.

    A schedule-free optimizer trains at another point than the average that is its result; for the others nothing
    changes. Afterwards every bit is as before, so that a run does not depend on when it is looked at.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    kept = [(p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"]]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            for parameter, before in kept:  # train() comes back to it only within rounding
                parameter.copy_(before)
