"""The noise schedule: how much of the picture is left at each timestep.

    x_t = sqrt(alpha_bar_t) * x0 + sqrt(1 - alpha_bar_t) * eps

Only training needs this file; samples are drawn by diffusers' schedulers, from the same configuration.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from sdtune.errors import WeightsError


class Prediction(Enum):
    """What the network is asked for. The values are diffusers' names (`prediction_type`)."""

    EPSILON = "epsilon"  # the noise
    V = "v_prediction"  # the velocity, Salimans & Ho 2022
    X0 = "sample"  # the clean latents
    SCORE = "ve_score"  # the gradient of log p_t, under the variance exploding schedule alone (our name)


@dataclass(frozen=True)
class NoiseSchedule:
    """A discrete, variance preserving noise schedule and what the network predicts under it.

    Attributes:
        alpha_bar: cumulative signal level of each timestep, falling, in [0, 1]. Shape (T,), float32.
        prediction: what the network predicts.

    Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", eq. 4.
    """

    alpha_bar: Tensor
    prediction: Prediction = Prediction.EPSILON

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Reads diffusers' `scheduler_config.json`; what is not given has DDPMScheduler's defaults.

        Raises:
            WeightsError: a value is not known here, or the scheduler is one of flow matching.
        """
        _refuse_flow(config)
        known = [kind.value for kind in Prediction if kind is not Prediction.SCORE]
        prediction = _choice(config, "prediction_type", "epsilon", known)
        alpha_bar = torch.cumprod(1 - _betas(config), dim=0)  # (T,)
        if config.get("rescale_betas_zero_snr"):
            alpha_bar = _rescale_to_zero_terminal_snr(alpha_bar)
        return cls(alpha_bar, Prediction(prediction))

    def __len__(self) -> int:
        """T, the number of timesteps."""
        return len(self.alpha_bar)

    @property
    def levels(self) -> int | None:
        """How many noise levels there are; None would be a continuum."""
        return len(self)

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """The same schedule with its table on `device`."""
        return NoiseSchedule(self.alpha_bar.to(device), self.prediction)

    def time(self, u: float) -> int:
        """The timestep that a number in [0, 1) stands for."""
        return int(u * len(self))

    def answer(self, network: Callable[[Tensor, Tensor], Tensor], x_t: Tensor, t: Tensor) -> Tensor:
        """What a network that counts time from 0 to 1 says of x_t: its answer as it stands.

        Args:
            network: (x_t (B, ...), time in [0, 1), float32, (B,)) -> (B, ...).
            x_t: noisy latents, (B, ...). t: timesteps, (B,).
        """
        return network(x_t, t / len(self))

    def signal(self, t: Tensor) -> Tensor:
        """alpha_bar at timesteps (B,), of the same shape."""
        return self.alpha_bar.to(t.device)[t]

    def weight(self, x0: Tensor, t: Tensor) -> Tensor:
        """Of the mean squared error of what the network predicts, one a sample, (B,): 1."""
        return torch.ones(len(t), device=x0.device)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t, the noisy latents at timesteps `t`.

        Args:
            x0: clean latents, shape (B, ...).
            eps: standard normal noise of the same shape.
            t: timesteps in [0, T), int64, shape (B,).
        """
        signal, noise = self._levels(t, x0)
        return (signal * x0 + noise * eps).to(x0.dtype)

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """v = sqrt(alpha_bar) * eps - sqrt(1 - alpha_bar) * x0. Arguments as in `add_noise`.

        Source: Salimans & Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models", appendix D.
        """
        signal, noise = self._levels(t, x0)
        return (signal * eps - noise * x0).to(x0.dtype)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should answer for `add_noise(x0, eps, t)`: eps, v or x0."""
        match self.prediction:
            case Prediction.EPSILON:
                return eps
            case Prediction.V:
                return self.velocity(x0, eps, t)
            case Prediction.X0:
                return x0
        raise ValueError(f"a discrete schedule has no target for {self.prediction}")

    def _levels(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at `t`, shaped to multiply with `like`."""
        alpha_bar = self.alpha_bar.to(like.device)[t.to(like.device)]  # (B,)
        alpha_bar = alpha_bar.view(-1, *[1] * (like.ndim - 1))  # (B, 1, ..., 1)
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def _betas(config: Mapping[str, Any]) -> Tensor:
    """The noise added at each timestep. Shape (T,), float32, computed in diffusers' order of operations."""
    if config.get("trained_betas") is not None:
        return torch.tensor(config["trained_betas"], dtype=torch.float32)
    kind = _choice(config, "beta_schedule", "linear", ["linear", "scaled_linear", "squaredcos_cap_v2"])
    steps = config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float32)
    if kind == "scaled_linear":  # Stable Diffusion
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32) ** 2
    return _cosine_betas(steps)


def _cosine_betas(steps: int, largest: float = 0.999) -> Tensor:
    """Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", eq. 17. Shape (T,)."""

    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    return torch.tensor([min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), largest) for i in range(steps)])


def _rescale_to_zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Shifts and scales sqrt(alpha_bar) so that the first value stays and the last is 0. Shape (T,).

    Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", algorithm 1.
    """
    root = alpha_bar.sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return root**2


def _choice(config: Mapping[str, Any], key: str, default: str, known: list[str]) -> str:
    value = config.get(key, default)
    if value not in known:
        raise WeightsError(
            f"the scheduler's configuration has {key} = {value!r}, which cannot be trained here; "
            f"expected one of: {', '.join(known)}."
        )
    return value


def _refuse_flow(config: Mapping[str, Any]) -> None:
    name = config.get("_class_name", "")
    key, value = ("use_flow_sigmas", True) if config.get("use_flow_sigmas") else ("_class_name", name)
    if "FlowMatch" in name or config.get("use_flow_sigmas"):
        raise WeightsError(
            f"the scheduler's configuration has {key} = {value!r}, a flow matching model, which cannot be trained "
            "here; expected a model that predicts epsilon or v, such as Stable Diffusion 1.x, 2.x or SDXL."
        )
