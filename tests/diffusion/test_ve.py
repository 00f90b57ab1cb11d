"""The variance exploding process, its loss and its samplers, against what is known in closed form."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sdtune.diffusion.objectives import denoising_loss
from sdtune.diffusion.schedule import NoiseSchedule, Prediction
from sdtune.diffusion.ve import VarianceExploding, read_schedule
from sdtune.diffusion.ve_sampling import VE_SAMPLERS, calls
from sdtune.errors import WeightsError

SCHEDULE = VarianceExploding(25.0)


def test_the_deviation_of_the_noise_is_that_of_the_process() -> None:
    t = torch.tensor([1e-5, 0.1, 0.5, 1.0])
    expected = [math.sqrt((25 ** (2 * x) - 1) / (2 * math.log(25))) for x in t.tolist()]
    torch.testing.assert_close(SCHEDULE.std(t), torch.tensor(expected), rtol=1e-3, atol=0)
    torch.testing.assert_close(SCHEDULE.time_of(SCHEDULE.std(t)), t, rtol=1e-4, atol=0)
    # std^2 is the integral of g^2, which is what drives it
    fine = torch.linspace(0, 0.5, 10_001, dtype=torch.float64)
    assert torch.trapezoid(SCHEDULE.diffusion(fine) ** 2, fine).sqrt().item() == pytest.approx(expected[2], rel=1e-4)


def test_noise_is_added_to_the_picture_as_it_is() -> None:
    x0, eps, t = torch.rand(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([0.2, 0.9])
    std = SCHEDULE.std(t).view(2, 1, 1, 1)
    torch.testing.assert_close(SCHEDULE.add_noise(x0, eps, t), x0 + std * eps)
    torch.testing.assert_close(SCHEDULE.target(x0, eps, t), -eps / std)
    signal = SCHEDULE.signal(t)
    torch.testing.assert_close(signal / (1 - signal), 1 / SCHEDULE.std(t) ** 2)


def test_times_cover_the_interval() -> None:
    assert SCHEDULE.time(0.0) == 1e-5 and SCHEDULE.time(1 - 2**-53) == pytest.approx(1.0)
    assert SCHEDULE.time(0.5) == pytest.approx(0.5, abs=1e-5)
    discrete = NoiseSchedule(torch.linspace(1, 0, 10))
    assert [discrete.time(u) for u in (0.0, 0.1, 0.95)] == [0, 1, 9]
    seen = discrete.answer(lambda x_t, t: t, torch.zeros(2, 1), torch.tensor([0, 5]))
    torch.testing.assert_close(seen, torch.tensor([0.0, 0.5]))


def test_an_answer_of_zero_scores_the_number_of_pixels() -> None:
    torch.manual_seed(0)
    x0, eps, t = torch.rand(500, 1, 28, 28), torch.randn(500, 1, 28, 28), torch.rand(500)
    loss = denoising_loss(lambda x_t, t: torch.zeros_like(x_t), x0, eps, t, SCHEDULE)
    assert loss.shape == (500,) and loss.mean().item() == pytest.approx(784, rel=0.01)
    exact = denoising_loss(lambda x_t, t: SCHEDULE.target(x0, eps, t), x0, eps, t, SCHEDULE)
    torch.testing.assert_close(exact, torch.zeros(500), atol=1e-6, rtol=0)
    half = denoising_loss(lambda x_t, t: SCHEDULE.target(x0, eps, t) / 2, x0, eps, t, SCHEDULE)
    torch.testing.assert_close(half, (eps / 2).square().sum(dim=(1, 2, 3)))


def test_the_schedule_is_read_from_a_configuration() -> None:
    assert read_schedule({"prediction_type": "ve_score", "sigma": 10}) == VarianceExploding(10.0)
    assert read_schedule({"prediction_type": "ve_score"}).prediction is Prediction.SCORE
    assert isinstance(read_schedule({"prediction_type": "v_prediction"}), NoiseSchedule)
    with pytest.raises(WeightsError, match="sigma = 1; expected a number above 1"):
        read_schedule({"prediction_type": "ve_score", "sigma": 1})
    with pytest.raises(WeightsError, match="ve_score"):
        NoiseSchedule.from_config({"prediction_type": "ve_score"})


# --- samplers ---------------------------------------------------------------------------------------------------------

MEAN, DEVIATION = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])  # of two pixels, normally distributed
PAIRS = 50  # of them in a picture: 100 pixels


def gaussian_score(x: Tensor, t: Tensor) -> Tensor:
    """The score of the noisy pixels: they are normal too, with the variances added."""
    mean, variance = MEAN.repeat(x.shape[1] // 2), DEVIATION.repeat(x.shape[1] // 2) ** 2
    return (mean - x) / (variance + SCHEDULE.std(t)[:, None] ** 2)


def drawn(sampler: Callable[..., Tensor], steps: int, count: int = 400) -> Tensor:
    """Both pixels of all pairs of so many pictures, (count * PAIRS, 2)."""
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(count, 2 * PAIRS, generator=generator)

    return sampler(gaussian_score, SCHEDULE.std(torch.ones(1)) * noise(), SCHEDULE, steps, noise).view(-1, 2)


@pytest.mark.parametrize(
    ("name", "steps", "off"),  # Langevin steps are of a length that widens a distribution a little
    [("euler-maruyama", 500, 0.02), ("predictor-corrector", 250, 0.05)],
)
def test_samples_of_a_gaussian_have_its_mean_and_deviation(name: str, steps: int, off: float) -> None:
    samples = drawn(VE_SAMPLERS[name], steps)
    # They begin with mean 0, which they forget as far as the noise at t = 1 outweighs the deviation: to a twelfth.
    torch.testing.assert_close(samples.mean(dim=0), MEAN, atol=0, rtol=0.1)
    torch.testing.assert_close(samples.std(dim=0), DEVIATION, atol=0, rtol=off)


def test_samples_of_the_ordinary_equation_have_the_mean_and_deviation_that_it_leads_to() -> None:
    samples = drawn(VE_SAMPLERS["probability-flow"], 30)
    begin = SCHEDULE.std(torch.tensor(1.0))
    share = DEVIATION / (DEVIATION**2 + begin**2).sqrt()  # of the first noise, and of how far its mean was off
    torch.testing.assert_close(samples.mean(dim=0), MEAN * (1 - share), atol=0.03, rtol=0)
    torch.testing.assert_close(samples.std(dim=0), begin * share, atol=0, rtol=0.02)


def test_the_ordinary_equation_gives_the_picture_of_each_noise() -> None:
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    first = SCHEDULE.std(torch.ones(1)) * noise
    ended = VE_SAMPLERS["probability-flow"](gaussian_score, first, SCHEDULE, 200, lambda: noise / 0)
    # In closed form x moves along its deviation: (x - mean) / sqrt(variance + std^2) stays.
    begin = SCHEDULE.std(torch.tensor(1.0))
    expected = MEAN + (first - MEAN) * DEVIATION / (DEVIATION**2 + begin**2).sqrt()
    torch.testing.assert_close(ended, expected, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("name", VE_SAMPLERS)
def test_the_network_is_called_as_often_as_is_said(name: str) -> None:
    asked = []

    def score(x: Tensor, t: Tensor) -> Tensor:
        asked.append(t)
        return gaussian_score(x, t)

    VE_SAMPLERS[name](score, torch.randn(3, 2), SCHEDULE, 7, lambda: torch.zeros(3, 2))
    assert len(asked) == calls(name, 7) and all(t.shape == (3,) for t in asked)


def test_preconditioned_an_answer_of_zero_is_the_score_of_gaussian_pixels() -> None:
    schedule = VarianceExploding(25.0, data_std=0.3)
    x_t, t = torch.randn(3, 1, 4, 4), torch.tensor([0.01, 0.3, 1.0])
    variance = (schedule.std(t) ** 2 + 0.3**2).view(3, 1, 1, 1)  # of x_t, if x0 is normal with deviation 0.3
    nothing = schedule.answer(lambda x_t, t: torch.zeros_like(x_t), x_t, t)
    torch.testing.assert_close(nothing, -x_t / variance)


def test_preconditioned_the_network_sees_and_owes_numbers_of_deviation_one() -> None:
    torch.manual_seed(0)
    schedule = VarianceExploding(25.0, data_std=0.3)
    for time in (1e-3, 0.1, 0.5, 1.0):
        x0, eps, t = 0.3 * torch.randn(200, 1, 8, 8), torch.randn(200, 1, 8, 8), torch.full((200,), time)
        x_t, seen = schedule.add_noise(x0, eps, t), []
        offset = schedule.answer(lambda x, t: seen.append(x) or torch.zeros_like(x), x_t, t)  # noqa: B023
        slope = schedule.answer(lambda x, t: torch.ones_like(x), x_t, t) - offset
        owed = (schedule.target(x0, eps, t) - offset) / slope
        assert seen[0].std().item() == pytest.approx(1.0, rel=0.02)
        assert owed.std().item() == pytest.approx(1.0, rel=0.02)
        torch.testing.assert_close(schedule.answer(lambda x, t: owed, x_t, t), schedule.target(x0, eps, t))  # noqa: B023


def test_a_deviation_of_the_pixels_that_cannot_be_is_refused() -> None:
    assert read_schedule({"prediction_type": "ve_score", "data_std": 0.3}) == VarianceExploding(25.0, 0.3)
    with pytest.raises(WeightsError, match="data_std = 0; expected a number above 0"):
        read_schedule({"prediction_type": "ve_score", "data_std": 0})
