"""Losses against the formulas in float64, and Min-SNR weights against diffusers."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from sdtune.diffusion.objectives import denoising_loss, min_snr_weight, reconstruction_loss
from sdtune.diffusion.schedule import NoiseSchedule, Prediction

SCHEDULE = NoiseSchedule.from_config({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
TERMINAL = NoiseSchedule.from_config({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", Prediction)
@pytest.mark.parametrize("gamma", [None, 5.0, 1.0])
def test_denoising_loss_is_the_formula(prediction, gamma):
    schedule, t = replace(SCHEDULE, prediction=prediction), torch.tensor([1, 300, 999])
    x0, eps, answer = randn(3, 4, 8, 6), randn(3, 4, 8, 6, seed=1), randn(3, 4, 8, 6, seed=2)
    seen = {}

    def predict(x_t, t):
        seen.update(x_t=x_t, t=t)
        return answer

    loss = denoising_loss(predict, x0, eps, t, schedule, gamma)

    for i in range(3):  # sample by sample, in float64
        a = schedule.alpha_bar[t[i]].double()
        x, e = x0[i].double(), eps[i].double()
        target = {
            Prediction.EPSILON: e,
            Prediction.V: a.sqrt() * e - (1 - a).sqrt() * x,
            Prediction.X0: x,
        }[prediction]
        snr = a / (1 - a)
        clamped = min(snr, torch.tensor(gamma or 0.0, dtype=torch.float64))
        weight = {
            Prediction.EPSILON: clamped / snr,
            Prediction.V: clamped / (snr + 1),
            Prediction.X0: clamped,
        }[prediction]
        expected = (answer[i].double() - target).square().mean() * (weight if gamma else 1)
        torch.testing.assert_close(loss[i].double(), expected, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(seen["x_t"][i].double(), a.sqrt() * x + (1 - a).sqrt() * e, rtol=1e-5, atol=1e-6)
    assert torch.equal(seen["t"], t)


def test_a_perfect_prediction_costs_nothing():
    x0, eps, t = randn(2, 4, 4, 4), randn(2, 4, 4, 4, seed=1), torch.tensor([10, 700])
    assert torch.equal(denoising_loss(lambda x_t, t: eps, x0, eps, t, SCHEDULE), torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_is_float32_under_low_precision(dtype):
    x0, eps, t = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), torch.tensor([10, 700])
    loss = denoising_loss(lambda x_t, t: x_t.to(dtype), x0, eps, t, SCHEDULE, 5.0)
    exact = denoising_loss(lambda x_t, t: x_t, x0, eps, t, SCHEDULE, 5.0)
    assert loss.dtype == torch.float32 and loss.shape == (2,)
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("prediction", [Prediction.EPSILON, Prediction.V])
@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weights_are_those_of_diffusers(prediction, gamma):
    t = torch.arange(1000)
    snr = compute_snr(
        DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"), t
    )  # as examples/text_to_image/train_text_to_image.py uses it
    weights = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    theirs = weights / (snr if prediction is Prediction.EPSILON else snr + 1)
    ours = min_snr_weight(SCHEDULE.alpha_bar[t], gamma, prediction)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_min_snr_is_finite_where_no_signal_is_left():
    t = torch.arange(1000)
    for prediction in Prediction:
        assert min_snr_weight(TERMINAL.alpha_bar[t], 5.0, prediction).isfinite().all()
    x0, eps = randn(1, 4, 4, 4), randn(1, 4, 4, 4, seed=1)
    answer = randn(1, 4, 4, 4, seed=2).requires_grad_()
    denoising_loss(lambda x_t, t: answer, x0, eps, torch.tensor([999]), TERMINAL, 5.0).sum().backward()
    assert answer.grad.isfinite().all()
    with pytest.raises(ValueError, match="gamma of Min-SNR is 0"):
        min_snr_weight(TERMINAL.alpha_bar, 0, Prediction.V)


def test_reconstruction_loss_is_the_formula():
    pixels, reconstruction = randn(2, 3, 16, 16), randn(2, 3, 16, 16, seed=1)
    mean, logvar = randn(2, 4, 4, 4, seed=2), randn(2, 4, 4, 4, seed=3)
    loss = reconstruction_loss(pixels, reconstruction, mean, logvar, l1=1.0, l2=0.5, kl=1e-2)
    normal = torch.distributions.Normal(0.0, 1.0)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (0.5 * logvar).exp()), normal)
    for i in range(2):
        error = pixels[i].double() - reconstruction[i].double()
        expected = error.abs().mean() + 0.5 * error.square().mean() + 1e-2 * kl[i].double().mean()
        torch.testing.assert_close(loss[i].double(), expected)
    assert loss.dtype == torch.float32


def test_reconstruction_of_low_precision_is_float32():
    x, latent = randn(2, 3, 8, 8).bfloat16(), torch.zeros(2, 4, 2, 2).bfloat16()
    loss = reconstruction_loss(x, x, latent, latent, 1.0, 1.0, 1.0)
    assert loss.dtype == torch.float32 and torch.equal(loss, torch.zeros(2))
