"""The optimizers, by the names of the recipe."""

from collections.abc import Sequence

import torch
from torch import nn


def make_optimizer(
    groups: Sequence[tuple[Sequence[nn.Parameter], float]],
    *,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.Optimizer:
    """AdamW over groups of (parameters, learning rate). Source: Loshchilov & Hutter 2019."""
    settings = [{"params": list(parameters), "lr": lr, "base_lr": lr} for parameters, lr in groups]
    return torch.optim.AdamW(settings, betas=betas, eps=eps, weight_decay=weight_decay)
