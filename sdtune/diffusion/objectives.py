"""What the loss is. Every function is pure and answers one float32 number a sample, (B,)."""

from collections.abc import Callable

from torch import Tensor

from sdtune.diffusion.schedule import NoiseSchedule, Prediction


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    snr_gamma: float | None = None,
) -> Tensor:
    """Mean squared error of the network's prediction, one a sample.

    Args:
        predict: the network with its conditioning bound: (x_t, t) -> epsilon, v or x0, as `schedule.prediction` says.
        x0: clean latents, shape (B, C, H, W).
        eps: standard normal noise of the same shape.
        t: timesteps in [0, T), int64, shape (B,).
        schedule: noise levels, and what the network predicts.
        snr_gamma: weighs by Min-SNR-gamma; None weighs every timestep alike.

    Returns:
        Losses of shape (B,), float32, whatever the dtype of the prediction.

    Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models", eq. 14.
    """
    x_t = schedule.add_noise(x0, eps, t)  # (B, C, H, W)
    error = predict(x_t, t).float() - schedule.target(x0, eps, t).float()
    loss = error.square().flatten(1).mean(dim=1)  # (B,)
    if snr_gamma is None:
        return loss
    alpha_bar = schedule.alpha_bar.to(t.device)[t]  # (B,)
    return loss * min_snr_weight(alpha_bar, snr_gamma, schedule.prediction).to(loss.device)


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
