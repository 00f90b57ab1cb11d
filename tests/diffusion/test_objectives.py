"""Losses against the formulas in float64, and where diffusers or torch have them against theirs."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from sdtune.diffusion.objectives import (
    Objective,
    debiased_weight,
    denoising_loss,
    elementwise_error,
    masked_mean,
    min_snr_weight,
    offset,
    perturb,
    pool_mask,
    reconstruction_loss,
)
from sdtune.diffusion.schedule import NoiseSchedule, Prediction

DISCRETE = [prediction for prediction in Prediction if prediction is not Prediction.SCORE]

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE = NoiseSchedule.from_config(STABLE_DIFFUSION)
TERMINAL = NoiseSchedule.from_config({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", DISCRETE)
@pytest.mark.parametrize("gamma", [None, 5.0, 1.0])
def test_denoising_loss_is_the_formula(prediction, gamma):
    schedule, t = replace(SCHEDULE, prediction=prediction), torch.tensor([1, 300, 999])
    x0, eps, answer = randn(3, 4, 8, 6), randn(3, 4, 8, 6, seed=1), randn(3, 4, 8, 6, seed=2)
    seen = {}

    def predict(x_t, t):
        seen.update(x_t=x_t, t=t)
        return answer

    loss = denoising_loss(predict, x0, eps, t, schedule, Objective(snr_gamma=gamma))

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
    loss = denoising_loss(lambda x_t, t: x_t.to(dtype), x0, eps, t, SCHEDULE, Objective(snr_gamma=5.0))
    exact = denoising_loss(lambda x_t, t: x_t, x0, eps, t, SCHEDULE, Objective(snr_gamma=5.0))
    assert loss.dtype == torch.float32 and loss.shape == (2,)
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("prediction", [Prediction.EPSILON, Prediction.V])
@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weights_are_those_of_diffusers(prediction, gamma):
    t = torch.arange(1000)
    snr = compute_snr(DDPMScheduler(**STABLE_DIFFUSION), t)  # as examples/text_to_image/train_text_to_image.py uses it
    weights = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    theirs = weights / (snr if prediction is Prediction.EPSILON else snr + 1)
    ours = min_snr_weight(SCHEDULE.alpha_bar[t], gamma, prediction)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_min_snr_is_finite_where_no_signal_is_left():
    t = torch.arange(1000)
    for prediction in DISCRETE:
        assert min_snr_weight(TERMINAL.alpha_bar[t], 5.0, prediction).isfinite().all()
    x0, eps = randn(1, 4, 4, 4), randn(1, 4, 4, 4, seed=1)
    answer = randn(1, 4, 4, 4, seed=2).requires_grad_()
    denoising_loss(
        lambda x_t, t: answer, x0, eps, torch.tensor([999]), TERMINAL, Objective(snr_gamma=5.0)
    ).sum().backward()
    assert answer.grad.isfinite().all()
    with pytest.raises(ValueError, match="gamma of Min-SNR is 0"):
        min_snr_weight(TERMINAL.alpha_bar, 0, Prediction.V)


@pytest.mark.parametrize("prediction", DISCRETE)
def test_debiased_weights_are_one_loss_in_three_terms(prediction):
    alpha_bar = SCHEDULE.alpha_bar.double()
    weights = debiased_weight(SCHEDULE.alpha_bar, prediction)
    assert weights.dtype == torch.float32
    for t in (0, 17, 500, 999):
        a = alpha_bar[t].item()
        snr = a / (1 - a)
        x_t, off = 0.7, 0.3  # an answer whose x0 is wrong by `off`, as epsilon and v see it
        x0 = 0.2
        eps, wrong_eps = (
            (x_t - math.sqrt(a) * x0) / math.sqrt(1 - a),
            (x_t - math.sqrt(a) * (x0 + off)) / math.sqrt(1 - a),
        )
        v = math.sqrt(a) * eps - math.sqrt(1 - a) * x0
        wrong_v = math.sqrt(a) * wrong_eps - math.sqrt(1 - a) * (x0 + off)
        squared = {
            Prediction.EPSILON: (wrong_eps - eps) ** 2,
            Prediction.V: (wrong_v - v) ** 2,
            Prediction.X0: off**2,
        }[prediction]
        published = (wrong_eps - eps) ** 2 / math.sqrt(snr)  # Yu et al. 2023: 1 / sqrt(SNR) of the error of epsilon
        assert weights[t].item() * squared == pytest.approx(published, rel=1e-3)


def test_debiased_weights_multiply_the_loss():
    x0, eps, answer = randn(3, 4, 8, 6), randn(3, 4, 8, 6, seed=1), randn(3, 4, 8, 6, seed=2)
    t = torch.tensor([1, 300, 999])
    loss = denoising_loss(lambda x_t, t: answer, x0, eps, t, SCHEDULE, Objective(debiased=True))
    snr = compute_snr(DDPMScheduler(**STABLE_DIFFUSION), t)
    torch.testing.assert_close(loss, (answer - eps).square().mean(dim=(1, 2, 3)) / snr.sqrt())
    zero = denoising_loss(lambda x_t, t: answer, x0, eps, torch.tensor([0, 5, 999]), TERMINAL, Objective(debiased=True))
    assert zero.isfinite().all() and zero[2] == 0  # v and x0 at SNR 0
    with pytest.raises(ValueError, match="both snr_gamma and debiased"):
        Objective(snr_gamma=5.0, debiased=True)


@pytest.mark.parametrize("delta", [0.1, 1.0])
def test_what_an_element_costs(delta):
    answer, target = randn(500), randn(500, seed=1)
    e = (answer.double() - target.double()).abs()
    expected = {
        "l2": e * e,
        "l1": e,
        "huber": torch.where(e < delta, e * e / 2, delta * (e - delta / 2)),
    }
    theirs = {
        "l2": torch.nn.functional.mse_loss(answer, target, reduction="none"),
        "l1": torch.nn.functional.l1_loss(answer, target, reduction="none"),
        "huber": torch.nn.functional.huber_loss(answer, target, reduction="none", delta=delta),
    }
    for loss in expected:
        ours = elementwise_error(answer, target, loss, delta)
        torch.testing.assert_close(ours.double(), expected[loss], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours, theirs[loss])
        whole = denoising_loss(
            lambda x_t, t: answer.view(1, 5, 10, 10), torch.zeros(1, 5, 10, 10), target.view(1, 5, 10, 10),
            torch.tensor([5]), SCHEDULE, Objective(loss=loss, huber_delta=delta),
        )  # fmt: skip
        assert whole.item() == pytest.approx(expected[loss].mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="l2, l1 or huber, got l3"):
        elementwise_error(answer, target, "l3")


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_offset_noise_and_input_perturbation_are_those_of_the_published_scripts(prediction):
    theirs = DDPMScheduler(**STABLE_DIFFUSION, prediction_type=prediction)
    x0, eps, level, more = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), randn(2, 4, 1, 1, seed=2), randn(2, 4, 8, 8)
    t = torch.tensor([20, 800])
    # examples/text_to_image/train_text_to_image.py of diffusers
    noise = eps + 0.05 * level
    new_noise = noise + 0.1 * more
    noisy = theirs.add_noise(x0, new_noise, t)
    target = noise if prediction == "epsilon" else theirs.get_velocity(x0, noise, t)
    seen = []

    def predict(x_t, t):
        seen.append(x_t)
        return torch.zeros_like(x_t)

    ours = offset(eps, level, 0.05)
    schedule = NoiseSchedule.from_config(theirs.config)
    loss = denoising_loss(predict, x0, ours, t, schedule, shown=perturb(ours, more, 0.1))
    torch.testing.assert_close(seen[0], noisy)
    torch.testing.assert_close(loss, target.square().mean(dim=(1, 2, 3)))


def test_masks_are_pooled_to_the_share_that_lies_inside():
    mask = torch.zeros(1, 1, 8, 16, dtype=torch.uint8)
    mask[..., :4, :8] = 255
    mask[..., 4, 0] = 255
    assert pool_mask(mask, 2, 4).tolist() == [[[[1, 1, 0, 0], [1 / 16, 0, 0, 0]]]]


@pytest.mark.parametrize("outside", [0.0, 0.25, 1.0])
def test_masked_loss_is_the_weighted_mean(outside):
    x0, eps, answer = randn(2, 4, 6, 5), randn(2, 4, 6, 5, seed=1), randn(2, 4, 6, 5, seed=2)
    mask = torch.rand(2, 1, 6, 5, generator=torch.Generator().manual_seed(0))
    t, objective = torch.tensor([3, 700]), Objective(outside_mask=outside)
    loss = denoising_loss(lambda x_t, t: answer, x0, eps, t, SCHEDULE, objective, mask=mask)
    for i in range(2):
        cost = weight = 0.0
        for y in range(6):
            for x in range(5):
                w = outside + (1 - outside) * mask[i, 0, y, x].item()
                for c in range(4):
                    cost += w * (answer[i, c, y, x].item() - eps[i, c, y, x].item()) ** 2
                    weight += w
        assert loss[i].item() == pytest.approx(cost / weight, rel=1e-5)


def test_a_mask_of_everything_is_no_mask_and_one_of_nothing_costs_nothing():
    x0, eps, answer = randn(3, 4, 7, 9), randn(3, 4, 7, 9, seed=1), randn(3, 4, 7, 9, seed=2)
    t = torch.tensor([3, 200, 700])
    plain = denoising_loss(lambda x_t, t: answer, x0, eps, t, SCHEDULE)
    whole = pool_mask(torch.full((3, 1, 56, 72), 255, dtype=torch.uint8), 7, 9)
    for outside in (0.0, 0.3):
        objective = Objective(outside_mask=outside)
        masked = denoising_loss(lambda x_t, t: answer, x0, eps, t, SCHEDULE, objective, mask=whole)
        assert torch.equal(masked, plain)
    assert torch.equal(denoising_loss(lambda x_t, t: answer, x0, eps, t, SCHEDULE, mask=0 * whole), plain)  # not read
    assert torch.equal(masked_mean(answer.square(), 0 * whole, 0.0), torch.zeros(3))


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
