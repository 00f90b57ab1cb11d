"""The variance exploding process: pictures stay as they are, and ever more noise is added, in continuous time.

    x_t = x0 + std(t) * eps,    std(t)^2 = (sigma^(2t) - 1) / (2 ln sigma),    t in [0, 1]

It is the solution of dx = sigma^t dw. The network learns the score, the gradient of log p_t(x_t).

Source: Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations", section 3.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdtune.diffusion.schedule import NoiseSchedule, Prediction
from sdtune.errors import WeightsError

FIRST = 1e-5  # the smallest time, for at 0 there is no noise to learn from


@dataclass(frozen=True)
class VarianceExploding:
    """The noise schedule of score models.

    Attributes:
        sigma: how fast the noise grows; 25 for pictures of 28 px. Above 1.
        data_std: deviation of the pixels of clean pictures, for preconditioning (`answer`); None: without.
    """

    sigma: float = 25.0
    data_std: float | None = None
    prediction = Prediction.SCORE

    @property
    def levels(self) -> int | None:
        """None: there is a noise level for every time."""
        return None

    def time(self, u: float) -> float:
        """The time that a number in [0, 1) stands for."""
        return FIRST + (1 - FIRST) * u

    def std(self, t: Tensor) -> Tensor:
        """Deviation of the noise at times (B,), of the same shape."""
        rate = 2 * math.log(self.sigma)
        return (torch.expm1(rate * t) / rate).sqrt()

    def time_of(self, std: Tensor) -> Tensor:
        """The times at which the noise has these deviations: the inverse of `std`."""
        rate = 2 * math.log(self.sigma)
        return torch.log1p(rate * std**2) / rate

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t) = sigma^t of dx = g(t) dw: how fast noise comes in."""
        return self.sigma**t

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t, the noisy pictures.

        Args:
            x0: clean pictures, shape (B, ...).
            eps: standard normal noise of the same shape.
            t: times in (0, 1], shape (B,).
        """
        return (x0 + like(self.std(t), x0) * eps).to(x0.dtype)

    def answer(self, network: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, t: Tensor) -> Tensor:
        """The score, from what a network answers.

        That is its answer over std(t), for scores grow as noise shrinks. With `data_std` the network sees noisy
        pictures scaled to deviation 1, and adds to the best guess that is linear in x_t: so it need not learn to pass
        the noise on where there is little else.

        Args:
            network: (x_t (B, ...), t (B,)) -> (B, ...).
            x_t: noisy pictures, (B, ...). t: times, (B,).

        Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", section 5.
        """
        std = like(self.std(t), x_t)  # (B, 1, ..., 1)
        if self.data_std is None:
            return network(x_t, t) / std
        spread = (std**2 + self.data_std**2).sqrt()  # deviation of x_t
        return self.data_std / (spread * std) * network(x_t / spread, t) - x_t / spread**2

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The score of `add_noise(x0, eps, t)` given x0: -eps / std(t)."""
        return -eps / like(self.std(t), eps)

    def signal(self, t: Tensor) -> Tensor:
        """alpha_bar of the variance preserving process with as much signal for its noise, at times (B,)."""
        return 1 / (1 + self.std(t) ** 2)

    def weight(self, x0: Tensor, t: Tensor) -> Tensor:
        """Of the mean squared error of the score, one a sample, (B,): std(t)^2 times the number of pixels.

        So the loss is the sum over the pixels of (score * std + eps)^2, and an answer of 0 costs about their number.

        Source: Song et al. 2021, as above, eq. 7 with lambda(t) = std(t)^2.
        """
        return (x0[0].numel() * self.std(t) ** 2).to(x0.device)


Schedule = NoiseSchedule | VarianceExploding


def read_schedule(config: Mapping[str, Any]) -> Schedule:
    """The schedule of a `scheduler_config.json`: variance exploding where the network predicts the score.

    Raises:
        WeightsError: a value is not known here.
    """
    if config.get("prediction_type") != Prediction.SCORE.value:
        return NoiseSchedule.from_config(config)
    sigma = config.get("sigma", VarianceExploding.sigma)
    if not isinstance(sigma, (int, float)) or sigma <= 1:
        raise WeightsError(f"the scheduler's configuration has sigma = {sigma!r}; expected a number above 1")
    data_std = config.get("data_std")
    if data_std is not None and not (isinstance(data_std, (int, float)) and data_std > 0):
        raise WeightsError(f"the scheduler's configuration has data_std = {data_std!r}; expected a number above 0")
    return VarianceExploding(float(sigma), data_std)


def like(values: Tensor, x: Tensor) -> Tensor:
    """One number a sample, (B,), shaped to multiply with x, (B, ...)."""
    return values.to(x.device).view(-1, *[1] * (x.ndim - 1))
