"""Drawing from a score model: the ways back from noise to a picture under the variance exploding process.

    x = schedule.std(1) * noise
    x = euler_maruyama(score, x, schedule, steps, fresh_noise)      # (B, C, H, W)

Source: Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations", sections 3 and 4.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sdtune.diffusion.ve import VarianceExploding, like

LAST = 1e-3  # the smallest time at which `probability_flow` asks for the score
SIGNAL_TO_NOISE = 0.16  # of a step of the corrector, as in the paper's appendix G

Score = Callable[[Tensor, Tensor], Tensor]  # (x_t (B, ...), t (B,)) -> the score, of the shape of x_t
Noise = Callable[[], Tensor]  # fresh standard normal noise of the shape of x_t


def euler_maruyama(score: Score, x: Tensor, schedule: VarianceExploding, steps: int, noise: Noise) -> Tensor:
    """The reverse process dx = -g(t)^2 score dt + g(t) dw in equal steps of time down to 0; the last adds no noise.

    Args:
        score: of the network.
        x: noise of deviation `schedule.std(1)`, shape (B, ...).
        steps: 500 is usual, a call of the network each.
        noise: what each step adds.

    Returns:
        Pictures, of the shape of x.
    """
    mean = x
    for t, step in times(x, steps):
        x, mean = reverse_step(score, x, t, step, schedule, noise)
    return mean


def predictor_corrector(score: Score, x: Tensor, schedule: VarianceExploding, steps: int, noise: Noise) -> Tensor:
    """A step of Langevin dynamics before each step of `euler_maruyama`, whose arguments these are: two calls a step.

    Source: as above, algorithm 4 of appendix G.
    """
    mean = x
    for t, step in times(x, steps):
        x = langevin_step(score, x, t, noise)
        x, mean = reverse_step(score, x, t, step, schedule, noise)
    return mean


def probability_flow(score: Score, x: Tensor, schedule: VarianceExploding, steps: int, noise: Noise) -> Tensor:
    """The ordinary equation dx = -g(t)^2 score / 2 dt, which has the same marginals, by Heun's method.

    `noise` is not asked for: the picture follows from the first noise alone. Other arguments as of `euler_maruyama`;
    two calls a step. The steps are equal in log std(t), for the equation is stiff where there is little noise; the last
    takes away what is left of it, by Euler's method.

    Source: as above, section 4.3; Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative
    Models", algorithm 1 (Heun).
    """
    begin, end = schedule.std(torch.tensor([1.0, LAST])).log().tolist()
    levels = torch.linspace(begin, end, steps).exp().to(x.device)  # deviations of the noise, falling

    def slope(x: Tensor, std: Tensor) -> Tensor:
        """dx / dstd = -std * score."""
        return -std * score(x, schedule.time_of(std).expand(len(x)))

    for now, following in zip(levels, levels[1:], strict=False):
        first = slope(x, now)
        guess = x + (following - now) * first
        x = x + (following - now) * (first + slope(guess, following)) / 2
    return x - levels[-1] * slope(x, levels[-1])


VE_SAMPLERS = {
    "euler-maruyama": euler_maruyama,
    "predictor-corrector": predictor_corrector,
    "probability-flow": probability_flow,
}


def calls(method: str, steps: int) -> int:
    """How often a sampler asks for the score."""
    return {"euler-maruyama": steps, "predictor-corrector": 2 * steps, "probability-flow": 2 * steps - 1}[method]


def times(x: Tensor, steps: int) -> Iterator[tuple[Tensor, float]]:
    """Times (B,) from 1 down, each with the length of its step; the last ends at 0."""
    for i in range(steps):
        yield torch.full((len(x),), 1 - i / steps, device=x.device), 1 / steps


def reverse_step(
    score: Score, x: Tensor, t: Tensor, step: float, schedule: VarianceExploding, noise: Noise
) -> tuple[Tensor, Tensor]:
    """x at time t - step, and its mean before noise was added, (B, ...) each."""
    g = schedule.diffusion(t[0])
    mean = x + g**2 * score(x, t) * step
    return mean + g * step**0.5 * noise(), mean


def langevin_step(score: Score, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
    """One step of Langevin dynamics at time t, (B, ...), each as long as its own ratio of noise to score asks for.

    (In the source the ratio is that of the whole batch's mean norms, so that a picture depends on those beside it.)
    """
    gradient, eps = score(x, t), noise()
    ratio = eps.flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1)  # (B,)
    length = like(2 * (SIGNAL_TO_NOISE * ratio) ** 2, x)
    return x + length * gradient + (2 * length).sqrt() * eps
