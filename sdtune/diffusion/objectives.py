"""What the loss is. Every function is pure and answers one float32 number a sample, (B,)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sdtune.diffusion.schedule import Prediction
from sdtune.diffusion.ve import Schedule

Loss = Literal["l2", "l1", "huber"]


@dataclass(frozen=True)
class Objective:
    """How a denoiser's answer is judged. As it stands: plain mean squared error.

    Attributes:
        loss: what an error costs: its square, its amount, or Huber's mixture.
        huber_delta: where Huber's error turns from a parabola into a line.
        snr_gamma: weighs by Min-SNR-gamma; None does not.
        debiased: weighs by debiased estimation.
        offset_noise: strength of noise that is one number for a whole channel, added to the noise; 0 for none.
        input_perturbation: strength of noise that the network sees and is not asked for; 0 for none.
        outside_mask: weight of the error outside a picture's mask, in [0, 1]; None passes over masks.

    Raises:
        ValueError: both `snr_gamma` and `debiased`.
    """

    loss: Loss = "l2"
    huber_delta: float = 0.1
    snr_gamma: float | None = None
    debiased: bool = False
    offset_noise: float = 0.0
    input_perturbation: float = 0.0
    outside_mask: float | None = None

    def __post_init__(self) -> None:
        if self.debiased and self.snr_gamma is not None:
            raise ValueError("got both snr_gamma and debiased, two weights of the timesteps; expected one of them")


PLAIN = Objective()


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    schedule: Schedule,
    objective: Objective = PLAIN,
    shown: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Error of the network's prediction, one a sample.

    Args:
        predict: the network with its conditioning bound: (x_t, t) -> epsilon, v, x0 or score, as
            `schedule.prediction` says.
        x0: clean latents, shape (B, C, H, W).
        eps: the noise that is asked for, of the same shape.
        t: timesteps of the schedule, shape (B,).
        schedule: noise levels, what the network predicts, and how much its error weighs at each.
        objective: how the answer is judged.
        shown: the noise that the network sees (see `perturb`); None: `eps`.
        mask: in [0, 1], 1 where the error counts in full, shape (B, 1, H, W); None: everywhere.

    Returns:
        Losses of shape (B,), float32, whatever the dtype of the prediction.

    Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", eq. 14.
    """
    x_t = schedule.add_noise(x0, eps if shown is None else shown, t)  # (B, C, H, W)
    answer = predict(x_t, t).float()
    target = schedule.target(x0, eps, t).float()
    error = elementwise_error(answer, target, objective.loss, objective.huber_delta)  # (B, C, H, W)
    if mask is None or objective.outside_mask is None:
        loss = error.flatten(1).mean(dim=1)  # (B,)
    else:
        loss = masked_mean(error, mask.to(error.device), objective.outside_mask)
    loss = loss * schedule.weight(x0, t)
    if objective.snr_gamma is not None:
        return loss * min_snr_weight(schedule.signal(t), objective.snr_gamma, schedule.prediction).to(loss.device)
    if objective.debiased:
        return loss * debiased_weight(schedule.signal(t), schedule.prediction).to(loss.device)
    return loss


def elementwise_error(answer: Tensor, target: Tensor, loss: Loss, delta: float = 0.1) -> Tensor:
    """What each element costs, of the shape of both.

    Args:
        loss: l2: e^2; l1: |e|; huber: e^2 / 2 where |e| < delta, and delta * (|e| - delta / 2) beyond.

    Source of the last: Huber 1964, "Robust Estimation of a Location Parameter", section 3.
    """
    match loss:
        case "l2":
            return (answer - target).square()
        case "l1":
            return (answer - target).abs()
        case "huber":
            return F.huber_loss(answer, target, reduction="none", delta=delta)
    raise ValueError(f"the error of an element is l2, l1 or huber, got {loss}")


def masked_mean(error: Tensor, mask: Tensor, outside: float) -> Tensor:
    """The mean over each sample, where what lies outside the mask counts less; (B,).

    It is divided by the weights, so that a picture counts alike whether its mask is small or large; a mask of ones
    gives the plain mean. Where nothing counts at all the loss is 0.

    Args:
        error: shape (B, C, H, W).
        mask: in [0, 1], shape (B, 1, H, W).
        outside: weight where the mask is 0, in [0, 1]; where it is 1 the weight is 1.
    """
    weight = outside + (1 - outside) * mask  # (B, 1, H, W)
    share = weight.flatten(1).mean(dim=1)  # (B,)
    return (weight * error).flatten(1).mean(dim=1) / share.clamp(min=torch.finfo(share.dtype).tiny)


