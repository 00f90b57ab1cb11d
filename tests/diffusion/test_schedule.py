"""Noise schedules against diffusers' schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from sdtune.diffusion.schedule import NoiseSchedule, Prediction
from sdtune.errors import WeightsError

DISCRETE = [prediction for prediction in Prediction if prediction is not Prediction.SCORE]

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CONFIGS = [
    {},
    STABLE_DIFFUSION,
    {**STABLE_DIFFUSION, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    {"beta_schedule": "linear", "beta_start": 0.001, "beta_end": 0.03, "num_train_timesteps": 250},
    {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"},
    {"trained_betas": [0.1, 0.2, 0.35, 0.5], "num_train_timesteps": 4},
]


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_alpha_bar_is_that_of_diffusers(scheduler, config):
    theirs = scheduler(**config)
    ours = NoiseSchedule.from_config(theirs.config)
    assert ours.alpha_bar.dtype == torch.float32
    assert len(ours) == theirs.config.num_train_timesteps
    assert ours.prediction.value == theirs.config.prediction_type
    torch.testing.assert_close(ours.alpha_bar, theirs.alphas_cumprod, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(NoiseSchedule.from_config(config).alpha_bar, ours.alpha_bar)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_noise_and_velocity_are_those_of_diffusers(config):
    theirs = DDPMScheduler(**config)
    ours = NoiseSchedule.from_config(theirs.config)
    last = len(ours) - 1
    t = torch.tensor([0, last // 2, last])
    x0, eps = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.add_noise(x0, eps, t), theirs.add_noise(x0, eps, t))
    torch.testing.assert_close(ours.velocity(x0, eps, t), theirs.get_velocity(x0, eps, t))


def test_zero_terminal_snr_ends_in_noise_alone():
    schedule = NoiseSchedule.from_config({**STABLE_DIFFUSION, "rescale_betas_zero_snr": True})
    x0, eps, t = torch.ones(1, 4, 2, 2), torch.randn(1, 4, 2, 2), torch.tensor([999])
    assert schedule.alpha_bar[-1] == 0
    assert torch.equal(schedule.add_noise(x0, eps, t), eps)
    plain = NoiseSchedule.from_config(STABLE_DIFFUSION)
    torch.testing.assert_close(schedule.alpha_bar[0], plain.alpha_bar[0])


def test_target_gives_back_what_was_mixed():
    x0, eps = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    t = torch.tensor([3, 900])
    for prediction in DISCRETE:
        schedule = NoiseSchedule.from_config({"prediction_type": prediction.value})
        alpha_bar = schedule.alpha_bar[t].view(2, 1, 1, 1)
        x_t, target = schedule.add_noise(x0, eps, t), schedule.target(x0, eps, t)
        restored = {
            Prediction.EPSILON: lambda x_t, eps, a: (x_t - (1 - a).sqrt() * eps) / a.sqrt(),
            Prediction.V: lambda x_t, v, a: a.sqrt() * x_t - (1 - a).sqrt() * v,
            Prediction.X0: lambda x_t, x0, a: x0,
        }[prediction](x_t, target, alpha_bar)
        torch.testing.assert_close(restored, x0, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_noise_keeps_the_dtype_of_the_latents(dtype):
    x0, eps = torch.randn(2, 1, 4, 8, 8)
    schedule, t = NoiseSchedule.from_config(STABLE_DIFFUSION), torch.tensor([500])
    low = schedule.add_noise(x0.to(dtype), eps.to(dtype), t)
    assert low.dtype == dtype
    torch.testing.assert_close(low.float(), schedule.add_noise(x0, eps, t), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'"),
        ({"prediction_type": "flow"}, "prediction_type = 'flow'"),
        (dict(FlowMatchEulerDiscreteScheduler().config) | {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas = True"),
    ],
)
def test_what_is_not_known_is_refused_by_name(config, named):
    with pytest.raises(WeightsError, match=named):
        NoiseSchedule.from_config(config)


def test_reads_the_configuration_of_another_scheduler():
    theirs = EulerDiscreteScheduler(**STABLE_DIFFUSION)
    torch.testing.assert_close(NoiseSchedule.from_config(theirs.config).alpha_bar, theirs.alphas_cumprod)
