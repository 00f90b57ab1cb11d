"""The data of the first two pages: single numbers, two thirds of them near +1, one third near -1.

Real data are pictures, of which nobody knows the density. Of these numbers everything is known, also with noise on
them, so that what a network learned can be held against the truth.
"""

import torch
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, Normal

SHARES, PEAKS, WIDTH = torch.tensor([1 / 3, 2 / 3]), torch.tensor([-1.0, 1.0]), 0.15


def noisy(signal: float, noise: float) -> MixtureSameFamily:
    """The distribution of x_t = signal * x0 + noise * eps, exactly.

    Each peak stays a Gaussian: it moves to signal * peak, and its variance becomes (signal * WIDTH)^2 + noise^2.
    """
    deviation = ((signal * WIDTH) ** 2 + noise**2) ** 0.5
    return MixtureSameFamily(Categorical(SHARES), Normal(signal * PEAKS, deviation))


def draw(count: int, generator: torch.Generator) -> Tensor:
    """Numbers x0 of the data, shape (count, 1)."""
    which = torch.multinomial(SHARES, count, replacement=True, generator=generator)  # (count,)
    return (PEAKS[which] + WIDTH * torch.randn(count, generator=generator))[:, None]


def true_score(x: Tensor, signal: float, noise: float) -> Tensor:
    """d/dx log p_t(x): which way, and how steeply, the numbers get more likely. Shape of x."""
    x = x.detach().requires_grad_()
    (score,) = torch.autograd.grad(noisy(signal, noise).log_prob(x).sum(), x)
    return score