def pool_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """A mask at the size of latents: the mean of the pixels that each stands for.

    Args:
        mask: uint8, 255 inside, shape (B, 1, H, W).

    Returns:
        In [0, 1], float32, shape (B, 1, height, width).
    """
    return F.adaptive_avg_pool2d(mask.float() / 255, (height, width))


def offset(eps: Tensor, level: Tensor, strength: float) -> Tensor:
    """Noise that also moves whole channels, so that the model learns to change a picture's mean brightness.

    Args:
        eps: standard normal, shape (B, C, H, W).
        level: standard normal, one number a sample and channel, shape (B, C, 1, 1).
        strength: 0.1 in the source. The network is asked for the sum.

    Source: Guttenberg 2023, "Diffusion with Offset Noise".
    """
    return eps + strength * level


def perturb(eps: Tensor, more: Tensor, strength: float) -> Tensor:
    """The noise that the network is shown, when `eps` is what it is asked for: training feels the errors of sampling.

    Args:
        eps: noise, any shape.
        more: standard normal of the same shape.
        strength: 0.1 in the paper.

    Source: Ning et al. 2023, "Input Perturbation Reduces Exposure Bias in Diffusion Models", algorithm 1.
    """
    return eps + strength * more


def debiased_weight(alpha_bar: Tensor, prediction: Prediction) -> Tensor:
    """Loss weight of debiased estimation, one a sample: 1 / sqrt(SNR) of the squared error of epsilon.

    For v and x0 it is the same loss in their terms: an error of x0 is one of epsilon times sqrt(SNR), one of v is one
    of x0 times sqrt(SNR + 1).

    Args:
        alpha_bar: cumulative signal level at each sample's timestep, in [0, 1). Shape (B,). Above 0 for epsilon.
        prediction: what the network predicts.

    Returns:
        Weights of shape (B,), float32, for the squared error of `prediction`.

    Source: Yu et al. 2023, "Debias the Training of Diffusion Models" (epsilon).
    """
    snr = alpha_bar.float() / (1 - alpha_bar.float())  # (B,)
    match prediction:
        case Prediction.EPSILON:
            return snr.rsqrt()
        case Prediction.V:
            return snr.sqrt() / (snr + 1)
        case Prediction.X0:
            return snr.sqrt()
    raise ValueError(f"debiased weighting knows epsilon, v and x0, got {prediction}")


def min_snr_weight(alpha_bar: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """Loss weight of Min-SNR-gamma, one a sample.

    Args:
        alpha_bar: cumulative signal level at each sample's timestep, in [0, 1). Shape (B,).
        gamma: SNR clamp; 5.0 in the paper. Must be > 0.
        prediction: what the network predicts; the weight differs for epsilon, v and x0.

    Returns:
        Weights of shape (B,), float32, for the squared error of `prediction`. Finite at zero SNR too.

    Source: Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4.
    """
    if gamma <= 0:
        raise ValueError(f"gamma of Min-SNR is {gamma}; expected a number above 0, 5.0 in the paper")
    snr = alpha_bar.float() / (1 - alpha_bar.float())  # (B,)
    clamped = snr.clamp(max=gamma)
    match prediction:
        case Prediction.EPSILON:
            return (gamma / snr).clamp(max=1)  # = clamped / snr, and 1 where snr is 0
        case Prediction.V:
            return clamped / (snr + 1)
        case Prediction.X0:
            return clamped
    raise ValueError(f"min-SNR weighting knows epsilon, v and x0, got {prediction}")


def reconstruction_loss(
    pixels: Tensor, reconstruction: Tensor, mean: Tensor, logvar: Tensor, l1: float, l2: float, kl: float
) -> Tensor:
    """Loss of an autoencoder, one a sample: l1 * |error| + l2 * error^2 + kl * KL(latents || standard normal).

    Args:
        pixels: pictures in [-1, 1], shape (B, 3, H, W).
        reconstruction: the decoder's answer, of the same shape.
        mean: mean of each latent, shape (B, C, h, w).
        logvar: log of the variance of each latent, of the same shape.
        l1, l2, kl: weights. All three terms are means over elements, so that they do not grow with the picture.

    Returns:
        Losses of shape (B,), float32.

    Source: Kingma & Welling 2014, "Auto-Encoding Variational Bayes", appendix B (the KL term).
    """
    error = (reconstruction.float() - pixels.float()).flatten(1)  # (B, 3*H*W)
    mean, logvar = mean.float().flatten(1), logvar.float().flatten(1)  # (B, C*h*w)
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    return l1 * error.abs().mean(dim=1) + l2 * error.square().mean(dim=1) + kl * divergence.mean(dim=1)
